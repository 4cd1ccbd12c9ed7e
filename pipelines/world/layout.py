"""The large lines of the land: coast, river, lakes, settlements, sites, main roads, rail.

Positions are laid out in the unit square of the region, (u, v) in [-1, 1] east and north of its
centre, so that a small world has the same parts as a large one; sizes shrink less than distances.
"""

from dataclasses import dataclass

import numpy as np
import shapely
import shapely.affinity
from numpy.typing import NDArray
from pyproj import Transformer
from scipy.interpolate import CubicSpline
from scipy.sparse.csgraph import minimum_spanning_tree

from pipelines.world.noise import fractal_at

CENTRE_LONLAT = (-3.0, 45.3)  # open ocean in the middle of UTM zone 30: a fictitious coast
EPSG = 32630
GRID_M = 1920.0  # a multiple of the 10, 20 and 60 m pixels and of chips of 64 pixels
Xy = NDArray[np.float64]


@dataclass(frozen=True)
class Quarter:
    """A part of a settlement with a street grid of its own; `kind` decides what is built."""

    polygon: shapely.Polygon
    kind: str
    angle: float
    block_m: tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """Everything large, in UTM metres."""

    bounds: tuple[float, float, float, float]
    sea: shapely.Geometry
    coast: shapely.LineString
    river: shapely.Geometry
    river_line: shapely.LineString
    streams: list[shapely.LineString]
    lakes: list[shapely.Polygon]
    quarters: list[Quarter]
    sites: dict[str, shapely.Polygon]
    roads: list[tuple[str, shapely.LineString]]
    motorway: shapely.LineString
    rail: list[shapely.LineString]
    scale: float

    @property
    def box(self) -> shapely.Polygon:
        """The region as a polygon."""
        return shapely.box(*self.bounds)


def make_layout(rng: np.random.Generator, size_km: float) -> Layout:
    """The plan of a region of about `size_km` kilometres (a multiple of 1.92 km)."""
    bounds = _bounds(size_km)
    half = (bounds[2] - bounds[0]) / 2
    scale = half / 9600
    centre = np.array([bounds[0] + half, bounds[1] + half])

    def place(points: list[tuple[float, float]]) -> Xy:
        return centre + np.array(points) * half

    box = shapely.box(*bounds)
    coast, sea = _coast(rng, bounds, half, centre)
    land = box.difference(sea)
    river_line = _bend(
        rng,
        place([(1.02, 0.42), (0.72, 0.24), (0.45, 0.33), (0.2, 0.1), (-0.05, 0.09), (-0.5, -0.03)]),
        140 * scale**0.7,
        1500 * scale**0.7,
    )
    river = _ribbon(river_line, 26 * scale**0.5, 62 * scale**0.5).intersection(land)
    lakes = _lakes(rng, place, scale)
    town_xy = place([(-0.12, 0.02)])[0]
    sites = _sites(rng, place, scale, coast, half, centre)
    wet = shapely.union_all([sea, river, *lakes]).buffer(25 * scale**0.5)
    taken = shapely.union_all([wet, *(s.buffer(30) for s in sites.values())])
    town = blob(rng, town_xy, 2750 * scale**0.75, 0.14).difference(taken)
    quarters = _town_quarters(rng, town, town_xy, 2750 * scale**0.75)
    villages = _villages(rng, land, town, taken, centre, half, scale)
    quarters += villages
    motorway = _bend(
        rng, place([(0.16, 1.0), (0.3, 0.4), (0.27, 0.05), (0.2, -0.4), (0.34, -1.0)]), 60, 2500
    )
    rail_main = _bend(
        rng, place([(0.04, 1.0), (0.02, 0.4), (0.1, 0.1), (0.04, -0.3), (-0.1, -1.0)]), 40, 2500
    )
    spur = _bend(rng, place([(0.06, -0.22), (-0.1, -0.2), (-0.27, -0.2)]), 15, 900)
    exits = place([(1.0, 0.12), (0.55, 1.0), (-0.18, 1.0), (0.62, -1.0), (-0.3, -1.0)])
    hubs = np.vstack([town_xy, exits, [[*q.polygon.centroid.coords[0]] for q in villages]])
    obstacles = shapely.union_all(
        [sea, *lakes, *(sites[k] for k in ("airfield", "golf", "quarry"))]
    )
    streams = [
        _bend(rng, place(points), 60 * scale**0.7, 700 * scale**0.7)
        for points in (
            [(0.42, -1.0), (0.5, -0.5), (0.42, -0.1), (0.5, 0.26)],
            [(-0.2, 1.0), (-0.12, 0.6), (-0.35, 0.4), (-0.7, 0.3)],
            [(0.95, -0.6), (0.78, -0.3), (0.68, -0.1)],
        )
    ]
    return Layout(
        bounds=bounds,
        sea=sea,
        coast=coast,
        river=river,
        river_line=_clip(river_line, land),
        streams=[_clip(s, land) for s in streams],
        lakes=lakes,
        quarters=quarters,
        sites=sites,
        roads=_main_roads(rng, hubs, len(exits), obstacles, land),
        motorway=_clip(motorway, box),
        rail=[_clip(rail_main, box), _clip(spur, land)],
        scale=scale,
    )


