"""A fictitious town with its country: everything on the ground, and what mappers made of it.

Called a town, it is a region: coast, bay, river, town, villages, fields, woods. All of it follows
from one seed.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import shapely
import shapely.affinity
import shapely.ops
from numpy.typing import NDArray

from pipelines.world import details, names
from pipelines.world.blocks import _rectangles, make_buildings, make_grounds
from pipelines.world.features import Features, Tags, concat, features, parts_of
from pipelines.world.landuse import LANDUSE_TAGS, classify_faces
from pipelines.world.layout import EPSG, Layout, make_layout
from pipelines.world.mapping import survey
from pipelines.world.network import BOUNDARY, Network, make_network
from pipelines.world.sites import make_sites

# Half of the carriageway and a margin that no building stands on, metres.
CLEARANCE_M = {"primary": 8.0, "secondary": 7.0, "tertiary": 6.0, "residential": 4.5}
LANES = {"primary": "2", "secondary": "2", "tertiary": "2"}


@dataclass(frozen=True)
class Town:
    """A region's features, with coordinates rounded to the centimetre."""

    epsg: int
    bounds_utm: tuple[float, float, float, float]
    centre_utm: tuple[float, float]
    features: Features


def make_town(seed: int, size_km: float = 20.0) -> Town:
    """The region of a seed; `size_km` is met to the next multiple of 1.92 km."""
    rng = np.random.default_rng(seed)
    layout = make_layout(rng, size_km)
    net = make_network(rng, layout)
    kind, quarter = classify_faces(rng, layout, net.faces)
    built = quarter >= 0
    yards = _farmyards(rng, net.faces[kind == "farmland"])
    blocks = shapely.buffer(net.faces[built], -6.5, join_style="mitre")
    block_kind = kind[built]
    whole = (shapely.get_type_id(blocks) == 3) & (shapely.area(blocks) > 60)
    blocks, block_kind = blocks[whole], block_kind[whole]
    plots = np.concatenate([blocks, yards])
    plot_kind = np.concatenate([block_kind, np.full(len(yards), "farmyard")])
    lines = _transport(rng, layout)
    houses = make_buildings(rng, plots, plot_kind)
    houses = houses.take(_clear_of(houses.geometry, net, lines, layout))
    parts = [
        _water(rng, layout),
        _landcover(rng, net.faces, kind),
        features(yards, {"landuse": "farmyard"}),
        make_sites(rng, layout),
        _shore(rng, layout),
        make_grounds(rng, blocks, block_kind),
        lines,
        _streets(rng, net, layout),
        houses,
        _details(rng, layout, net, kind, blocks, block_kind, houses),
    ]
    everything = _clip(concat(parts), layout.box)
    x0, y0, x1, y1 = layout.bounds
    # Town, port, shore and country lie about here.
    centre = (x0 + 0.42 * (x1 - x0), y0 + 0.425 * (y1 - y0))
    return Town(EPSG, layout.bounds, centre, survey(rng, everything, layout.bounds))


def _clip(all_: Features, box: shapely.Polygon) -> Features:
    """Single parts within the region, to the centimetre."""
    shapely.prepare(box)
    inside = shapely.covers(box, all_.geometry)
    geometry = all_.geometry.copy()
    geometry[~inside] = shapely.intersection(geometry[~inside], box)
    geometry = shapely.transform(geometry, lambda xy: np.round(xy, 2))
    # Rounding can fold a narrow corner over itself; snapping as a whole keeps polygons valid.
    folded = ~shapely.is_valid(geometry)
    geometry[folded] = shapely.transform(
        shapely.set_precision(shapely.buffer(geometry[folded], 0), 0.01), lambda xy: np.round(xy, 2)
    )
    dimension = shapely.get_dimensions(all_.geometry)
    picked, truth = [], []
    for d in (2, 1, 0):
        rows = np.flatnonzero(dimension == d)
        parts, source = parts_of(geometry[rows], d)
        picked.append(parts)
        truth += [dict(all_.truth[i]) for i in rows[source]]
    return features(np.concatenate(picked), truth)


