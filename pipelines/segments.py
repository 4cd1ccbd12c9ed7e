"""Boundaries and lines as arrays of straight segments, in chip-relative coordinates."""

from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import GeometryType

from pipelines.ragged import run_starts
from schemas.layout import Kind

_ROUNDING = 1e-6
"""Share of a chip's side by which a clipped vertex may lie outside; more is an error upstream."""


class Segments(NamedTuple):
    """Straight segments of several geometries, in the order of their vertices."""

    start: NDArray[np.float64]
    """[n, 2] x (right), y (down)."""
    end: NDArray[np.float64]
    """[n, 2]."""
    owner: NDArray[np.int64]
    """[n] index of the geometry, ascending."""


def check_kinds(geometry: NDArray[np.object_], kind: NDArray[np.uint8]) -> None:
    """Raise ValueError unless every geometry [M] is one Point, LineString or Polygon, by `kind`."""
    types = np.array([GeometryType.POINT, GeometryType.LINESTRING, GeometryType.POLYGON])
    wrong = (shapely.get_type_id(geometry) != types[kind]) | shapely.is_empty(geometry)
    if wrong.any():
        n = int(np.argmax(wrong))
        raise ValueError(
            f"object {n} is not one {Kind(kind[n]).name.lower()} but {str(geometry[n])[:60]}: "
            "split multiparts and drop empty ones first"
        )


def chip_relative(
    xy: NDArray[np.float64],
    chip: NDArray[np.int64],
    bounds_utm: NDArray[np.float64],
    side: int = 1,
) -> NDArray[np.float64]:
    """Coordinates [n, 2] from the chip's top-left corner, x right, y down, 0 .. `side`.

    Parameters: `xy` [n, 2] metres in the UTM zone of its chip, `chip` [n] rows of `bounds_utm`
    [N, 4] (x_min, y_min, x_max, y_max). Multiplies before dividing, so that multiples of
    1 / `side` of the chip come out exact where the metres are.

    Raises ValueError where a coordinate lies outside its chip by more than rounding.
    """
    x_min, y_min, x_max, y_max = bounds_utm[chip].T
    x = (xy[:, 0] - x_min) * side / (x_max - x_min)
    y = (y_max - xy[:, 1]) * side / (y_max - y_min)
    relative = np.stack([x, y], axis=1)
    clamped: NDArray[np.float64] = np.clip(relative, 0.0, float(side))
    outside = np.flatnonzero((np.abs(relative - clamped) > _ROUNDING * side).any(axis=1))
    if len(outside):
        raise ValueError(
            f"an object of chip {chip[outside[0]]} reaches out of the chip: clip first"
        )
    return clamped


def line_segments(
    lines: NDArray[np.object_],
    chip: NDArray[np.int64],
    bounds_utm: NDArray[np.float64],
    side: int = 1,
) -> Segments:
    """Segments of LineStrings [n], coordinates as of `chip_relative`."""
    xy, owner = shapely.get_coordinates(lines, return_index=True)
    vertex = chip_relative(xy, chip[owner], bounds_utm, side)
    joined = owner[1:] == owner[:-1]
    return Segments(vertex[:-1][joined], vertex[1:][joined], owner[1:][joined])


def polygon_segments(
    polygons: NDArray[np.object_],
    chip: NDArray[np.int64],
    bounds_utm: NDArray[np.float64],
    side: int = 1,
) -> Segments:
    """Segments of the rings of Polygons [n], coordinates as of `chip_relative`.

    Every ring is turned so that the polygon lies on the same side of all its segments: where a
    segment goes down (y grows), the polygon is to its right in x.
    """
    rings, owner = shapely.get_rings(polygons, return_index=True)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    vertex = chip_relative(xy, chip[owner[ring]], bounds_utm, side)
    joined = ring[1:] == ring[:-1]
    start, end, ring = vertex[:-1][joined], vertex[1:][joined], ring[1:][joined]
    if not len(ring):
        return Segments(start, end, owner[ring])

    # Twice the area; positive where the ring's inside is to the right of downward segments.
    cross = start[:, 1] * end[:, 0] - start[:, 0] * end[:, 1]
    area = np.add.reduceat(cross, run_starts(ring))
    exterior = np.zeros(len(rings), bool)
    exterior[run_starts(owner)] = True
    turn = ((area > 0) != exterior)[ring, None]
    return Segments(np.where(turn, end, start), np.where(turn, start, end), owner[ring])
