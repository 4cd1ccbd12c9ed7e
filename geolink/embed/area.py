"""Areas: pixels on one lattice, of a zone of a dataset or of one file, cut into blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from geolink.reader import Dataset
from geolink.tasks.contracts import Imagery
from schemas.cf import grid_mapping
from schemas.dataset import SnapshotRow, read_arrays
from schemas.errors import GeoLinkError


class Block(NamedTuple):
    """A part of an area that is computed and written at once, in patches from the north-west."""

    name: str
    row: int
    column: int
    rows: int
    columns: int
    shard: SnapshotRow | None = None
    """Whose chips these are."""


Read = Callable[[int, int, int, int], NDArray[Any]]
"""(row, column, rows, columns) in pixels, all within the area -> [band, y, x]."""


@dataclass(frozen=True, eq=False)
class Area:
    """Pixels on one lattice; y runs down."""

    name: str
    mapping: Mapping[str, Any]
    """Attributes of a CF grid mapping; `crs_wkt` is one of them."""
    west: float
    north: float
    """Outer corner of the first pixel, in units of the CRS."""
    step: tuple[float, float]
    """Width and height of a pixel, in units of the CRS."""
    shape: tuple[int, int]
    """Rows and columns of pixels."""
    patch: int
    """Side of a patch in pixels."""
    imagery: Imagery
    blocks: tuple[Block, ...]
    side: int
    """Patches along a side of a block, but for those at the edge."""
    read: Read
    chip: int = 0
    """Side of a chip in pixels; 0: there are no chips."""

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches; the last ones may reach beyond the pixels."""
        return -(-self.shape[0] // self.patch), -(-self.shape[1] // self.patch)


def cut_blocks(shape: tuple[int, int], patch: int, side: int) -> tuple[Block, ...]:
    """Blocks of `side` patches that cover `shape` pixels, row by row."""
    rows, columns = -(-shape[0] // patch), -(-shape[1] // patch)
    return tuple(
        Block(f"{row // side:05d}-{column // side:05d}", row, column, min(side, rows - row),
              min(side, columns - column))
        for row in range(0, rows, side)
        for column in range(0, columns, side)
    )  # fmt: skip


def dataset_areas(dataset: Dataset, patch: int) -> list[Area]:
    """The zones of a dataset, a block a shard.

    patch: side in pixels. Raises GeoLinkError: chips of imported images, which lie on no lattice;
    patches that do not divide chips.
    """
    grid = dataset.info.grid
    if not dataset.info.aligned:
        raise GeoLinkError(
            f"the images of {dataset.path} were imported one by one and lie on no common lattice, "
            "so there is no map of them: embed the files they came from, or build a dataset of "
            "the region"
        )
    if grid.size % patch:
        raise GeoLinkError(
            f"the chips of {dataset.path} are {grid.size} px wide, which the patches of {patch} "
            "px of the checkpoint do not divide: build it with chips that they divide"
        )
    rows = [r for r in dataset.rows if r.chips]
    if not rows:
        raise GeoLinkError(f"{dataset.path} has no chips")
    return [
        _zone(dataset, epsg, [r for r in rows if r.epsg == epsg], patch)
        for epsg in sorted({r.epsg for r in rows})
    ]


def _zone(dataset: Dataset, epsg: int, rows: Sequence[SnapshotRow], patch: int) -> Area:
    grid, sensor = dataset.info.grid, dataset.info.sensor
    n, size = grid.shard_side, grid.size
    place = {tuple(int(v) for v in r.shard.split("-")[1:]): r for r in rows}
    west = min(column for column, _ in place)
    north = max(row for _, row in place)
    shards = {(north - row, column - west): r for (column, row), r in place.items()}
    side = n * size // patch
    blocks = tuple(
        Block(shard.shard, row * side, column * side, side, side, shard)
        for (row, column), shard in sorted(shards.items())
    )
    shape = tuple((1 + max(at[i] for at in shards)) * n * size for i in (0, 1))
    corner = (west * n, (north + 1) * n)
    return Area(
        name=str(epsg),
        mapping=grid_mapping(epsg),
        west=corner[0] * grid.chip_m,
        north=corner[1] * grid.chip_m,
        step=(grid.gsd_m, grid.gsd_m),
        shape=(shape[0], shape[1]),
        patch=patch,
        imagery=Imagery(
            tuple(b.name for b in sensor.bands), tuple(b.wavelength_nm for b in sensor.bands),
            sensor.dtype, sensor.nodata, (size, size), grid.gsd_m,
        ),
        blocks=blocks,
        side=side,
        read=_ShardPixels(dataset, shards, corner),
        chip=size,
    )  # fmt: skip


class _ShardPixels:
    """Reads pixels of a zone across the borders of chips and shards; nodata where no chip is."""

    def __init__(
        self, dataset: Dataset, shards: Mapping[tuple[int, int], SnapshotRow],
        corner: tuple[int, int],
    ) -> None:  # fmt: skip
        self._dataset, self._shards, self._corner = dataset, shards, corner

    def __call__(self, y: int, x: int, height: int, width: int) -> NDArray[Any]:
        grid, sensor = self._dataset.info.grid, self._dataset.info.sensor
        size, block = grid.size, grid.shard_side * grid.size
        out = np.full((len(sensor.bands), height, width), sensor.nodata, sensor.dtype)
        for row in range(y // block, (y + height - 1) // block + 1):
            for column in range(x // block, (x + width - 1) // block + 1):
                shard = self._shards.get((row, column))
                if shard is None:
                    continue
                for at_y, at_x, image in self._chips(shard, y, x, height, width):
                    _paste(out, image, at_y * size - y, at_x * size - x)
        return out

    def _chips(self, shard: SnapshotRow, y: int, x: int, height: int, width: int) -> list[Any]:
        """(row, column, pixels) of a shard's chips that meet a window; only those are read."""
        path, size = self._dataset.path, self._dataset.info.grid.size
        row, column = chip_places(
            read_arrays(path, shard.path, ["chip_id"])[0]["chip_id"], self._corner
        )
        meets = (row * size < y + height) & ((row + 1) * size > y)
        meets &= (column * size < x + width) & ((column + 1) * size > x)
        chosen = np.flatnonzero(meets)
        if not len(chosen):
            return []
        low, high = int(chosen[0]), int(chosen[-1]) + 1
        image = read_arrays(path, shard.path, ["image"], (low, high))[0]["image"]
        return [(int(row[n]), int(column[n]), image[n - low]) for n in chosen.tolist()]


def chip_places(
    chip_id: NDArray[np.uint64], corner: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row (down) and column of packed chips [N, 2], counted from a zone's column and row."""
    tail = chip_id[:, 1]
    column = (tail >> np.uint64(32)).astype(np.int64) - corner[0]
    return corner[1] - 1 - (tail & np.uint64(0xFFFFFFFF)).astype(np.int64), column


def _paste(out: NDArray[Any], image: NDArray[Any], y: int, x: int) -> None:
    """Put an image at row y, column x of another, where they meet."""
    top, left = max(y, 0), max(x, 0)
    bottom = min(y + image.shape[1], out.shape[1])
    right = min(x + image.shape[2], out.shape[2])
    out[:, top:bottom, left:right] = image[:, top - y : bottom - y, left - x : right - x]