def _clear_of(
    shapes: NDArray[np.object_], net: Network, lines: Features, layout: Layout
) -> NDArray[np.bool_]:
    """Mask of buildings that stand on no road, rail or water."""
    road = np.isin(net.highway, list(CLEARANCE_M))
    half = np.array([CLEARANCE_M[h] for h in net.highway[road]])
    corridors = np.concatenate(
        [
            shapely.buffer(net.ways[road], half),
            shapely.buffer(lines.geometry[shapely.get_dimensions(lines.geometry) == 1], 9.0),
            shapely.get_parts(shapely.union_all([layout.sea, layout.river, *layout.lakes])),
            np.array(list(layout.sites.values()), dtype=object),
        ]
    )
    _, hit = shapely.STRtree(shapes).query(corridors, predicate="intersects")
    clear = np.ones(len(shapes), dtype=bool)
    clear[hit] = False
    return clear


def _farmyards(rng: np.random.Generator, fields: NDArray[np.object_]) -> NDArray[np.object_]:
    large = fields[shapely.area(fields) > 12000]
    some = large[rng.random(len(large)) < 0.1]
    centre = shapely.get_coordinates(shapely.point_on_surface(some))
    size = rng.uniform([60, 50], [105, 85], (len(some), 2))
    shape = _rectangles(centre, rng.uniform(0, np.pi, len(some)), size)
    return np.asarray(shape[shapely.contains(some, shape)])


def _landcover(
    rng: np.random.Generator, faces: NDArray[np.object_], kind: NDArray[np.str_]
) -> Features:
    """One feature a face; some fields are divided lengthwise."""
    divided = (kind == "farmland") & (rng.random(len(faces)) < 0.35) & (shapely.area(faces) > 15000)
    whole = features(
        faces[~divided & (kind != "")],
        [dict(LANDUSE_TAGS[k]) for k in kind[~divided & (kind != "")]],
    )
    wide = faces[divided]
    corners = np.stack([shapely.get_coordinates(g)[:4] for g in shapely.oriented_envelope(wide)])
    share = rng.uniform(0.35, 0.65, len(wide))[:, None]
    a, b, c, d = np.moveaxis(corners, 1, 0)
    half = shapely.polygons(np.stack([a, a + (b - a) * share, d + (c - d) * share, d], axis=1))
    pieces = np.concatenate([shapely.intersection(wide, half), shapely.difference(wide, half)])
    strips, _ = parts_of(pieces, 2)
    return concat([whole, features(strips[shapely.area(strips) > 400], {"landuse": "farmland"})])


def _water(rng: np.random.Generator, layout: Layout) -> Features:
    sea = shapely.get_parts(layout.sea)
    stretches = shapely.get_parts(
        shapely.difference(layout.river, _cuts(layout.river_line, 6, 260.0))
    )
    river_tags: list[Tags] = [
        {"natural": "water", "water": "river", "name": "L'Aven"} for _ in stretches
    ]
    river_tags[0] = {"waterway": "riverbank"}
    lakes: list[Tags] = [{"natural": "water", "water": "lake"} for _ in layout.lakes]
    lakes[0]["name"] = "Lac des Îles"
    lakes[1] = {"natural": "water", "water": "reservoir", "name": "Réservoir"}
    return concat(
        [
            features(
                sea, {"natural": "water", "water": "bay", "name": "Baie d'Aven", "salt": "yes"}
            ),
            features([layout.coast.reverse()], {"natural": "coastline", "source": "PGS"}),
            features(stretches, river_tags),
            features([layout.river_line.reverse()], {"waterway": "river", "name": "L'Aven"}),
            features(layout.streams, {"waterway": "stream"}),
            features(layout.lakes, lakes),
        ]
    )


