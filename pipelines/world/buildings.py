"""Buildings along the edges of blocks: detached, in rows with shared walls, around courtyards."""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.world.features import parts_of

Polygons = NDArray[np.object_]


@dataclass(frozen=True)
class Style:
    """How a kind of block is built up, in metres."""

    width: tuple[float, float]
    depth: tuple[float, float]
    setback: float
    gap: tuple[float, float]
    fill: float
    l_shaped: float = 0.0


STYLES: dict[str, Style] = {
    "houses": Style((8.5, 14.0), (7.5, 11.0), 5.5, (6.0, 14.0), 0.9, 0.3),
    "village": Style((9.0, 16.0), (7.5, 12.0), 3.0, (5.0, 18.0), 0.75, 0.35),
    "terraces": Style((5.6, 7.4), (8.5, 10.5), 4.0, (0.0, 0.0), 0.96),
    "rows": Style((8.0, 15.0), (10.0, 14.0), 1.2, (0.0, 0.0), 0.95),
    "apartments": Style((26.0, 58.0), (11.5, 15.0), 9.0, (14.0, 30.0), 0.9),
    "commercial": Style((24.0, 48.0), (18.0, 32.0), 7.0, (8.0, 22.0), 0.85, 0.3),
    "retail": Style((38.0, 80.0), (28.0, 48.0), 12.0, (14.0, 40.0), 0.75, 0.2),
    "industrial": Style((26.0, 78.0), (22.0, 46.0), 9.0, (8.0, 24.0), 0.85, 0.2),
    "campus": Style((30.0, 62.0), (14.0, 20.0), 14.0, (16.0, 40.0), 0.8, 0.45),
    "farmyard": Style((14.0, 32.0), (10.0, 16.0), 6.0, (5.0, 14.0), 0.8, 0.2),
    "allotments": Style((2.6, 4.2), (2.4, 3.4), 6.0, (12.0, 20.0), 0.85),
}


def along_edges(
    rng: np.random.Generator, blocks: Polygons, style: Style
) -> tuple[Polygons, NDArray[np.int64]]:
    """Buildings of one style along the edges of each block, and the block each stands in.

    In a row (no gap) neighbours share their wall's corners exactly.
    """
    inset, rows = parts_of(shapely.buffer(blocks, -style.setback, join_style="mitre"), 2)
    inset = shapely.simplify(inset, 0.8)
    ring = shapely.get_exterior_ring(shapely.orient_polygons(inset))
    xy, which = shapely.get_coordinates(ring, return_index=True)
    same = which[1:] == which[:-1]
    a, b, block = xy[:-1][same], xy[1:][same], rows[which[:-1][same]]
    length = np.hypot(*(b - a).T)
    width = rng.uniform(*style.width, len(a))
    pitch = width + rng.uniform(*style.gap, len(a))
    room = length - style.depth[0] * 0.6
    count = np.maximum(0, np.floor(room / pitch)).astype(np.int64)
    edge = np.repeat(np.arange(len(a)), count)
    k = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    start = (length[edge] - count[edge] * pitch[edge]) / 2 + k * pitch[edge]
    row = style.gap[1] == 0
    depth = rng.uniform(*style.depth, len(a))[edge]
    near, far = start, start + pitch[edge]
    front = np.zeros(len(edge))
    if not row:
        slack = pitch[edge] - width[edge]
        near = start + slack * rng.uniform(0.2, 0.8, len(edge))
        far = near + width[edge] * rng.uniform(0.8, 1.15, len(edge))
        front = rng.uniform(0, 1, len(edge)) ** 2 * 4
        depth = depth * rng.uniform(0.85, 1.2, len(edge))
    frame = _Frames(a[edge], ((b - a) / np.maximum(length, 1e-9)[:, None])[edge])
    shapes = _shapes(rng, frame, near, far, front, depth, style.l_shaped)
    keep = rng.random(len(edge)) < style.fill
    shapes, home = shapes[keep], block[edge][keep]
    shapes, home = _inside(shapes, home, blocks)
    free = without_overlaps(shapes)
    return shapes[free], home[free]


@dataclass(frozen=True)
class _Frames:
    """Local axes per building: along the street from `origin`, and inward to its left."""

    origin: NDArray[np.float64]
    along: NDArray[np.float64]

    def point(self, s: NDArray[np.float64], t: NDArray[np.float64]) -> NDArray[np.float64]:
        inward = np.c_[-self.along[:, 1], self.along[:, 0]]
        return np.asarray(self.origin + self.along * s[:, None] + inward * t[:, None])


