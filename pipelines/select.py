"""Choosing the scenes of a block."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from pipelines.items import Scene
from schemas.grid import Bounds, to_lonlat


class Choice(NamedTuple):
    """A scene considered for a block."""

    scene: Scene
    chosen: bool
    reason: str


def choose(scenes: Iterable[Scene], epsg: int, bounds_utm: Bounds) -> list[Choice]:
    """Scenes for a block in the order in which they are composited, then the rejected ones.

    Least cloudy first (unknown last), then by share of the block covered, time, id.
    """
    block = _block_lonlat(epsg, bounds_utm)
    chosen, rejected = [], []
    for scene in scenes:
        if scene.problem:
            rejected.append(Choice(scene, False, scene.problem.text))
            continue
        share = _coverage(scene.footprint, block)
        if share == 0.0:
            rejected.append(Choice(scene, False, "does not cover the block"))
            continue
        cloud = scene.cloud_cover
        shown = "cloud cover unknown" if cloud is None else f"cloud cover {cloud:g} %"
        key = (101.0 if cloud is None else cloud, -round(share, 6), scene.seconds, scene.id)
        reason = f"{shown}, covers {share:.0%} of the block"
        chosen.append((key, Choice(scene, True, reason)))
    chosen.sort(key=lambda pair: (pair[0], pair[1].scene.digest))
    return [c for _, c in chosen] + sorted(rejected, key=lambda c: (c.scene.id, c.scene.digest))


def _block_lonlat(epsg: int, bounds_utm: Bounds) -> BaseGeometry:
    x0, y0, x1, y1 = bounds_utm
    outline = shapely.segmentize(shapely.box(*bounds_utm), max(x1 - x0, y1 - y0) / 8)
    centre, _ = to_lonlat(epsg).transform((x0 + x1) / 2, (y0 + y1) / 2)

    def degrees(xy: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        lon, lat = to_lonlat(epsg).transform(xy[:, 0], xy[:, 1])
        return np.stack([centre + (lon - centre + 180.0) % 360.0 - 180.0, lat], axis=1)

    return shapely.transform(outline, degrees)


def _coverage(footprint: BaseGeometry, block: BaseGeometry) -> float:
    """Share of a block that a footprint covers, whichever turn of 360° either is written in."""
    west, south, east, north = footprint.bounds
    if not boxes_meet((west, south, east, north), block.bounds):
        return 0.0
    centre = block.centroid.x
    parts = shapely.get_parts(footprint)
    turns = np.round((centre - shapely.get_x(shapely.centroid(parts))) / 360.0) * 360.0
    coordinates, owner = shapely.get_coordinates(parts, return_index=True)
    coordinates[:, 0] += turns[owner]
    moved = shapely.union_all(shapely.set_coordinates(parts, coordinates))
    shared = shapely.intersection(moved, block)
    return min(1.0, float(shared.area / block.area))


def boxes_meet(a: Bounds, b: Bounds) -> bool:
    """Whether two boxes of degrees overlap, up to turns of 360°."""
    if a[1] > b[3] or b[1] > a[3]:
        return False
    return any(a[0] + t <= b[2] and b[0] <= a[2] + t for t in (-360.0, 0.0, 360.0))