def _cuts(line: shapely.LineString, n: int, half_m: float) -> shapely.Geometry:
    """Hair-thin cross lines that part a riverbank polygon into stretches, as mappers do."""
    at = np.linspace(0, 1, n + 1)[1:-1]
    here = shapely.get_coordinates(shapely.line_interpolate_point(line, at, normalized=True))
    ahead = shapely.get_coordinates(
        shapely.line_interpolate_point(line, at + 1e-4, normalized=True)
    )
    along = (ahead - here) / np.hypot(*(ahead - here).T)[:, None]
    across = np.c_[-along[:, 1], along[:, 0]] * half_m
    return shapely.union_all(
        shapely.linestrings(np.stack([here - across, here + across], 1))
    ).buffer(0.01)


def _shore(rng: np.random.Generator, layout: Layout) -> Features:
    """Beaches, rocks and cliffs along the coast, away from the ports."""
    n = max(6, int(layout.coast.length / 700))
    at = np.linspace(0, layout.coast.length, n + 1)
    stretch = [shapely.ops.substring(layout.coast, a, b) for a, b in pairwise(at)]
    ports = shapely.union_all([layout.sites["harbour"], layout.sites["marina"]]).buffer(40)
    land = layout.box.difference(shapely.union_all([layout.sea, ports, layout.river.buffer(20)]))
    draw = rng.random(n)
    sand = [
        s.buffer(rng.uniform(18, 46)).intersection(land)
        for s, d in zip(stretch, draw, strict=True)
        if d < 0.5
    ]
    rock = [
        s.buffer(rng.uniform(10, 26)).intersection(land)
        for s, d in zip(stretch, draw, strict=True)
        if d > 0.72
    ]
    beaches, _ = parts_of(np.array(sand, dtype=object), 2)
    rocks, _ = parts_of(np.array(rock, dtype=object), 2)
    return concat(
        [
            features(beaches, {"natural": "beach", "surface": "sand"}),
            features(rocks, {"natural": "bare_rock"}),
        ]
    )


def _transport(rng: np.random.Generator, layout: Layout) -> Features:
    """Motorway with both carriageways and ramps, rail with station and platforms."""
    lanes = [layout.motorway.offset_curve(9), layout.motorway.offset_curve(-9).reverse()]
    tracks = [layout.rail[0].offset_curve(d) for d in (2.2, -2.2)]
    crossing = [
        p
        for kind, road in layout.roads
        if kind == "primary"
        for p in shapely.get_parts(road.intersection(layout.motorway))
        if not p.is_empty
    ]
    ramps = []
    reach = 260 * layout.scale**0.5 + 60
    for p in crossing[:4]:
        along = layout.motorway.project(p)
        for step in (-reach, reach):
            start = layout.motorway.interpolate(along + step)
            away = rng.uniform(25, 45) * (1 if step > 0 else -1)
            middle = shapely.Point((start.x + p.x) / 2 + away, (start.y + p.y) / 2)
            ramps.append(shapely.LineString([start, middle, p]))
    station = layout.rail[0].interpolate(layout.rail[0].project(shapely.Point(layout.box.centroid)))
    hall = shapely.affinity.translate(station.buffer(26, quad_segs=1), 34, 0)
    platform = shapely.LineString(
        [(station.x + 6, station.y - 90), (station.x + 6, station.y + 90)]
    )
    return concat(
        [
            features(
                lanes,
                {
                    "highway": "motorway",
                    "ref": "A 83",
                    "oneway": "yes",
                    "lanes": "2",
                    "maxspeed": "130",
                },
            ),
            features(ramps, {"highway": "motorway_link", "oneway": "yes"}),
            features(tracks, {"railway": "rail", "gauge": "1435", "electrified": "contact_line"}),
            features([layout.rail[1]], {"railway": "rail", "service": "spur", "gauge": "1435"}),
            features(
                [platform.buffer(3, cap_style="flat")],
                {"railway": "platform", "public_transport": "platform"},
            ),
            features(
                [hall],
                {"building": "train_station", "building:levels": "3", "name": "Gare de Port-Aven"},
            ),
        ]
    )


