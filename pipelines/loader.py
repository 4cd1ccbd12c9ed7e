"""Reading scenes onto a block, by the parts of `stackstac.stack`: items brought onto the block's
grid (`prepare_items`), a reader a band, its window fetched.

They are called one after the other. `stack` itself makes a Dask graph and an xarray of them, which
takes as long as reading a small block's pixels.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.transform import Affine
from stackstac.prepare import prepare_items
from stackstac.to_dask import asset_table_to_reader_and_window, fetch_raster_window

from pipelines.files import Asset, AssetError, OpenFiles, open_files
from pipelines.items import Scene, stac_item
from pipelines.radiometry import to_decibels
from pipelines.rasters import GridReader, PixelGrid, Source, on_grid, read_coarse
from pipelines.remote import is_remote
from pipelines.select import Look
from schemas.grid import Bounds
from schemas.sensor import Mask, Sensor

_CACHE_BYTES = 64 * 2**20
"""Of decoded blocks: those of a wide pixel-interleaved file, or those that neighbouring places
share in a dozen bands of a few scenes. (rasterio takes the limit in bytes.)"""
_LOOK_CELLS = 256
"""Cells along a side of the lattice on which masks are compared."""


@dataclass(frozen=True)
class Place:
    """A block of whole pixels."""

    epsg: int
    bounds_utm: Bounds
    gsd_m: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        x0, y0, x1, y1 = self.bounds_utm
        return round((y1 - y0) / self.gsd_m), round((x1 - x0) / self.gsd_m)

    def rows(self, rows: slice) -> "Place":
        """Some rows of it."""
        x0, _, x1, y1 = self.bounds_utm
        top, bottom = y1 - rows.start * self.gsd_m, y1 - rows.stop * self.gsd_m
        return Place(self.epsg, (x0, bottom, x1, top), self.gsd_m)


@dataclass
class Loader:
    """Reads a block's scenes. Every method raises AssetError for a file that cannot be read."""

    sensor: Sensor
    place: Place
    resampling: Resampling
    files: OpenFiles
    reader: Any
    """`GridReader` with all but what stackstac gives it."""
    map: Callable[..., Iterable[Any]]
    """Over the bands of a scene: in threads where waiting takes the time."""
    clipped: dict[str, int]
    """By `Asset.key`: pixels that did not fit the storage type at the last read."""
    counts: Counter[str] = field(default_factory=Counter)
    seen: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    """By `Asset.key`: what `clouded` gives, where `look` saw every pixel."""

    def image(self, scene: Scene, place: Place | None = None) -> NDArray[Any] | None:
        """Pixels [band, y, x], writable; None: the scene does not meet the block."""
        names = (b.name for b in self.sensor.bands)
        fill = np.dtype(self.sensor.dtype).type(self.sensor.nodata)
        self.clipped.clear()
        image = self._load(scene, dict(zip(names, scene.bands)), self.resampling, fill, place)
        self.counts["pixel_out_of_range"] += sum(self.clipped.values())
        return image

    def clouded(self, scene: Scene, place: Place | None = None) -> NDArray[np.bool_] | None:
        """[y, x] where the scene's mask marks pixels as invalid; None: it has no mask here."""
        if self.sensor.mask is None or scene.mask is None:
            return None
        if place is None and scene.mask.key in self.seen:
            return self.seen[scene.mask.key]
        fill = np.uint16(self.sensor.mask.nodata)
        mask = self._load(scene, {"mask": scene.mask}, Resampling.nearest, fill, place)
        if mask is None:
            return None
        clouded: NDArray[np.bool_] = invalid_values(self.sensor.mask)[mask[0]]
        return clouded

    def look(self, scene: Scene) -> Look | None:
        """The scene's mask on a coarse lattice over the block; None: it has no mask.

        Where the lattice is that of the pixels, `clouded` need not read it again.
        """
        mask, asset = self.sensor.mask, scene.mask
        if mask is None or asset is None:
            return None
        rows, cols = self.place.shape
        step = max(1, -(-max(rows, cols) // _LOOK_CELLS))
        x0, _, _, y1 = self.place.bounds_utm
        gsd_m = step * self.place.gsd_m
        transform = Affine(gsd_m, 0, x0, 0, -gsd_m, y1)
        grid = PixelGrid(self.place.epsg, transform, -(-rows // step), -(-cols // step))

        def coarse(dataset: Any) -> tuple[NDArray[Any], bool]:
            source = Source.of(dataset, asset, frozenset())
            return read_coarse(source, grid, mask.nodata), step == 1 and on_grid(source, grid)

        try:
            values, whole = self.files.read(asset, coarse)
        except (RasterioError, OSError) as error:
            raise AssetError(asset.href, error) from error
        data, invalid = values != mask.nodata, invalid_values(mask)[values]
        if whole:
            self.seen[asset.key] = invalid
        return Look(data, data & ~invalid)

    def _load(
        self,
        scene: Scene,
        assets: Mapping[str, Asset],
        resampling: Resampling,
        fill: np.unsignedinteger[Any],
        place: Place | None,
    ) -> NDArray[Any] | None:
        place = place or self.place
        table, spec, names, _ = prepare_items(
            [stac_item(scene, assets)],
            assets=list(assets),
            epsg=place.epsg,
            bounds=place.bounds_utm,
            resolution=place.gsd_m,
            snap_bounds=False,
            rescale=False,
            dtype=fill.dtype,
        )
        # stackstac leaves out items and bands that do not meet the bounds.
        if not table.size:
            return None
        readers = asset_table_to_reader_and_window(
            table, spec, resampling, fill.dtype, fill, False, None, (), self.reader
        )
        rows, columns = place.shape

        def read(one: NDArray[np.object_]) -> NDArray[Any]:
            window = slice(0, rows), slice(0, columns)
            pixels: NDArray[Any] = fetch_raster_window(one, window, fill.dtype, fill)[0]
            return pixels

        image = np.full((len(assets), rows, columns), fill)
        for name, pixels in zip(names, self.map(read, readers.reshape(-1, 1)), strict=True):
            image[list(assets).index(name)] = pixels
        return image


def invalid_values(mask: Mask) -> NDArray[np.bool_]:
    """[65536]: whether a value of a mask marks a pixel as invalid."""
    # A table: one pass over the pixels, however many values and bits there are.
    values = np.arange(65536)
    bad = np.isin(values, mask.invalid)
    bad |= (values & sum(1 << bit for bit in set(mask.invalid_bits))) != 0
    return bad


@contextmanager
def open_loader(
    scenes: Sequence[Scene], sensor: Sensor, place: Place, resampling: Resampling
) -> Iterator[Loader]:
    """A loader whose remote files are open until the end of the block."""
    clipped: dict[str, int] = {}
    remote = any(is_remote(a.href) for s in scenes for a in s.bands)
    with ExitStack() as stack:
        # Decoded blocks are kept with the files that stay open; GDAL's own limit is a share of the
        # machine's memory, which every worker would take.
        if "GDAL_CACHEMAX" not in os.environ:
            stack.enter_context(rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES))
        files = stack.enter_context(open_files(remote))
        # The pool ends before the files are closed that its threads read from.
        pool = stack.enter_context(ThreadPoolExecutor(8)) if remote else None
        reader = partial(
            GridReader,
            assets={a.key: a for s in scenes for a in (*s.bands, s.mask) if a},
            data_bands=frozenset(b.index for b in sensor.bands),
            files=files,
            clipped=clipped,
            encode=partial(to_decibels, sensor=sensor) if sensor.radiometry == "decibel" else None,
        )
        yield Loader(sensor, place, resampling, files, reader, pool.map if pool else map, clipped)
