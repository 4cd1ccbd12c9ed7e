"""Places planned as a whole: airfield, golf course, harbour, marina, quarry, solar farm."""

from collections.abc import Callable

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.world.features import Features, Tags, concat, features
from pipelines.world.layout import Layout, blob

Local = Callable[[list[tuple[float, float]]], NDArray[np.float64]]


def make_sites(rng: np.random.Generator, layout: Layout) -> Features:
    """All sites of the region with what stands in them."""
    parts = [
        _airfield(rng, layout),
        _golf(rng, layout),
        _harbour(rng, layout),
        _marina(layout),
        _quarry(rng, layout),
        _solar(layout),
    ]
    return concat(parts)


def _frame(site: shapely.Polygon) -> Local:
    """Coordinates over a rectangular site: (-1, -1) is its first corner, (1, 1) its third."""
    xy = shapely.get_coordinates(shapely.oriented_envelope(site))[:4]
    if np.hypot(*(xy[1] - xy[0])) < np.hypot(*(xy[2] - xy[1])):
        xy = np.roll(xy, -1, axis=0)
    centre, along, across = xy.mean(axis=0), (xy[1] - xy[0]) / 2, (xy[2] - xy[1]) / 2
    return lambda points: centre + np.array(points) @ np.stack([along, across])


def _rectangle(local: Local, s: float, t: float, width: float, height: float) -> shapely.Polygon:
    w, h = width / 2, height / 2
    return shapely.Polygon(local([(s - w, t - h), (s + w, t - h), (s + w, t + h), (s - w, t + h)]))


def _made(items: list[tuple[shapely.Geometry, Tags]]) -> Features:
    return features([g for g, _ in items], [t for _, t in items])


def _airfield(rng: np.random.Generator, layout: Layout) -> Features:
    site = layout.sites["airfield"]
    local = _frame(site)
    length = float(site.area) ** 0.5
    runway, lane = 45 / length * 2.6, 18 / length * 2.6
    items: list[tuple[shapely.Geometry, Tags]] = [
        (site, {"aeroway": "aerodrome", "name": "Aérodrome de Port-Aven", "icao": "XXPA"}),
        (
            _rectangle(local, 0, -0.35, 1.8, runway * 2),
            {"aeroway": "runway", "surface": "asphalt", "ref": "06/24", "width": "45"},
        ),
        (
            shapely.LineString(local([(-0.9, -0.35), (0.9, -0.35)])),
            {"aeroway": "runway", "ref": "06/24"},
        ),
        (
            shapely.LineString(local([(-0.85, 0.05), (0.85, 0.05)])),
            {"aeroway": "taxiway", "ref": "A"},
        ),
        (_rectangle(local, 0.1, 0.38, 0.55, 0.5), {"aeroway": "apron", "surface": "concrete"}),
        (
            _rectangle(local, 0.1, 0.78, 0.22, 0.18),
            {"aeroway": "terminal", "building": "yes", "name": "Terminal", "height": "11"},
        ),
        (_rectangle(local, 0.7, 0.75, 0.3, 0.25), {"amenity": "parking", "surface": "asphalt"}),
        (_rectangle(local, 0, -0.75, 1.9, lane * 2), {"landuse": "grass"}),
    ]
    items += [
        (shapely.LineString(local([(s, -0.35), (s, 0.05)])), {"aeroway": "taxiway"})
        for s in (-0.85, -0.3, 0.3, 0.85)
    ]
    items += [
        (shapely.LineString(local([(s, 0.05), (s, 0.2)])), {"aeroway": "taxiway"})
        for s in (0.0, 0.2)
    ]
    items += [
        (
            _rectangle(local, -0.7 + 0.17 * k, 0.55, 0.12, rng.uniform(0.2, 0.32)),
            {"building": "hangar", "height": "9"},
        )
        for k in range(4)
    ]
    return _made(items)


def _golf(rng: np.random.Generator, layout: Layout) -> Features:
    site = layout.sites["golf"]
    items: list[tuple[shapely.Geometry, Tags]] = [
        (site, {"leisure": "golf_course", "name": "Golf des Dunes", "sport": "golf"})
    ]
    k = layout.scale**0.6
    inner = site.buffer(-45 * k)
    x0, y0, x1, y1 = inner.bounds
    tees = rng.uniform([x0, y0], [x1, y1], (60, 2))
    used = shapely.Polygon()
    for tee in tees:
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(150, 330) * k
        step = np.array([np.cos(angle), np.sin(angle)]) * reach
        bow = tee + step / 2 + np.array([-step[1], step[0]]) * rng.uniform(-0.15, 0.15)
        line = shapely.LineString([tee, bow, tee + step])
        hole = line.buffer(21 * k)
        if len(items) > 60 or not inner.contains(hole) or hole.intersects(used):
            continue
        used = used.union(hole)
        green = blob(rng, tee + step, 13 * k, 0.2)
        items.append((hole.buffer(4).buffer(-4), {"golf": "fairway", "landuse": "grass"}))
        items.append((green, {"golf": "green", "landuse": "grass", "surface": "grass"}))
        items.append((shapely.Point(tee).buffer(6 * k + 1), {"golf": "tee", "landuse": "grass"}))
        sand = tee + step + rng.normal(0, 1, 2) * 16 * k
        items.append((blob(rng, sand, 6 * k + 2, 0.35), {"golf": "bunker", "natural": "sand"}))
    wood = site.buffer(-4).difference(used.buffer(12)).difference(site.buffer(-26 * k))
    items += [
        (p, {"natural": "wood", "leaf_type": "broadleaved"})
        for p in shapely.get_parts(wood)
        if p.area > 60
    ]
    pond = blob(rng, np.array(inner.point_on_surface().coords[0]), 26 * k, 0.3)
    items.append((pond, {"natural": "water", "water": "pond"}))
    return _made(items)