def _shapes(
    rng: np.random.Generator,
    frame: _Frames,
    near: NDArray[np.float64],
    far: NDArray[np.float64],
    front: NDArray[np.float64],
    depth: NDArray[np.float64],
    l_shaped: float,
) -> Polygons:
    back = front + depth
    corners = [frame.point(near, front), frame.point(far, front)]
    corners += [frame.point(far, back), frame.point(near, back)]
    shapes = shapely.polygons(np.stack(corners, axis=1)) if len(near) else np.empty(0, object)
    bent = np.flatnonzero(rng.random(len(near)) < l_shaped)
    if len(bent):
        middle = near + (far - near) * rng.uniform(0.4, 0.65, len(near))
        deep = back + depth * rng.uniform(0.3, 0.7, len(near))
        six = [frame.point(near, front), frame.point(far, front), frame.point(far, back)]
        six += [frame.point(middle, back), frame.point(middle, deep), frame.point(near, deep)]
        shapes[bent] = shapely.polygons(np.stack(six, axis=1)[bent])
    return shapes


def _inside(
    shapes: Polygons, home: NDArray[np.int64], blocks: Polygons
) -> tuple[Polygons, NDArray[np.int64]]:
    shapely.prepare(blocks)
    inside = shapely.covers(blocks[home], shapes)
    return shapes[inside], home[inside]


def without_overlaps(shapes: Polygons) -> NDArray[np.bool_]:
    """Mask of shapes to keep so that none overlaps another; earlier ones win; walls may touch."""
    core = shapely.buffer(shapes, -0.15, join_style="mitre")
    i, j = shapely.STRtree(core).query(core, predicate="intersects")
    i, j = i[i < j], j[i < j]
    keep = np.zeros(len(shapes), dtype=bool)
    open_ = np.ones(len(shapes), dtype=bool)
    while open_.any():
        # An open shape with no open earlier neighbour stays; its neighbours go.
        waiting = np.zeros(len(shapes), dtype=bool)
        waiting[j[open_[i] & open_[j]]] = True
        stays = open_ & ~waiting
        keep |= stays
        gone = np.zeros(len(shapes), dtype=bool)
        gone[j[stays[i]]] = True
        open_ &= ~stays & ~gone
    return keep


def around_courtyards(
    rng: np.random.Generator, blocks: Polygons
) -> tuple[Polygons, NDArray[np.int64]]:
    """One building per block around its courtyard; blocks too narrow for one are left out."""
    outer = shapely.buffer(blocks, -2.0, join_style="mitre")
    inner = shapely.buffer(outer, -rng.uniform(11, 14.5, len(blocks)), join_style="mitre")
    fits = (shapely.get_type_id(outer) == 3) & (shapely.get_type_id(inner) == 3)
    fits &= shapely.area(inner) > 60
    rows = np.flatnonzero(fits)
    ring, _ = parts_of(shapely.difference(outer[rows], inner[rows]), 2)
    return ring, rows


def behind(
    rng: np.random.Generator, houses: Polygons, home: NDArray[np.int64], blocks: Polygons
) -> tuple[Polygons, NDArray[np.int64]]:
    """Garages and sheds near houses, inside the same block and clear of every house."""
    centre = shapely.get_coordinates(shapely.centroid(houses))
    xy = shapely.get_coordinates(shapely.get_exterior_ring(houses))
    first = np.r_[0, np.cumsum(shapely.get_num_coordinates(houses))[:-1]]
    along = xy[first + 1] - xy[first]
    along /= np.maximum(np.hypot(*along.T), 1e-9)[:, None]
    inward = np.c_[-along[:, 1], along[:, 0]]
    away = rng.uniform(9, 17, len(houses))[:, None]
    aside = rng.uniform(-7, 7, len(houses))[:, None]
    size = rng.uniform([2.4, 2.2], [4.2, 3.2], (len(houses), 2))
    spot = centre + inward * away + along * aside
    ends = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    corners = [spot + along * size[:, :1] * sx + inward * size[:, 1:] * sy for sx, sy in ends]
    sheds = shapely.polygons(np.stack(corners, axis=1)) if len(houses) else np.empty(0, object)
    sheds, block = _inside(sheds, home, blocks)
    free = without_overlaps(np.concatenate([houses, sheds]))[len(houses) :]
    return sheds[free], block[free]
