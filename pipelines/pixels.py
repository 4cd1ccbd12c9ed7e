"""Pixels of single raster files, and what the files say of them; windows of big ones."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pyproj import Geod
from rasterio.enums import ColorInterp
from rasterio.errors import RasterioError
from rasterio.warp import transform as warp
from rasterio.windows import Window

from pipelines.files import open_raster
from schemas.errors import GeoLinkError
from schemas.pixels import Pixels

_WGS84 = Geod(ellps="WGS84")
_DTYPES = ("uint8", "uint16", "float32")
_COLOURS = {ColorInterp.red: "red", ColorInterp.green: "green", ColorInterp.blue: "blue"}
_NM = {"nm": 1.0, "nanometers": 1.0, "um": 1e3, "µm": 1e3, "micrometers": 1e3, "microns": 1e3}
_HASHED = 1 << 20
"""Bytes of a big file, at either end, that tell it from another."""


class Scene(NamedTuple):
    """A georeferenced raster file, without its pixels."""

    path: Path
    key: str
    """Hash of its size and of both its ends."""
    crs_wkt: str
    epsg: int | None
    transform: tuple[float, float, float, float, float, float]
    """a, b, c, d, e, f: x = a column + b row + c, y = d column + e row + f."""
    shape: tuple[int, int, int]
    """Bands, rows, columns."""
    dtype: str
    gsd_m: float
    bands: tuple[str, ...] | None
    wavelength_nm: tuple[float | None, ...] | None
    nodata: int | None


def read_pixels(path: Path) -> Pixels:
    """Read a raster file that GDAL knows; what it does not say of its place is none.

    A band that says what is there (alpha) is left out: pixels without are as they are stored.
    Raises GeoLinkError: no raster, or values that are not uint8, uint16 or float32.
    """
    with _opened(path) as file:
        index = _colour_bands(file)
        _check_dtype(file, index, path)
        image = file.read(index)
        there = file.crs is not None and not file.transform.is_identity
        return Pixels(
            image,
            bounds_lonlat(file.crs, file.transform, file.shape, path) if there else None,
            ground_m(file.crs, file.transform, file.shape) if there else None,
            _names(file, index),
            _wavelengths(file, index),
            _nodata(file.nodata),
        )


def look(path: Path) -> Scene:
    """What a georeferenced raster file is, pixels unread.

    Raises GeoLinkError: no raster, no CRS or no place, a grid that is turned, a dtype as above.
    """
    with _opened(path) as file:
        index = _colour_bands(file)
        _check_dtype(file, index, path)
        if file.crs is None or file.transform.is_identity:
            what = "coordinate reference system" if file.crs is None else "geotransform"
            raise GeoLinkError(
                f"{path} has no {what}, so nobody knows where its pixels lie: write it into the "
                "file first (gdal_edit -a_srs ... -a_ullr ...)"
            )
        a, b, c, d, e, f = tuple(file.transform)[:6]
        if b or d or a <= 0 or e >= 0:
            raise GeoLinkError(
                f"{path} lies turned or mirrored on its map: warp it first (gdalwarp), so that "
                "its rows run from north to south"
            )
        return Scene(
            path=path, key=_key(path), crs_wkt=file.crs.to_wkt(version="WKT2_2019"),
            epsg=file.crs.to_epsg(), transform=(a, b, c, d, e, f),
            shape=(len(index), *file.shape), dtype=file.dtypes[0],
            gsd_m=ground_m(file.crs, file.transform, file.shape), bands=_names(file, index),
            wavelength_nm=_wavelengths(file, index), nodata=_nodata(file.nodata),
        )  # fmt: skip


def read_window(scene: Scene, y: int, x: int, height: int, width: int) -> NDArray[Any]:
    """Pixels [band, height, width] from row y, column x; all must lie in the scene.

    Raises GeoLinkError if the file cannot be read there.
    """
    with _opened(scene.path) as file:
        found: NDArray[Any] = file.read(_colour_bands(file), window=Window(x, y, width, height))
        return found


def bounds_lonlat(
    crs: Any, transform: Any, shape: Sequence[int], path: Path
) -> tuple[float, float, float, float]:
    """West, south, east, north in degrees of an image: of the points all along its border.

    East > 180 where it crosses the 180th meridian. Raises GeoLinkError if it lies nowhere on Earth.
    """
    height, width = shape
    along = np.linspace(0, 1, 21)
    zero, one = np.zeros(21), np.ones(21)
    column = np.concatenate([along, one, along, zero]) * width
    row = np.concatenate([zero, along, one, along]) * height
    x, y = transform * (column, row)
    lon, lat = (np.array(v) for v in warp(crs, "EPSG:4326", x, y))
    if not (np.isfinite(lon).all() and np.isfinite(lat).all() and (np.abs(lat) <= 90).all()):
        raise GeoLinkError(f"{path} lies outside of where its coordinate reference system holds")
    if np.ptp(lon) > 180:
        lon = np.where(lon < 0, lon + 360, lon)
    return float(lon.min()), float(lat.min()), float(lon.max()), float(lat.max())


def ground_m(crs: Any, transform: Any, shape: Sequence[int]) -> float:
    """Side in metres of the pixel in the middle of an image, measured on the ellipsoid."""
    row, column = shape[0] / 2, shape[1] / 2
    xy = [transform * (column + dx, row + dy) for dx, dy in ((0, 0), (1, 0), (0, 1))]
    lon, lat = warp(crs, "EPSG:4326", [p[0] for p in xy], [p[1] for p in xy])
    right = _WGS84.inv(lon[0], lat[0], lon[1], lat[1])[2]
    down = _WGS84.inv(lon[0], lat[0], lon[2], lat[2])[2]
    return float(np.sqrt(right * down))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with open_raster(str(path)) as file:
            yield file
    except (RasterioError, OSError) as error:
        raise GeoLinkError(f"{path} cannot be read as a raster: {error}") from error


def _colour_bands(file: Any) -> list[int]:
    return [n for n, c in enumerate(file.colorinterp, start=1) if c != ColorInterp.alpha]


def _check_dtype(file: Any, index: Sequence[int], path: Path) -> None:
    kinds = {file.dtypes[n - 1] for n in index}
    if len(kinds) != 1 or not kinds <= set(_DTYPES):
        raise GeoLinkError(
            f"{path} holds {' and '.join(sorted(kinds)) or 'no bands'}: images are of one type, "
            "uint8, uint16 or float32"
        )


def _names(file: Any, index: Sequence[int]) -> tuple[str, ...] | None:
    """Descriptions of the bands, or their colours; none unless all have one."""
    names = [file.descriptions[n - 1] or _COLOURS.get(file.colorinterp[n - 1]) for n in index]
    return tuple(str(n) for n in names) if all(names) else None


def _wavelengths(file: Any, index: Sequence[int]) -> tuple[float | None, ...] | None:
    """Centres as GDAL's IMAGERY domain (micrometres) or ENVI's tags state them."""
    found = [_wavelength(file, n) for n in index]
    return tuple(found) if any(w is not None for w in found) else None


def _wavelength(file: Any, band: int) -> float | None:
    stated = file.tags(band, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM")
    unit = 1e3
    if stated is None:
        tags = file.tags(band)
        stated = tags.get("wavelength")
        unit = _NM.get(tags.get("wavelength_units", "nm").lower(), 0.0)
    if stated is None or not re.fullmatch(r"\d+(\.\d*)?", stated) or not unit:
        return None
    return float(stated) * unit


def _nodata(value: float | None) -> int | None:
    """A whole number; others (not-a-number) are told by the pixels themselves."""
    return None if value is None or not float(value).is_integer() else int(value)


def _key(path: Path) -> str:
    size = path.stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_HASHED))
        file.seek(max(0, size - _HASHED))
        digest.update(file.read(_HASHED))
    return digest.hexdigest()