def _harbour(rng: np.random.Generator, layout: Layout) -> Features:
    """A port on the shore: quay land with sheds, a basin behind breakwaters, piers."""
    site = layout.sites["harbour"]
    centre = np.array(site.centroid.coords[0])
    radius = float(site.area / np.pi) ** 0.5
    land = site.difference(layout.sea)
    land = max(shapely.get_parts(land), key=shapely.area)
    basin = site.buffer(radius * 0.25).intersection(layout.sea)
    out = np.array(basin.centroid.coords[0]) - np.array(land.centroid.coords[0])
    out /= np.hypot(*out)
    side = np.array([-out[1], out[0]])
    width = max(7.0, 0.02 * radius)

    def at(s: float, t: float) -> NDArray[np.float64]:
        return np.asarray(centre + (side * s + out * t) * radius)

    def bar(points: list[NDArray[np.float64]], half_m: float) -> shapely.Polygon:
        return shapely.LineString(points).buffer(half_m, cap_style="flat", join_style="mitre")

    moles = [
        bar([at(-0.95, -0.1), at(-0.95, 0.75), at(-0.1, 1.05)], width),
        bar([at(0.95, -0.1), at(0.95, 0.65), at(0.3, 0.9)], width),
    ]
    piers = [bar([at(s, -0.15), at(s, 0.5)], width * 1.8) for s in (-0.55, -0.12, 0.35)]
    quay = shapely.union_all([bar([at(-0.9, 0.02), at(0.9, 0.02)], radius * 0.16), land])
    items: list[tuple[shapely.Geometry, Tags]] = [
        (
            shapely.union_all([basin, quay, *piers]).buffer(2),
            {"landuse": "harbour", "harbour": "yes", "name": "Port de commerce"},
        ),
        (
            basin.difference(shapely.union_all([quay, *piers])).buffer(0),
            {"natural": "water", "water": "harbour"},
        ),
        (quay, {"landuse": "industrial", "industrial": "port", "surface": "concrete"}),
        *((p, {"man_made": "quay"}) for p in shapely.get_parts(quay.intersection(layout.sea))),
    ]
    items += [
        (m.difference(quay), {"man_made": "breakwater", "surface": "concrete"}) for m in moles
    ]
    items += [(p.difference(quay), {"man_made": "pier", "surface": "concrete"}) for p in piers]
    turn = np.stack([side, out])
    spots = rng.uniform([-0.85, -0.85], [0.85, 0.1], (120, 2))
    size = rng.uniform([16, 10], [60, 26], (120, 2)) * max(layout.scale, 0.25) ** 0.4
    yard = quay.buffer(-4)
    used = shapely.Polygon()
    for spot, (w, h) in zip(spots, size, strict=True):
        ends = np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2
        shed = shapely.Polygon(at(spot[0], spot[1]) + ends @ turn)
        if yard.contains(shed) and not shed.dwithin(used, 9):
            used = used.union(shed)
            tank = rng.random() < 0.2
            tags = (
                {"man_made": "storage_tank", "content": "fuel"}
                if tank
                else {"building": "warehouse"}
            )
            items.append((shed.centroid.buffer(h * 0.6) if tank else shed, tags))
    return _made(items)


def _marina(layout: Layout) -> Features:
    site = layout.sites["marina"]
    centre = np.array(site.centroid.coords[0])
    radius = float(site.area / np.pi) ** 0.5
    water = site.intersection(layout.sea)
    items: list[tuple[shapely.Geometry, Tags]] = [
        (water, {"leisure": "marina", "name": "Marina · Kirol portua", "seamark:type": "harbour"})
    ]
    for k in np.linspace(-0.6, 0.6, 4):
        pier = shapely.LineString([centre + np.array([s, k]) * radius for s in (0.25, -0.72)])
        items.append((pier, {"man_made": "pier", "floating": "yes", "highway": "footway"}))
    arc = site.boundary.buffer(4).intersection(layout.sea.buffer(-6))
    arc = arc.difference(
        shapely.box(
            *(centre - [2, 1.1] * np.array([radius, radius])),
            *(centre - [0, 0.55] * np.array([radius, radius])),
        )
    )
    items += [(p, {"man_made": "breakwater"}) for p in shapely.get_parts(arc) if p.area > 40]
    return _made(items)


def _quarry(rng: np.random.Generator, layout: Layout) -> Features:
    site = layout.sites["quarry"]
    centre = np.array(site.centroid.coords[0])
    radius = float(site.area / np.pi) ** 0.5
    pool = blob(rng, centre + rng.normal(0, 0.2, 2) * radius, radius * 0.22, 0.3)
    rock = blob(rng, centre + np.array([0.4, 0.3]) * radius, radius * 0.4, 0.3).intersection(site)
    return _made(
        [
            (site, {"landuse": "quarry", "resource": "granite"}),
            (pool, {"natural": "water", "water": "pond"}),
            (rock, {"natural": "bare_rock"}),
        ]
    )


def _solar(layout: Layout) -> Features:
    site = layout.sites["solar"]
    local = _frame(site)
    rows = max(4, int(site.area**0.5 / 12))
    items: list[tuple[shapely.Geometry, Tags]] = [
        (site, {"power": "plant", "plant:source": "solar", "name": "Parc solaire de l'Estuaire"})
    ]
    items += [
        (
            _rectangle(local, 0, t, 1.8, 1.0 / rows),
            {"power": "generator", "generator:source": "solar", "generator:method": "photovoltaic"},
        )
        for t in np.linspace(-0.85, 0.85, rows)
    ]
    return _made(items)
