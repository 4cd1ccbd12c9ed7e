"""Anchors: four chip-relative positions that say where an object is and how far it reaches."""

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.ragged import run_starts
from pipelines.segments import Segments, check_kinds, chip_relative, polygon_segments
from schemas.layout import Kind

_ALONG = (1 / 6, 1 / 2, 5 / 6)
_ACROSS = (1 / 3, 2 / 3, 1 / 3)
_MARGIN = 1 / 16


def build_anchors(
    geometry: NDArray[np.object_],
    kind: NDArray[np.uint8],
    chip: NDArray[np.int64],
    bounds_utm: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Anchors of every object: float32 [M, 4, 2] in [0, 1], x right, y down from the top-left.

    Parameters: `geometry` [M] clipped to their chips, metres in the chip's UTM zone; `kind` [M];
    `chip` [M] rows of `bounds_utm` [N, 4].

    - polygon: three points inside, then the centroid (which may lie outside of a bent polygon).
      The three stand on lines across the longer side of the polygon's bounds, at 1/6, 1/2 and 5/6
      of it; each in the widest stretch of its line within the polygon (the first of equals), at
      1/3, 2/3 and 1/3 of that stretch. A line keeps clear of the vertices' own positions on that
      side, so no anchor lies on an edge by accident: a polygon wider than float32 resolves (about
      1e-7 of the chip) has its anchors strictly inside.
    - line: centroid, first vertex, last vertex, last vertex again; in the digitised direction,
      which OSM uses to say the way of traffic or of a river.
    - point: itself, four times.

    Raises ValueError where an object reaches out of its chip or is not a single part of its kind.
    """
    check_kinds(geometry, kind)
    centroid = shapely.get_coordinates(shapely.centroid(geometry))
    anchor = np.empty((len(geometry), 4, 2))
    anchor[:] = chip_relative(centroid, chip, bounds_utm)[:, None]

    line = np.flatnonzero(kind == Kind.LINE)
    xy, owner = shapely.get_coordinates(geometry[line], return_index=True)
    first = run_starts(owner)
    last = np.append(first[1:], len(owner))[: len(first)] - 1
    anchor[line, 1] = chip_relative(xy[first], chip[line], bounds_utm)
    anchor[line, 2:] = chip_relative(xy[last], chip[line], bounds_utm)[:, None]

    polygon = np.flatnonzero(kind == Kind.POLYGON)
    if len(polygon):
        edges = polygon_segments(geometry[polygon], chip[polygon], bounds_utm)
        anchor[polygon, :3] = _interior_points(edges)
    return anchor.astype(np.float32)


def _interior_points(edges: Segments) -> NDArray[np.float64]:
    """Three points [n, 3, 2] inside each of n polygons, from the segments of their rings."""
    first = run_starts(edges.owner)
    low = np.minimum.reduceat(edges.start, first)
    high = np.maximum.reduceat(edges.start, first)
    tall = np.diff(high - low, axis=1) > 0

    # (along, across) the longer side instead of (x, y).
    start = np.where(tall[edges.owner], edges.start[:, ::-1], edges.start)
    end = np.where(tall[edges.owner], edges.end[:, ::-1], edges.end)
    low, high = (np.where(tall, corner[:, ::-1], corner)[:, 0] for corner in (low, high))

    points = np.empty((3, len(first), 2))
    for point, along, across in zip(points, _ALONG, _ACROSS, strict=True):
        at = _between_vertices(start[:, 0], edges.owner, first, low + along * (high - low))
        near, far = _widest_stretch(start, end, edges.owner, at)
        point[:] = np.stack([at, near + across * (far - near)], axis=1)
    points = np.where(tall, points[..., ::-1], points)
    return points.transpose(1, 0, 2)


def _between_vertices(
    vertex: NDArray[np.float64],
    owner: NDArray[np.int64],
    first: NDArray[np.int64],
    position: NDArray[np.float64],
) -> NDArray[np.float64]:
    """`position` [n] moved off the vertices [v] that are next to it, by 1/16 of their distance."""
    here = position[owner]
    below = np.maximum.reduceat(np.where(vertex <= here, vertex, -np.inf), first)
    above = np.minimum.reduceat(np.where(vertex > here, vertex, np.inf), first)
    margin = (above - below) * _MARGIN
    return np.clip(position, below + margin, above - margin)


def _widest_stretch(
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    owner: NDArray[np.int64],
    at: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends [n] of the widest stretch inside each polygon on its line at `at` [n]."""
    crossing = np.flatnonzero((start[:, 0] <= at[owner]) != (end[:, 0] <= at[owner]))
    a, b, owner = start[crossing], end[crossing], owner[crossing]
    across = a[:, 1] + (at[owner] - a[:, 0]) * (b[:, 1] - a[:, 1]) / (b[:, 0] - a[:, 0])

    # Crossings sorted along the line enter and leave the polygon in turn.
    order = np.lexsort((across, owner))
    near, far, owner = across[order][0::2], across[order][1::2], owner[order][0::2]
    widest = np.maximum.reduceat(far - near, run_starts(owner))
    best = np.flatnonzero(far - near == widest[owner])
    best = best[run_starts(owner[best])]
    return near[best], far[best]
