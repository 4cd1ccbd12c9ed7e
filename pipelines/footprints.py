"""Outlines on the globe: of items, of grids, of blocks; longitudes past 180 across 180 degrees."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.transform import Affine
from rasterio.warp import transform_geom
from shapely.geometry.base import BaseGeometry

from schemas.grid import Bounds, to_lonlat

_EDGE_POINTS = 8


def item_bounds(item: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """Bounds of an item in degrees; east > 180 where it crosses the antimeridian."""
    box = item.get("bbox")
    if box is None:
        geometry = item_footprint(item)
        return None if geometry.is_empty else geometry.bounds
    plane = (0, 1, 3, 4) if len(box) == 6 else (0, 1, 2, 3)
    west, south, east, north = (float(box[i]) for i in plane)
    return west, south, east + 360.0 if west > east else east, north


def item_footprint(item: Mapping[str, Any]) -> BaseGeometry:
    """Geometry of an item, or its bounding box; empty where it has neither."""
    if item.get("geometry"):
        return _unwrapped(shapely.geometry.shape(item["geometry"]))
    if item.get("bbox"):
        bounds = item_bounds(item)
        return shapely.box(*bounds) if bounds else shapely.Polygon()
    return shapely.Polygon()


def grid_outline(transform: Affine, shape: tuple[int, int], epsg: int) -> BaseGeometry:
    """Outline of a grid of pixels, lon/lat degrees."""
    rows, cols = shape
    corners = [transform @ c for c in ((0, 0), (cols, 0), (cols, rows), (0, rows))]
    outline = shapely.segmentize(shapely.Polygon(corners), max(rows, cols) * abs(transform.a) / 20)
    geometry = transform_geom(rasterio.CRS.from_epsg(epsg), "EPSG:4326", outline)
    return _unwrapped(shapely.geometry.shape(geometry))


def _unwrapped(geometry: BaseGeometry) -> BaseGeometry:
    """The geometry with longitudes past 180 instead of a jump across the antimeridian."""
    parts = shapely.get_parts(geometry)
    bounds = shapely.bounds(parts)
    jumps = bounds[:, 2] - bounds[:, 0] > 180
    parts[jumps] = shapely.transform(parts[jumps], _past_180)
    bounds = shapely.bounds(parts)
    if len(parts) and bounds[:, 2].max() - bounds[:, 0].min() > 180:
        west = shapely.get_x(shapely.centroid(parts)) < 0
        parts[west] = shapely.transform(parts[west], lambda lonlat: lonlat + np.array([360.0, 0.0]))
    return shapely.make_valid(shapely.union_all(shapely.make_valid(parts)))


def _past_180(lonlat: NDArray[np.float64]) -> NDArray[np.float64]:
    lon = np.where(lonlat[:, 0] < 0, lonlat[:, 0] + 360.0, lonlat[:, 0])
    return np.stack([lon, lonlat[:, 1]], axis=1)


def edge_points(bounds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points [N, 32, 2] along the edges of boxes [N, 4], eight an edge, from the corner of least
    coordinates. In another projection a square of 2 km through them is true to a hundredth of a
    millimetre."""
    t = np.arange(_EDGE_POINTS) / _EDGE_POINTS
    corner = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    following = np.roll(corner, -1, axis=0)
    ring = (corner[:, None] + t[:, None] * (following - corner)[:, None]).reshape(-1, 2)
    low, high = bounds[:, None, :2], bounds[:, None, 2:]
    points: NDArray[np.float64] = low + ring * (high - low)
    return points


def block_outline(epsg: int, bounds_utm: Bounds) -> BaseGeometry:
    """Outline of bounds in a UTM zone, lon/lat degrees."""
    x0, y0, x1, y1 = bounds_utm
    outline = shapely.segmentize(shapely.box(*bounds_utm), max(x1 - x0, y1 - y0) / 8)
    centre, _ = to_lonlat(epsg).transform((x0 + x1) / 2, (y0 + y1) / 2)

    def degrees(xy: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        lon, lat = to_lonlat(epsg).transform(xy[:, 0], xy[:, 1])
        return np.stack([centre + (lon - centre + 180.0) % 360.0 - 180.0, lat], axis=1)

    return shapely.transform(outline, degrees)


def coverage(footprints: NDArray[np.object_], block: BaseGeometry) -> NDArray[np.float64]:
    """Share of a block that each footprint [N] covers, whichever turn of 360° any is written in."""
    parts, of = shapely.get_parts(footprints, return_index=True)
    full = ~shapely.is_empty(parts)
    parts, of = parts[full], of[full]
    turns = np.round((block.centroid.x - shapely.get_x(shapely.centroid(parts))) / 360.0) * 360.0
    turned = np.flatnonzero(turns)
    coordinates, owner = shapely.get_coordinates(parts[turned], return_index=True)
    coordinates[:, 0] += turns[turned][owner]
    parts[turned] = shapely.set_coordinates(parts[turned], coordinates)
    whole = np.full(len(footprints), shapely.Polygon(), object)
    whole[of] = parts
    # Turned, parts may overlap.
    several = (np.bincount(of, minlength=len(footprints)) > 1)[of]
    of_several, number = np.unique(of[several], return_inverse=True)
    together = shapely.geometrycollections(parts[several], indices=number)
    whole[of_several] = shapely.union_all(together[:, None], axis=1)
    shared = shapely.area(shapely.intersection(whole, block))
    share: NDArray[np.float64] = np.minimum(1.0, shared / block.area)
    return share


def boxes_meet(a: Bounds, b: Bounds) -> bool:
    """Whether two boxes of degrees overlap, up to turns of 360°."""
    if a[1] > b[3] or b[1] > a[3]:
        return False
    return any(a[0] + t <= b[2] and b[0] <= a[2] + t for t in (-360.0, 0.0, 360.0))
