"""Reading one band of a raster file onto a pixel grid.

`GridReader` is the reader that `stackstac` is given (its `reader=` parameter). The one it ships
warps every file, takes files of a single band only, and opens a file once per band. This one
copies pixels where the file lies on the grid, and lets GDAL resample only where it does not.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.transform import Affine, array_bounds
from rasterio.warp import reproject, transform_bounds
from rasterio.windows import Window, from_bounds
from rasterio.windows import transform as window_transform

from pipelines.files import Asset, AssetError, OpenFiles

# Warping speaks so of its own copies in memory; a file without a place is a finding of ours.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning, module="rasterio.warp")


class PixelGrid(NamedTuple):
    """A north-up grid of square pixels."""

    epsg: int
    transform: Affine
    height: int
    width: int

    @property
    def gsd_m(self) -> float:
        """Pixel size in metres."""
        return float(self.transform.a)


Encode = Callable[[NDArray[Any], NDArray[np.bool_] | None], tuple[NDArray[Any], NDArray[np.bool_]]]
"""Pixels and where they are missing, into the sensor's numbers (not rounded) and the same."""


class GridReader:
    """stackstac's Reader protocol: reads windows of a grid from one asset.

    `assets` maps keys to assets, `data_bands` are the band numbers that hold data even if a file
    calls one of them alpha (NAIP's infrared band is often tagged so), `clipped` takes by key how
    many pixels did not fit the storage type, `encode` turns a file's numbers into the sensor's.
    """

    def __init__(
        self,
        *,
        url: str,
        spec: Any,
        resampling: Resampling,
        dtype: np.dtype[Any],
        fill_value: int,
        assets: Mapping[str, Asset],
        data_bands: frozenset[int],
        files: OpenFiles,
        clipped: dict[str, int],
        encode: Encode | None = None,
        **_: Any,
    ) -> None:
        self.asset = assets[url]
        self.spec = spec
        self.resampling = resampling
        self.dtype = np.dtype(dtype)
        self.nodata = int(fill_value)
        self.data_bands = data_bands
        self.files = files
        self.clipped = clipped
        self.encode = encode

    def read(self, window: Window, **_: Any) -> NDArray[Any]:
        """Pixels [y, x] of a window of the grid.

        Raises AssetError for a missing or broken file, GeoLinkError where its server cannot be
        reached or denies access.
        """
        transform = window_transform(window, self.spec.transform)
        grid = PixelGrid(self.spec.epsg, transform, int(window.height), int(window.width))

        def read(dataset: Any) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
            source = Source.of(dataset, self.asset, self.data_bands)
            # Above 8 bit, 0 is kept for "no data"; in 8-bit images it is also plain black.
            if source.nodata is None and self.dtype != np.uint8:
                source = replace(source, nodata=self.nodata)
            return read_grid(source, grid, self.resampling, self.nodata)

        try:
            data, missing = self.files.read(self.asset, read)
        except (RasterioError, OSError) as error:
            raise AssetError(self.asset.href, error) from error
        if self.encode is not None:
            data, missing = self.encode(data, missing)
        stored, clipped = to_storage(data, missing, self.dtype, self.nodata)
        self.clipped[self.asset.key] = clipped
        return stored

    def close(self) -> None:
        """Nothing: the load closes its files."""


@dataclass(frozen=True)
class Source:
    """An open band with what is needed to place it."""

    dataset: Any
    index: int
    crs: Any
    transform: Affine | None
    """None: placed by ground control points."""
    nodata: float | None
    masked: bool
    """The file has a mask or alpha band."""

    @classmethod
    def of(cls, dataset: Any, asset: Asset, data_bands: frozenset[int]) -> "Source":
        """Place and mask of an asset, by the file's own word where it has one.

        Raises AssetError where that contradicts what the asset's metadata says.
        """
        crs, transform = dataset.crs, None if dataset.transform.is_identity else dataset.transform
        if crs is None and transform is None and dataset.gcps[1] is not None:
            # Radar geometry: GDAL goes by the file's ground control points.
            return cls(dataset, asset.index, dataset.gcps[1], None, dataset.nodata, False)
        if crs is not None and transform is not None:
            _check_place(dataset, asset)
        if crs is None and asset.epsg is not None:
            crs = rasterio.CRS.from_epsg(asset.epsg)
        if transform is None:
            transform = Affine(*asset.transform) if asset.transform else dataset.transform
        flags = dataset.mask_flag_enums[asset.index - 1]
        alpha = [i for i, c in enumerate(dataset.colorinterp, 1) if c == ColorInterp.alpha]
        masked = MaskFlags.per_dataset in flags and not data_bands.intersection(alpha)
        return cls(dataset, asset.index, crs, transform, dataset.nodata, masked)