def _bounds(size_km: float) -> tuple[float, float, float, float]:
    cells = max(1, round(size_km * 1000 / GRID_M))
    to_utm = Transformer.from_crs(4326, EPSG, always_xy=True)
    east, north = to_utm.transform(*CENTRE_LONLAT)
    half = cells * GRID_M / 2
    x0 = float(np.floor((east - half) / GRID_M + 0.5) * GRID_M)
    y0 = float(np.floor((north - half) / GRID_M + 0.5) * GRID_M)
    return (x0, y0, x0 + 2 * half, y0 + 2 * half)


def _bend(
    rng: np.random.Generator, points: Xy, amplitude_m: float, length_m: float
) -> shapely.LineString:
    """A smooth line through `points`, with meanders."""
    distance = np.r_[0, np.cumsum(np.hypot(*np.diff(points, axis=0).T))]
    t = np.linspace(0, distance[-1], max(12, int(distance[-1] / max(25.0, length_m / 24))))
    xy = CubicSpline(distance, points)(t)
    tangent = np.gradient(xy, axis=0)
    normal = np.c_[-tangent[:, 1], tangent[:, 0]] / np.hypot(*tangent.T)[:, None]
    salt = int(rng.integers(2**31))
    swing = fractal_at(np.c_[t, np.zeros_like(t)], (length_m, length_m / 2.7), salt) * 1.8
    fade = np.minimum(1, np.minimum(t, distance[-1] - t) / (0.1 * distance[-1] + 1))
    return shapely.LineString(xy + normal * (swing * fade * amplitude_m)[:, None])


def _ribbon(line: shapely.LineString, narrow_m: float, wide_m: float) -> shapely.Geometry:
    xy = shapely.get_coordinates(line)
    half = np.linspace(narrow_m, wide_m, len(xy)) / 2
    discs = shapely.buffer(shapely.points(xy), half, quad_segs=5)
    pairs = shapely.multipolygons(np.c_[discs[:-1], discs[1:]])
    return shapely.simplify(shapely.union_all(shapely.convex_hull(pairs)), 1.0)


def blob(rng: np.random.Generator, xy: Xy, radius_m: float, roughness: float) -> shapely.Polygon:
    angle = np.linspace(0, 2 * np.pi, max(24, int(radius_m / 14)), endpoint=False)
    phase = rng.uniform(0, 2 * np.pi, 6)
    size = rng.uniform(0.4, 1.0, 6) * roughness
    waves = sum(size[k] / (1 + 0.5 * k) * np.cos((k + 2) * angle + phase[k]) for k in range(6))
    radius = radius_m * (1 + np.asarray(waves))
    return shapely.Polygon(xy + np.c_[np.cos(angle), np.sin(angle)] * radius[:, None])


def _coast(
    rng: np.random.Generator, bounds: tuple[float, float, float, float], half: float, centre: Xy
) -> tuple[shapely.LineString, shapely.Geometry]:
    v = np.linspace(-1.001, 1.001, max(60, int(2 * half / 45)))
    salt = int(rng.integers(2**31))
    rough = fractal_at(np.c_[v, np.zeros_like(v)], (0.5, 0.18, 0.06, 0.02), salt)
    u = -0.66 + 0.06 * np.sin(3.1 * v + rng.uniform(0, 6)) + 0.09 * rough
    u += 0.30 * np.exp(-(((v + 0.06) / 0.24) ** 2)) + 0.05 * np.exp(-(((v - 0.55) / 0.1) ** 2))
    xy = centre + np.c_[u, v] * half
    west = bounds[0] - half
    sea = shapely.Polygon(np.vstack([xy, [west, xy[-1, 1]], [west, xy[0, 1]]]))
    sea = sea.intersection(shapely.box(*bounds))
    return _clip(shapely.LineString(xy), shapely.box(*bounds)), sea


