"""Where a region is: its polygons or points, from a config or a file, checked to be in degrees."""

import csv
import json
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import Geod
from shapely.geometry.base import BaseGeometry

from schemas.errors import GeoLinkError
from schemas.grid import MAX_LATITUDE, MIN_LATITUDE
from schemas.sources import Region

_GEOD = Geod(ellps="WGS84")

_Lonlat = NDArray[np.float64]


def region_geometry(region: Region) -> BaseGeometry:
    """The region as polygons in degrees (lon, lat); longitudes beyond 180 cross the antimeridian.

    Points become discs of 32 corners: for maps and for finding an extract. Which chips belong to a
    region of points is decided by true distance, in `plan_blocks`.

    Raises GeoLinkError: a file that is missing or not GeoJSON, no polygon in it, no area.
    """
    if region.bbox is not None:
        return shapely.box(*region.bbox)
    if region.points is not None:
        assert region.radius_m is not None
        return _discs(region_points(region), region.radius_m)
    if region.file is not None:
        text = _read(region.file)
        where = str(region.file)
    else:
        text, where = json.dumps(region.geojson), "region.geojson"
    parts = _parts(text, where)
    polygons = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
    whole = shapely.get_parts(shapely.union_all(shapely.make_valid(polygons)))
    region_area = shapely.union_all(whole[shapely.area(whole) > 0])
    if region_area.is_empty:
        raise GeoLinkError(f"{where} holds no polygon with an area; give the region as polygons")
    _check_latitudes(shapely.get_coordinates(region_area), where)
    return region_area


def region_points(region: Region) -> _Lonlat:
    """Points of a region, float64 [P, 2] degrees (lon, lat), without repetition, in their order.

    Raises GeoLinkError: a file that is missing or is neither GeoJSON nor CSV, no point in it, a
    place that is not in degrees or outside UTM.
    """
    if isinstance(region.points, Path):
        where = str(region.points)
        text = _read(region.points)
        is_json = text.lstrip()[:1] in ("{", "[")
        lonlat = _json_points(text, where) if is_json else _csv_points(text, where)
    else:
        where = "region.points"
        lonlat = np.array(region.points, np.float64).reshape(-1, 2)
    if not len(lonlat):
        raise GeoLinkError(f"{where} holds no point; give pairs of longitude and latitude")
    _check_latitudes(lonlat, where)
    _, first = np.unique(lonlat, axis=0, return_index=True)
    points: _Lonlat = lonlat[np.sort(first)]
    return points


def _check_latitudes(lonlat: _Lonlat, where: str) -> None:
    """Raises GeoLinkError for the first place that is no (lon, lat) in degrees, or outside UTM."""
    lon, lat = lonlat.T
    bad = ~(np.isfinite(lonlat).all(axis=1) & (np.abs(lon) <= 540) & (np.abs(lat) <= 90))
    if bad.any():
        x, y = lonlat[bad][0]
        swapped = np.abs(x) <= 90 and np.abs(y) <= 180
        hint = "latitude and longitude look swapped" if swapped else "they look like metres"
        raise GeoLinkError(
            f"{where}: ({x:g}, {y:g}) is not (longitude, latitude) in degrees; {hint}, give "
            "longitude first, WGS 84"
        )
    polar = (lat < MIN_LATITUDE) | (lat > MAX_LATITUDE)
    if polar.any():
        x, y = lonlat[polar][0]
        swapped = np.abs(lon).max() <= MAX_LATITUDE
        hint = "; if latitude stands first, give longitude first" if swapped else ""
        raise GeoLinkError(
            f"{where}: ({x:g}, {y:g}) is outside UTM: latitude must lie between "
            f"{MIN_LATITUDE:g} and {MAX_LATITUDE:g} degrees; leave it out of the region{hint}"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise GeoLinkError(f"cannot read region {path}: {error}") from error


def _parts(text: str, where: str) -> NDArray[np.object_]:
    """Simple geometries of a GeoJSON text."""
    try:
        geometry = shapely.from_geojson(text)
    except shapely.GEOSException as error:
        raise GeoLinkError(f"{where} is not valid GeoJSON: {error}") from error
    parts: NDArray[np.object_] = shapely.get_parts(shapely.get_parts(geometry))
    return parts


def _json_points(text: str, where: str) -> _Lonlat:
    parts = _parts(text, where)
    points = parts[shapely.get_type_id(parts) == shapely.GeometryType.POINT]
    if len(points) < len(parts):
        raise GeoLinkError(
            f"{where}: {len(parts) - len(points)} of {len(parts)} geometries are no points; give "
            "points here, or polygons as `file`"
        )
    lonlat: _Lonlat = shapely.get_coordinates(points)
    return lonlat


def _csv_points(text: str, where: str) -> _Lonlat:
    """Points of a CSV text: columns lon and lat by name where it has a header, else the first two.

    Columns are told apart by comma, semicolon or tab.
    """
    lines = text.splitlines()
    separator = max(",;\t", key=lambda c: lines[0].count(c)) if lines else ","
    rows = [r for r in csv.reader(lines, delimiter=separator) if any(v.strip() for v in r)]
    header = [v.strip().lower() for v in rows[0]] if rows else []
    x, y = (
        next((header.index(n) for n in names if n in header), None)
        for names in (("lon", "longitude", "lng", "x"), ("lat", "latitude", "y"))
    )
    if x is None or y is None:
        x, y = 0, 1
    else:
        rows = rows[1:]
    try:
        return np.array([(float(r[x]), float(r[y])) for r in rows], np.float64).reshape(-1, 2)
    except (ValueError, IndexError) as error:
        raise GeoLinkError(
            f"{where} is neither GeoJSON nor a table with columns lon, lat ({error})"
        ) from error


def _discs(lonlat: _Lonlat, radius_m: float) -> BaseGeometry:
    """Circles around places as polygons in degrees, each written around its own longitude."""
    corners = 32
    azimuth = np.tile(np.arange(corners) * (360.0 / corners), len(lonlat))
    lon, lat = np.repeat(lonlat, corners, axis=0).T
    x, y, _ = _GEOD.fwd(lon, lat, azimuth, np.full(len(lon), radius_m))
    x = lon + (x - lon + 180.0) % 360.0 - 180.0
    rings = np.stack([x, y], axis=1).reshape(len(lonlat), corners, 2)
    return shapely.union_all(shapely.polygons(rings))
