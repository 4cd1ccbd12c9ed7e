"""Streets, tracks and field boundaries: noded together, so that what meets shares its nodes."""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.world.layout import Layout, Quarter
from pipelines.world.noise import fractal_at

# Drawn nowhere: lines that only divide the land.
BOUNDARY = "boundary"


@dataclass(frozen=True)
class Network:
    """`ways` [W] lines between dead ends or changes of street, with a node at every junction.

    `highway` [W] OSM highway value or `boundary`; `street` [W] the line each way is part of, for
    names. `faces` [F] the polygons between all lines, sharing their nodes.
    """

    ways: NDArray[np.object_]
    highway: NDArray[np.str_]
    street: NDArray[np.int64]
    faces: NDArray[np.object_]


def make_network(rng: np.random.Generator, layout: Layout) -> Network:
    """Lays streets in every quarter and field boundaries elsewhere, and nodes them."""
    lines: list[shapely.Geometry] = []
    kinds: list[str] = []

    def add(geometry: shapely.Geometry, kind: str) -> None:
        for part in shapely.get_parts(geometry):
            if part.length > 1:
                lines.append(part)
                kinds.append(kind)

    for kind, road in layout.roads:
        add(road, kind)
    for quarter in layout.quarters:
        main = "tertiary" if quarter.kind != "village" else BOUNDARY
        add(quarter.polygon.boundary, main)
        for street, grade in _streets(rng, quarter):
            add(street, grade)
    built = shapely.union_all([q.polygon for q in layout.quarters])
    water = shapely.union_all([layout.sea, layout.river, *layout.lakes])
    closed = shapely.union_all([water, built, *layout.sites.values()])
    country = layout.box.difference(closed)
    shapely.prepare(country)
    for line in _country_lines(rng, layout):
        grade = str(rng.choice([BOUNDARY, "track", "unclassified"], p=[0.76, 0.18, 0.06]))
        add(shapely.intersection(line, country), grade)
    for edge in (layout.box.boundary, shapely.boundary(closed)):
        add(edge, BOUNDARY)
    return _node(rng, np.array(lines, dtype=object), np.array(kinds), water)


def _streets(rng: np.random.Generator, quarter: Quarter) -> list[tuple[shapely.Geometry, str]]:
    """A warped grid of streets over a quarter; both families meet in shared vertices."""
    centre = shapely.get_coordinates(quarter.polygon.centroid)[0]
    reach = float(shapely.minimum_bounding_radius(quarter.polygon)) + 150
    du, dv = quarter.block_m
    us, vs = _steps(rng, reach, du), _steps(rng, reach, dv)
    uu, vv = np.meshgrid(us, vs)
    flat = np.c_[uu.ravel(), vv.ravel()]
    salt = int(rng.integers(2**31))
    warp = 0.22 * min(du, dv)
    flat = (
        flat
        + warp
        * np.c_[fractal_at(flat, (520.0, 240.0), salt), fractal_at(flat, (520.0, 240.0), salt + 1)]
    )
    turn = np.array(
        [
            [np.cos(quarter.angle), np.sin(quarter.angle)],
            [-np.sin(quarter.angle), np.cos(quarter.angle)],
        ]
    )
    grid = (centre + flat @ turn).reshape(*uu.shape, 2)
    rows = shapely.linestrings(grid)
    columns = shapely.linestrings(np.swapaxes(grid, 0, 1))
    every = np.concatenate([rows, columns])
    grades = np.where(rng.random(len(every)) < 0.12, "tertiary", "residential")
    if quarter.kind in ("industrial", "retail", "campus"):
        grades = np.where(rng.random(len(every)) < 0.5, "unclassified", "service")
    if quarter.kind == "centre":
        grades = np.where(rng.random(len(every)) < 0.2, "pedestrian", grades)
    clipped = shapely.intersection(every, quarter.polygon)
    return [(g, str(k)) for g, k in zip(clipped, grades, strict=True) if not g.is_empty]


def _steps(rng: np.random.Generator, reach: float, step: float) -> NDArray[np.float64]:
    n = int(2 * reach / step) + 2
    return np.cumsum(rng.uniform(0.72, 1.3, n) * step) - reach - step


def _country_lines(rng: np.random.Generator, layout: Layout) -> NDArray[np.object_]:
    """Two warped families of lines over the whole region, cut into pieces of a few fields."""
    x0, y0, x1, y1 = layout.bounds
    reach = (x1 - x0) * 0.75
    field = 250.0 * max(layout.scale, 0.3) ** 0.35
    us, vs = _steps(rng, reach, field * 1.15), _steps(rng, reach, field * 0.8)
    uu, vv = np.meshgrid(us, vs)
    flat = np.c_[uu.ravel(), vv.ravel()]
    salt = int(rng.integers(2**31))
    flat = (
        flat
        + 900
        * layout.scale**0.5
        * np.c_[
            fractal_at(flat, (5200.0, 1900.0), salt), fractal_at(flat, (5200.0, 1900.0), salt + 1)
        ]
    )
    flat += rng.normal(0, 0.07 * field, flat.shape)
    angle = rng.uniform(0.2, 0.9)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    grid = (np.array([(x0 + x1) / 2, (y0 + y1) / 2]) + flat @ turn).reshape(*uu.shape, 2)
    pieces = []
    for family in (grid, np.swapaxes(grid, 0, 1)):
        for start in range(0, family.shape[1] - 1, 4):
            chunk = family[:, start : start + 5]
            pieces.append(shapely.linestrings(chunk[rng.random(len(chunk)) < 0.93]))
    every = np.concatenate(pieces)
    return np.asarray(every[shapely.intersects(every, layout.box)], dtype=object)


def _node(
    rng: np.random.Generator,
    lines: NDArray[np.object_],
    kinds: NDArray[np.str_],
    water: shapely.Geometry,
) -> Network:
    noded = shapely.get_parts(shapely.unary_union(lines))
    tree = shapely.STRtree(lines)
    middle = shapely.line_interpolate_point(noded, 0.5, normalized=True)
    pairs = tree.query(middle, predicate="dwithin", distance=0.01)
    # Where two lines share an edge the first (the greater road) keeps it.
    source = np.full(len(noded), len(lines))
    np.minimum.at(source, pairs[0], pairs[1])
    if (source == len(lines)).any():
        raise AssertionError("an edge of the noded network belongs to no line")
    kind = kinds[source]
    # Some streets end blind and some blocks are merged, as in a town that grew.
    keep = (kind != "residential") | (rng.random(len(noded)) > 0.1)
    noded, source, kind = noded[keep], source[keep], kind[keep]
    faces = shapely.get_parts(shapely.polygonize(noded))
    shapely.prepare(water)
    faces = faces[~shapely.contains_properly(water, shapely.point_on_surface(faces))]
    order = np.argsort(source, kind="stable")
    grouped = shapely.line_merge(
        shapely.multilinestrings(
            noded[order], indices=np.unique(source[order], return_inverse=True)[1]
        )
    )
    ways, rows = shapely.get_parts(grouped, return_index=True)
    street = np.unique(source)[rows]
    return Network(ways, kinds[street], street, faces)