def _clip(line: shapely.LineString, area: shapely.Geometry) -> shapely.LineString:
    """The longest piece of a line within an area."""
    pieces = shapely.get_parts(shapely.intersection(line, area))
    return pieces[np.argmax(shapely.length(pieces))]


def _lakes(rng: np.random.Generator, place, scale: float) -> list[shapely.Polygon]:  # type: ignore[no-untyped-def]
    big = blob(rng, place([(0.64, -0.1)])[0], 760 * scale**0.7, 0.3)
    for u, v, r in ((0.655, -0.085, 110), (0.625, -0.125, 60), (0.64, -0.07, 35)):
        big = big.difference(blob(rng, place([(u, v)])[0], r * scale**0.7, 0.2))
    lakes = [big, blob(rng, place([(0.52, 0.74)])[0], 420 * scale**0.7, 0.35)]
    spots = [(0.85, 0.12), (-0.35, 0.62), (0.35, -0.72), (0.02, 0.78), (0.72, -0.62), (-0.3, -0.62)]
    lakes += [blob(rng, place([s])[0], rng.uniform(45, 150) * scale**0.6, 0.25) for s in spots]
    return [max(shapely.get_parts(lake), key=shapely.area) for lake in lakes]


def _sites(  # type: ignore[no-untyped-def]
    rng: np.random.Generator,
    place,
    scale: float,
    coast: shapely.LineString,
    half: float,
    centre: Xy,
) -> dict[str, shapely.Polygon]:
    """Places that are planned as a whole rather than by streets and fields."""

    def rectangle(
        u: float, v: float, width_m: float, height_m: float, degrees: float
    ) -> shapely.Polygon:
        k = scale**0.6
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [
            width_m * k / 2,
            height_m * k / 2,
        ]
        a = np.deg2rad(degrees + rng.uniform(-4, 4))
        turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
        return shapely.Polygon(place([(u, v)])[0] + corners @ turn)

    xy = shapely.get_coordinates(coast)
    at = np.argmin(np.abs(xy[:, 1] - (centre[1] - 0.2 * half)))
    ahead = xy[min(at + 12, len(xy) - 1)] - xy[max(at - 12, 0)]
    turn = float(np.degrees(np.arctan2(ahead[1], ahead[0])))
    port = shapely.affinity.rotate(shapely.box(-1, -0.8, 1, 0.8), turn, origin=(0, 0))
    port = shapely.affinity.scale(port, 640 * scale**0.7, 640 * scale**0.7, origin=(0, 0))
    port = shapely.affinity.translate(port, *xy[at])
    return {
        "airfield": rectangle(0.46, -0.46, 2100, 760, 24),
        "golf": blob(rng, place([(0.0, 0.58)])[0], 620 * scale**0.6, 0.3),
        "quarry": blob(rng, place([(0.8, 0.62)])[0], 330 * scale**0.6, 0.25),
        "harbour": port,
        "marina": shapely.Point(xy[np.argmin(np.abs(xy[:, 1] - (centre[1] + 0.16 * half)))]).buffer(
            210 * scale**0.6, quad_segs=6
        ),
        "solar": rectangle(0.83, -0.38, 420, 300, 5),
    }


