"""Steps 1 and 2 of a shard: its pixels and its features, from a block of the grid or from pairs."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.checks import seams
from pipelines.features import Features, load_features
from pipelines.imagery import cut_chips, load_block
from pipelines.labels import rasterise
from pipelines.pairs import PairShard, read_pairs
from pipelines.plan import BlockSource, ShardTask, margin_m
from schemas.dataset import DatasetInfo
from schemas.grid import Block, Bounds, Grid, block_bounds, block_chips, pack_chips


@dataclass(frozen=True)
class Inputs:
    """What a shard is made from; N chips are kept out of a lattice of squares."""

    arrays: dict[str, NDArray[Any]]
    """Shard arrays of pixels and identity: image, valid, chip_id, epsg, bounds, ..."""
    features: Features
    frame: NDArray[np.int64] | None
    """Chip of each feature where chips are not on one grid (pairs)."""
    raster: NDArray[np.uint8]
    """Class raster at twice the resolution, of the whole lattice, y down."""
    lattice: tuple[int, int]
    """Squares of the raster along y and x."""
    kept: NDArray[np.int64]
    """[N] positions of the chips in the lattice, raster order."""
    seam: NDArray[np.bool_]
    """[N]: brightness jumps where two scenes meet."""
    scenes: list[str]
    radiometry: dict[str, str]
    """By scene: which offset was applied to its DN, and why."""
    considered: list[dict[str, object]]
    """Every candidate scene: scene, chosen, rank, cloud, coverage, reason."""
    counts: dict[str, int]


class Window(NamedTuple):
    """The part of a block that is read: the smallest square of chips that holds the wanted ones."""

    at: NDArray[np.int64]
    """[side**2] its chips' positions in the block, raster order."""
    bounds_utm: Bounds
    side: int
    """Chips along one side."""


def window_of(grid: Grid, block: Block, chips: NDArray[np.bool_]) -> Window:
    """The window of a block's wanted chips [shard_side**2]; a site in a block costs only itself."""
    n = grid.shard_side
    rows, columns = np.nonzero(chips.reshape(n, n)) if chips.any() else (np.arange(n), np.arange(n))
    side = int(max(np.ptp(rows), np.ptp(columns))) + 1
    top, left = min(int(rows.min()), n - side), min(int(columns.min()), n - side)
    at = (np.arange(top, top + side)[:, None] * n + np.arange(left, left + side)).ravel()
    if side == n:
        return Window(at, block_bounds(grid, block), side)
    west, north = block.col * n + left, (block.row + 1) * n - top
    chips_of = (west, north - side, west + side, north)
    x0, y0, x1, y1 = (c * grid.chip_m for c in chips_of)
    return Window(at, (x0, y0, x1, y1), side)


def read_inputs(task: ShardTask) -> Inputs:
    """Read pixels and features of a shard."""
    if isinstance(task.source, PairShard):
        return _read_pairs(task.source, task.info)
    return _read_block(task, task.source, task.info)


def _read_block(task: ShardTask, source: BlockSource, info: DatasetInfo) -> Inputs:
    grid, block = info.grid, source.block
    window = window_of(grid, block, source.chips)
    at, bounds, side = window
    pixels = load_block(
        source.scenes, info.sensor, block.epsg, bounds, grid.gsd_m, source.rules,
        patch=grid.patch, date=source.date,
    )  # fmt: skip
    cut = cut_chips(pixels, side, grid.size)
    wanted, enough = source.chips[at], cut.valid >= source.min_valid
    kept = np.flatnonzero(wanted & enough)
    chips = block_chips(grid, block)
    of = at[kept]
    arrays = {
        "image": cut.image[kept],
        "valid": cut.valid[kept],
        "time": cut.time[kept],
        "scene": cut.scene[kept],
        "chip_id": pack_chips(block.epsg, grid, chips.cols[of], chips.rows[of]),
        "epsg": np.full(len(kept), block.epsg, np.int32),
        "bounds": chips.bounds_utm[of],
        "center_lonlat": chips.center_lonlat[of],
    }
    margin = margin_m(info, task.registration)
    wide = (bounds[0] - margin, bounds[1] - margin, bounds[2] + margin, bounds[3] + margin)
    features = load_features(source.parquet, block.epsg, wide, info.taxonomy)
    raster = _draw_block(features, window, info)
    seam = seams(pixels.image, pixels.scene, side, grid.size, info.sensor.nodata)
    dropped = int((wanted & ~enough).sum())
    counts = {**pixels.counts, "chip_below_min_valid": dropped}
    return Inputs(
        arrays, features, None, raster, (side, side), kept, seam[kept], pixels.scenes,
        pixels.radiometry, pixels.considered, counts,
    )  # fmt: skip


def _read_pairs(source: PairShard, info: DatasetInfo) -> Inputs:
    pairs = read_pairs(source, info)
    n = len(pairs.scenes)
    raster = _draw_pairs(pairs.features, pairs.frame, pairs.arrays["bounds"], info)
    return Inputs(
        pairs.arrays, pairs.features, pairs.frame, raster, (n, 1), np.arange(n),
        np.zeros(n, bool), pairs.scenes, {}, [], pairs.counts,
    )  # fmt: skip


def draw(task: ShardTask, inputs: Inputs) -> NDArray[np.uint8]:
    """The class raster of some inputs, from their features."""
    if isinstance(task.source, PairShard):
        assert inputs.frame is not None
        return _draw_pairs(inputs.features, inputs.frame, inputs.arrays["bounds"], task.info)
    window = window_of(task.info.grid, task.source.block, task.source.chips)
    return _draw_block(inputs.features, window, task.info)


def _draw_block(features: Features, window: Window, info: DatasetInfo) -> NDArray[np.uint8]:
    return rasterise(
        features.geometry, features.osm_class, features.width_m, window.bounds_utm,
        2 * info.grid.size * window.side,
    )  # fmt: skip


def _draw_pairs(
    features: Features, frame: NDArray[np.int64], bounds: NDArray[np.float64], info: DatasetInfo
) -> NDArray[np.uint8]:
    """Frames one below the other; `frame` ascends."""
    side = 2 * info.grid.size
    ends = np.searchsorted(frame, np.arange(len(bounds) + 1)).tolist()
    frames = [
        rasterise(
            features.geometry[a:b], features.osm_class[a:b], features.width_m[a:b], tuple(square),
            side,
        )
        for (a, b), square in zip(pairwise(ends), bounds, strict=True)
    ]  # fmt: skip
    return np.concatenate([np.zeros((0, side), np.uint8), *frames])