def _streets(rng: np.random.Generator, net: Network, layout: Layout) -> Features:
    """Ways of a few blocks each, named by street; bridges where they cross water."""
    drawn = net.highway != BOUNDARY
    pieces, rows = _chop(rng, net.ways[drawn])
    highway, street = net.highway[drawn][rows], net.street[drawn][rows]
    wet = shapely.union_all([layout.river, *layout.streams])
    shapely.prepare(wet)
    bridge = shapely.intersects(wet, pieces)
    kinds, words = rng.choice(names.STREET_KIND, 5000), rng.choice(names.STREET_NAME, 5000)
    tags: list[Tags] = []
    for k, s, b in zip(highway, street, bridge, strict=True):
        tag: Tags = {"highway": str(k)}
        if k in ("residential", "tertiary", "pedestrian", "primary", "secondary"):
            tag["name"] = f"{kinds[s % 5000]} {words[s % 5000]}"
            tag["surface"] = "asphalt" if k != "pedestrian" else "paving_stones"
        if k in LANES:
            tag |= {"lanes": LANES[str(k)], "ref": f"D {s % 900 + 1}", "maxspeed": "50"}
        if k == "track":
            tag |= {"tracktype": f"grade{s % 5 + 1}", "surface": "ground"}
        if b:
            tag |= {"bridge": "yes", "layer": "1"}
        tags.append(tag)
    return features(pieces, tags)


def _chop(
    rng: np.random.Generator, ways: NDArray[np.object_]
) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
    """Ways cut at some of their inner nodes, and the row each piece came from."""
    xy, which = shapely.get_coordinates(ways, return_index=True)
    inner = np.zeros(len(xy), dtype=bool)
    inner[1:-1] = (which[1:-1] == which[:-2]) & (which[1:-1] == which[2:])
    cut = inner & (rng.random(len(xy)) < 0.3)
    times = 1 + cut
    doubled = np.repeat(np.arange(len(xy)), times)
    new = np.r_[True, which[doubled][1:] != which[doubled][:-1]]
    second = np.r_[False, doubled[1:] == doubled[:-1]]
    piece = np.cumsum(new | second) - 1
    lines = shapely.linestrings(xy[doubled], indices=piece)
    return lines, which[doubled][np.flatnonzero(new | second)]


def _details(
    rng: np.random.Generator,
    layout: Layout,
    net: Network,
    kind: NDArray[np.str_],
    blocks: NDArray[np.object_],
    block_kind: NDArray[np.str_],
    houses: Features,
) -> Features:
    edges = net.ways[net.highway == BOUNDARY]
    water = shapely.union_all([layout.coast, layout.box.boundary, *layout.lakes, layout.river])
    shapely.prepare(water)
    edges = edges[~shapely.dwithin(water, edges, 15.0)]
    busy = {"retail": 0.7, "commercial": 0.5, "apartments": 0.16, "office": 0.3, "hotel": 0.6}
    share = np.array([busy.get(t["building"], 0.025) for t in houses.truth])
    villages = [q.polygon.centroid for q in layout.quarters if q.kind == "village"]
    places: list[Tags] = [
        {"place": "village", "name": n} for n in names.TOWN_NAMES[1 : len(villages) + 1]
    ]
    return concat(
        [
            details.street_furniture(rng, net.ways, net.highway),
            details.scattered_trees(
                rng, blocks[np.isin(block_kind, ["park", "cemetery", "hospital"])], 18.0
            ),
            details.scattered_trees(
                rng, blocks[np.isin(block_kind, ["apartments", "school", "university"])], 12.0
            ),
            details.scattered_trees(
                rng, net.faces[np.isin(kind, ["meadow", "heath", "scrub", "farmyard"])], 2.2
            ),
            details.shops_and_services(rng, houses.geometry, share),
            details.hedges(rng, edges),
            details.woodland_paths(rng, net.faces[np.isin(kind, ["forest", "wood"])]),
            details.power_lines(rng, layout.bounds),
            features(villages[: len(places)], places[: len(villages)]),
        ]
    )