def _town_quarters(
    rng: np.random.Generator, town: shapely.Geometry, xy: Xy, radius_m: float
) -> list[Quarter]:
    rings = [(0.0, 1, 0.0), (0.42, 5, 0.3), (0.78, 9, 0.0)]
    points = [
        xy + radius_m * r * np.array([np.cos(a), np.sin(a)])
        for r, n, turn in rings
        for a in turn + np.arange(n) * 2 * np.pi / n + rng.uniform(-0.15, 0.15, n)
    ]
    kinds = ["centre", "mixed", "apartments", "mixed", "campus", "commercial", "houses", "retail",
             "houses", "terraces", "houses", "apartments", "houses", "industrial",
             "houses"]  # fmt: skip
    seeds = shapely.MultiPoint(np.array(points))
    cells = shapely.get_parts(shapely.voronoi_polygons(seeds, extend_to=town.envelope))
    order = [int(np.flatnonzero(shapely.contains(cells, p))[0]) for p in seeds.geoms]
    quarters: list[Quarter] = []
    base = rng.uniform(0, np.pi / 2)
    for kind, cell in zip(kinds, cells[order], strict=True):
        parts = [p for p in shapely.get_parts(cell.intersection(town)) if p.area > 4000]
        angles = base + rng.normal(0, 0.3, len(parts))
        quarters += [
            Quarter(p, kind, a, _block_m(kind)) for p, a in zip(parts, angles, strict=True)
        ]
    return quarters


def _block_m(kind: str) -> tuple[float, float]:
    return {
        "centre": (84.0, 66.0),
        "mixed": (110.0, 76.0),
        "apartments": (170.0, 120.0),
        "industrial": (230.0, 170.0),
        "retail": (210.0, 160.0),
        "commercial": (150.0, 110.0),
        "campus": (190.0, 150.0),
        "village": (120.0, 85.0),
    }.get(kind, (130.0, 72.0))


def _villages(
    rng: np.random.Generator,
    land: shapely.Geometry,
    town: shapely.Geometry,
    taken: shapely.Geometry,
    centre: Xy,
    half: float,
    scale: float,
) -> list[Quarter]:
    chosen: list[tuple[Xy, float]] = []
    blocked = shapely.union_all([taken.buffer(80 * scale), town.buffer(500 * scale)])
    inner = land.buffer(-250 * scale)
    for xy in centre + rng.uniform(-0.94, 0.94, (400, 2)) * half:
        radius = float(rng.uniform(190, 430)) * max(scale, 0.12) ** 0.6
        apart = all(np.hypot(*(xy - o)) > 3.2 * (radius + r) for o, r in chosen)
        point = shapely.Point(xy)
        if apart and len(chosen) < 18 and inner.contains(point) and not blocked.contains(point):
            chosen.append((xy, radius))
    out = []
    for xy, radius in chosen:
        shape = blob(rng, xy, radius, 0.25).difference(taken)
        part = max(shapely.get_parts(shape), key=shapely.area)
        out.append(Quarter(part, "village", float(rng.uniform(0, np.pi / 2)), _block_m("village")))
    return out


def _main_roads(
    rng: np.random.Generator,
    hubs: Xy,
    exits: int,
    obstacles: shapely.Geometry,
    land: shapely.Geometry,
) -> list[tuple[str, shapely.LineString]]:
    """Roads between town (hub 0), the region's exits (the next hubs) and the villages."""
    n = len(hubs)
    i, j = np.triu_indices(n, 1)
    straight = shapely.linestrings(np.stack([hubs[i], hubs[j]], axis=1))
    length = shapely.length(straight)
    cost = length * np.where(shapely.intersects(straight, obstacles), 6.0, 1.0)
    cost *= np.where((i >= 1) & (j <= exits), 50.0, 1.0)  # exits join through the land
    graph = np.zeros((n, n))
    graph[i, j] = cost
    tree = minimum_spanning_tree(graph).toarray() > 0
    link = tree | tree.T
    primary = np.zeros((n, n), dtype=bool)
    primary[0, 1 : 1 + exits] = True
    nearest = np.argsort(graph + graph.T + np.eye(n) * 1e12, axis=1)[:, :2]
    link[np.repeat(np.arange(n), 2), nearest.ravel()] = True
    roads = []
    for a, b in zip(i, j, strict=True):
        if not (link[a, b] or link[b, a] or primary[a, b]):
            continue
        line = shapely.LineString([hubs[a], hubs[b]])
        if not primary[a, b] and line.intersects(obstacles):
            continue
        reach = float(line.length)
        bent = _bend(
            rng, np.array([hubs[a], (hubs[a] + hubs[b]) / 2, hubs[b]]), 0.02 * reach + 8, reach / 2
        )
        kind = (
            "primary"
            if primary[a, b]
            else ("secondary" if tree[a, b] or tree[b, a] else "tertiary")
        )
        piece = bent.intersection(land).difference(obstacles)
        roads += [(kind, part) for part in shapely.get_parts(piece) if part.length > 30]
    return roads
