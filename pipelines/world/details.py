"""Small things along streets and in fields: trees, lamps, stops, shops, footways, hedges, power."""

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.world import names
from pipelines.world.features import Features, Tags, concat, features
from pipelines.world.noise import uniform

Lines = NDArray[np.object_]


def along_lines(lines: Lines, spacing_m: float, aside_m: float) -> NDArray[np.float64]:
    """Positions [N, 2] every `spacing_m` along each line, `aside_m` to its left."""
    count = np.maximum(0, (shapely.length(lines) / spacing_m).astype(np.int64))
    which = np.repeat(np.arange(len(lines)), count)
    step = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    at = (step + 0.5) * spacing_m
    here = shapely.get_coordinates(shapely.line_interpolate_point(lines[which], at))
    ahead = shapely.get_coordinates(shapely.line_interpolate_point(lines[which], at + 0.5))
    along = ahead - here
    along /= np.maximum(np.hypot(*along.T), 1e-9)[:, None]
    return np.asarray(here + np.c_[-along[:, 1], along[:, 0]] * aside_m)


def _points(xy: NDArray[np.float64], tags: list[Tags] | Tags) -> Features:
    return features(shapely.points(xy), tags)


def street_furniture(rng: np.random.Generator, ways: Lines, highway: NDArray[np.str_]) -> Features:
    """Street trees, lamps, bus stops, crossings and sidewalks."""
    urban = ways[np.isin(highway, ["residential", "tertiary", "pedestrian"])]
    some = rng.random(len(urban))
    trees = np.concatenate(
        [along_lines(urban[some < 0.26], 12.0, 6.2), along_lines(urban[some < 0.2], 12.0, -6.2)]
    )
    trees = trees[rng.random(len(trees)) < 0.85] + rng.normal(0, 0.5, (0, 2)).sum()
    lamps = along_lines(urban[some > 0.55], 55.0, 4.4)
    main = ways[np.isin(highway, ["tertiary", "secondary", "primary"])]
    stops = along_lines(main, 520.0, 5.0)
    ends = np.unique(np.round(shapely.get_coordinates(shapely.get_point(urban, 0)), 6), axis=0)
    crossings = ends[uniform(ends, 11) < 0.25]
    species = rng.choice(["Platanus × hispanica", "Tilia", "", "", "Acer"], len(trees))
    tree_tags: list[Tags] = [
        {"natural": "tree", "leaf_type": "broadleaved"} | ({"genus": str(s)} if s else {})
        for s in species
    ]
    stop_tags: list[Tags] = [
        {"highway": "bus_stop", "public_transport": "platform", "name": f"{n} {i % 7 + 1}"}
        for i, n in enumerate(rng.choice(names.STREET_NAME, len(stops)))
    ]
    sidewalks = shapely.offset_curve(urban[some < 0.2], 5.0)
    sidewalks = sidewalks[(shapely.get_type_id(sidewalks) == 1) & (shapely.length(sidewalks) > 15)]
    return concat(
        [
            _points(trees, tree_tags),
            _points(lamps, {"highway": "street_lamp", "lamp_type": "electric"}),
            _points(stops, stop_tags),
            _points(crossings, {"highway": "crossing", "crossing": "zebra"}),
            features(sidewalks, {"highway": "footway", "footway": "sidewalk"}),
        ]
    )


def scattered_trees(rng: np.random.Generator, areas: Lines, per_hectare: float) -> Features:
    """Single trees strewn over areas (parks, meadows, cemeteries)."""
    if not len(areas):
        return _points(np.empty((0, 2)), {})
    count = rng.poisson(shapely.area(areas) / 1e4 * per_hectare)
    which = np.repeat(np.arange(len(areas)), count)
    box = shapely.bounds(areas)[which]
    xy = rng.uniform(box[:, :2], box[:, 2:]) if len(which) else np.empty((0, 2))
    shapely.prepare(areas)
    inside = shapely.contains_xy(areas[which], xy[:, 0], xy[:, 1])
    return _points(xy[inside], {"natural": "tree"})


def shops_and_services(
    rng: np.random.Generator, buildings: Lines, share: NDArray[np.float64]
) -> Features:
    """POI nodes inside buildings, `share` [B] the chance of one in each."""
    chosen = buildings[rng.random(len(buildings)) < share]
    xy = shapely.get_coordinates(shapely.point_on_surface(chosen)) + rng.normal(
        0, 1, (len(chosen), 2)
    )
    tags: list[Tags] = []
    for _ in range(len(chosen)):
        shop = rng.random() < 0.45
        tag: Tags = {
            "shop" if shop else "amenity": str(rng.choice(names.SHOPS if shop else names.AMENITIES))
        }
        if rng.random() < 0.7:
            tag["name"] = str(rng.choice(names.PLACE_NAMES))
        if rng.random() < 0.2:
            tag["opening_hours"] = "Mo-Fr 09:00-12:30,14:00-19:00; Sa 09:00-13:00; PH off"
        if rng.random() < 0.15:
            tag["cuisine"] = str(
                rng.choice(["pizza;italian", "regional", "kebab", "seafood; breton"])
            )
        if rng.random() < 0.1:
            tag["wheelchair"] = str(rng.choice(["yes", "no", "limited", "Yes"]))
        if rng.random() < 0.08:
            tag["name:ar"] = "مطعم"
            tag["name:he"] = "בית קפה"
        tags.append(tag)
    return _points(xy, tags)


def hedges(rng: np.random.Generator, boundaries: Lines) -> Features:
    """Hedges and tree rows on some field boundaries."""
    draw = rng.random(len(boundaries))
    rows = boundaries[(draw > 0.34) & (draw < 0.44)]
    return concat(
        [
            features(boundaries[draw < 0.34], {"barrier": "hedge"}),
            features(rows, {"natural": "tree_row"}),
            features(boundaries[draw > 0.96], {"barrier": "wall"}),
        ]
    )


def power_lines(rng: np.random.Generator, bounds: tuple[float, float, float, float]) -> Features:
    """Two lines on pylons across the country; the pylons are the nodes of the line."""
    x0, y0, x1, y1 = bounds
    w, h = x1 - x0, y1 - y0
    ends = [[(0.55, 0.0), (0.7, 0.45), (1.0, 0.62)], [(0.62, 1.0), (0.7, 0.45)]]
    lines, pylons = [], []
    for points in ends:
        line = shapely.LineString([(x0 + u * w, y0 + v * h) for u, v in points])
        at = np.linspace(0, line.length, max(3, int(line.length / 320)))
        xy = shapely.get_coordinates(shapely.line_interpolate_point(line, at))
        xy[1:-1] += rng.normal(0, 2, xy[1:-1].shape)
        lines.append(shapely.LineString(xy))
        pylons.append(xy)
    return concat(
        [
            features(lines, {"power": "line", "voltage": "225000", "cables": "3"}),
            _points(np.concatenate(pylons), {"power": "tower"}),
        ]
    )


def woodland_paths(rng: np.random.Generator, woods: Lines) -> Features:
    """Winding paths through woods."""
    some = woods[rng.random(len(woods)) < 0.3]
    box = shapely.bounds(some)
    t = np.linspace(0, 1, 9)
    ends = rng.uniform(box[:, None, :2], box[:, None, 2:], (len(some), 2, 2))
    line = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * t[None, :, None]
    line = line + rng.normal(0, 6, line.shape)
    cut = (
        shapely.intersection(shapely.linestrings(line), some) if len(some) else np.empty(0, object)
    )
    parts = shapely.get_parts(cut)
    parts = parts[shapely.length(parts) > 25]
    return features(parts, {"highway": "path", "surface": "ground"})