def _check_place(dataset: Any, asset: Asset) -> None:
    """Raises AssetError where a file lies more than two of its pixels from where metadata says."""
    if asset.epsg is None or asset.transform is None or asset.shape is None:
        return
    stated = array_bounds(*asset.shape, Affine(*asset.transform))
    own, epsg = tuple(dataset.bounds), dataset.crs.to_epsg()
    if epsg is not None and epsg != asset.epsg:
        stated = transform_bounds(rasterio.CRS.from_epsg(asset.epsg), dataset.crs, *stated)
    # A box that is turned into another CRS is wider by what its sides are bent.
    slack = 2 * max(abs(v) for v in (dataset.transform.a, dataset.transform.e))
    slack += 0.0 if epsg in (None, asset.epsg) else 0.05 * (own[2] - own[0] + own[3] - own[1])
    if max(abs(a - b) for a, b in zip(own, stated, strict=True)) > slack:
        text = (
            f"lies at {[round(v, 1) for v in own]} (EPSG:{epsg}), its item says "
            f"{[round(v, 1) for v in stated]} (EPSG:{asset.epsg})"
        )
        raise AssetError(asset.href, text, "scene_place_wrong")


def read_grid(
    source: Source, grid: PixelGrid, resampling: Resampling, fill: int
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """A band on a grid, in the file's type, and where it has no data (None: nowhere).

    Pixels are copied where the file lies on the grid, repeated or interpolated where its pixels
    are whole multiples of the grid's, and warped everywhere else (GDAL, with its usual error of
    up to an eighth of a pixel in place). Pixels outside the file are without data. Another datum
    is changed by PROJ's default transformation.
    """
    placed = _placement(source, grid)
    if placed is None:
        return _warp(source, grid, resampling, fill)
    zoom, col, row = placed
    rows, cols = source.dataset.shape
    y0, y1 = max(0, row), min(grid.height, row + rows * zoom)
    x0, x1 = max(0, col), min(grid.width, col + cols * zoom)
    data = np.empty((grid.height, grid.width), source.dataset.dtypes[source.index - 1])
    missing = np.ones(data.shape, bool)
    if y0 >= y1 or x0 >= x1:
        data.fill(0)
        return data, missing
    fy, fx = (y0 - row) // zoom, (x0 - col) // zoom
    window = Window(fx, fy, -(-(x1 - col) // zoom) - fx, -(-(y1 - row) // zoom) - fy)
    native = source.dataset.read(source.index, window=window)
    empty = _empty(source, native, window)
    inner = (
        slice(y0 - row - fy * zoom, y1 - row - fy * zoom),
        slice(x0 - col - fx * zoom, x1 - col - fx * zoom),
    )
    if zoom == 1:
        part = native
    elif resampling == Resampling.nearest:
        part = _repeat(native, zoom)[inner]
    elif resampling == Resampling.bilinear and (empty is None or not empty.any()):
        exact = Window((x0 - col) / zoom, (y0 - row) / zoom, (x1 - x0) / zoom, (y1 - y0) / zoom)
        shape = (y1 - y0, x1 - x0)
        part = source.dataset.read(
            source.index, window=exact, out_shape=shape, resampling=resampling
        )
    else:
        return _warp(source, grid, resampling, fill)
    whole = part.shape == data.shape
    if empty is None and whole:
        return part, None
    if empty is not None:
        empty = _repeat(empty, zoom)[inner]
    if whole:
        return part, empty
    data.fill(0)
    data[y0:y1, x0:x1] = part
    missing[y0:y1, x0:x1] = False if empty is None else empty
    return data, missing


def read_coarse(source: Source, grid: PixelGrid, fill: int) -> NDArray[Any]:
    """About one pixel of a band for each cell [y, x] of a coarse grid, the one at its centre.

    From the file's overviews where it has them; `fill` beyond the file and where it has no data.
    """
    t, g = source.transform, grid.transform
    if t is None or source.crs.to_epsg() != grid.epsg or t.b or t.d or t.a <= 0 or t.e >= 0:
        data, missing = _warp(source, grid, Resampling.nearest, fill)
        if missing is not None:
            data[missing] = fill
        return data
    cols = (g.c + (np.arange(grid.width) + 0.5) * g.a - t.c) / t.a
    rows = (g.f + (np.arange(grid.height) + 0.5) * g.e - t.f) / t.e
    height, width = source.dataset.shape
    inside = (rows >= 0) & (rows < height), (cols >= 0) & (cols < width)
    dtype = np.dtype(source.dataset.dtypes[source.index - 1])
    out = np.full((grid.height, grid.width), fill).astype(dtype)
    if not inside[0].any() or not inside[1].any():
        return out
    y, x = (np.flatnonzero(v)[[0, -1]] for v in inside)
    step_y, step_x = g.e / t.e, g.a / t.a
    y0, x0 = max(0.0, rows[y[0]] - step_y / 2), max(0.0, cols[x[0]] - step_x / 2)
    y1, x1 = min(height, rows[y[1]] + step_y / 2), min(width, cols[x[1]] + step_x / 2)
    shape = (int(y[1] - y[0] + 1), int(x[1] - x[0] + 1))
    window = Window(x0, y0, x1 - x0, y1 - y0)
    part = source.dataset.read(source.index, window=window, out_shape=shape)
    empty = None if source.nodata is None else part == source.nodata
    if empty is not None:
        part[empty] = fill
    out[y[0] : y[1] + 1, x[0] : x[1] + 1] = part
    return out


def on_grid(source: Source, grid: PixelGrid) -> bool:
    """Whether `read_coarse` gives every pixel that `read_grid` would: nothing is resampled, and no
    mask beside the band has a say.
    """
    return not source.masked and _placement(source, grid) is not None


def _repeat(array: NDArray[Any], zoom: int) -> NDArray[Any]:
    return array if zoom == 1 else array.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _placement(source: Source, grid: PixelGrid) -> tuple[int, int, int] | None:
    """(grid pixels along a side of a file pixel, column, row of the file's corner on the grid).

    None unless the file is in the grid's CRS and its pixels' edges are edges of the grid's.
    """
    t, g, gsd = source.transform, grid.transform, grid.gsd_m
    if t is None or source.crs.to_epsg() != grid.epsg or t.b or t.d or t.a <= 0 or t.e >= 0:
        return None
    zoom, col, row = t.a / gsd, (t.c - g.c) / gsd, (g.f - t.f) / gsd
    rows, cols = source.dataset.shape
    # Rounded figures in metadata are forgiven up to a thousandth of a pixel over the whole file.
    drift = max(abs(zoom - round(zoom)) * cols, abs(-t.e / gsd - round(zoom)) * rows)
    if round(zoom) < 1 or max(drift, abs(col - round(col)), abs(row - round(row))) > 1e-3:
        return None
    return round(zoom), round(col), round(row)


def _empty(source: Source, native: NDArray[Any], window: Window) -> NDArray[np.bool_] | None:
    """Pixels of a native read without data; None: the file cannot say so."""
    empty: NDArray[np.bool_] | None = None
    if source.nodata is not None:
        nan = np.isnan(source.nodata)
        empty = np.isnan(native) if nan else native == native.dtype.type(source.nodata)
    if source.masked:
        mask = source.dataset.read_masks(source.index, window=window) == 0
        empty = mask if empty is None else empty | mask
    return empty


def _warp(
    source: Source, grid: PixelGrid, resampling: Resampling, fill: int
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """A band resampled onto a grid by GDAL's warper."""
    dtype = np.dtype(source.dataset.dtypes[source.index - 1])
    target = {
        "dst_transform": grid.transform,
        "dst_crs": rasterio.CRS.from_epsg(grid.epsg),
        "resampling": resampling,
    }
    if source.masked:
        return _warp_masked(source, grid, target)
    nodata = fill if source.nodata is None else source.nodata
    data = np.full((grid.height, grid.width), nodata).astype(dtype)
    place = {"src_transform": source.transform} if source.transform is not None else {}
    reproject(
        rasterio.band(source.dataset, source.index),
        data,
        src_crs=source.crs,
        **place,
        src_nodata=source.nodata,
        dst_nodata=nodata,
        init_dest_nodata=False,
        **target,
    )
    if source.nodata is None:
        return data, None
    return data, np.isnan(data) if np.isnan(nodata) else data == dtype.type(nodata)


def _warp_masked(
    source: Source, grid: PixelGrid, target: Mapping[str, Any]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The same for a file with a mask, which is warped along with the pixels as alpha."""
    dataset, transform = source.dataset, source.transform
    assert transform is not None
    dtype = np.dtype(dataset.dtypes[source.index - 1])
    out = np.zeros((2, grid.height, grid.width), dtype)
    bounds = transform_bounds(
        rasterio.CRS.from_epsg(grid.epsg),
        source.crs,
        *array_bounds(grid.height, grid.width, grid.transform),
    )
    near = from_bounds(*bounds, transform)
    # A margin of source pixels, for the kernel.
    y0, x0 = max(0, math.floor(near.row_off) - 4), max(0, math.floor(near.col_off) - 4)
    y1 = min(dataset.height, math.ceil(near.row_off + near.height) + 4)
    x1 = min(dataset.width, math.ceil(near.col_off + near.width) + 4)
    if y0 < y1 and x0 < x1:
        window = Window(x0, y0, x1 - x0, y1 - y0)
        native = dataset.read(source.index, window=window)
        empty = _empty(source, native, window)
        full = np.iinfo(dtype).max if dtype.kind in "iu" else 1
        alpha = np.full(native.shape, full, dtype)
        alpha[empty] = 0
        reproject(
            np.stack([native, alpha]),
            out,
            src_crs=source.crs,
            src_transform=window_transform(window, transform),
            src_alpha=2,
            **target,
        )
    return out[0], out[1] == 0


def to_storage(
    data: NDArray[Any], missing: NDArray[np.bool_] | None, dtype: np.dtype[Any], nodata: int
) -> tuple[NDArray[Any], int]:
    """Pixels in the storage type with `nodata` where missing, and how many had to be clipped.

    Not-a-number is missing; fractions are rounded; a value that would land on `nodata` by being
    rounded or clipped is kept off it by one.
    """
    if data.dtype == dtype:
        if missing is not None:
            data[missing] = nodata
        return data, 0
    if data.dtype.kind == "f":
        nan = np.isnan(data)
        missing = nan if missing is None else missing | nan
    limits = np.iinfo(dtype)
    rounded = np.rint(data) if data.dtype.kind == "f" else data
    if np.can_cast(data.dtype, dtype):
        stored, clipped = data.astype(dtype), np.zeros((), bool)
    else:
        clipped = (rounded < limits.min) | (rounded > limits.max)
        # Not-a-number is overwritten below; zero keeps the cast defined.
        held = np.clip(np.nan_to_num(rounded), limits.min, limits.max)
        stored = held.astype(dtype)
        moved = (stored == nodata) & (data != nodata)
        stored[moved] = nodata - 1 if nodata == limits.max else nodata + 1
    if missing is not None:
        stored[missing] = nodata
        clipped = clipped & ~missing
    return stored, int(clipped.sum())
