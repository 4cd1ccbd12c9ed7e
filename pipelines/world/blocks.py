"""What stands in the blocks of settlements: buildings by kind, churches, pitches, car parks."""

import numpy as np
import shapely
from numpy.typing import NDArray

from pipelines.world import buildings
from pipelines.world.features import Features, Tags, concat, features, parts_of

Polygons = NDArray[np.object_]

# Kind of block -> (style of building, values of building=*, their shares, levels from, to).
BUILT: dict[str, tuple[str, list[str], list[float], tuple[int, int]]] = {
    "rows": ("rows", ["apartments", "residential", "house", "retail"], [0.45, 0.25, 0.2, 0.1], (2,
        5)),
    "terraces": ("terraces", ["terrace", "house"], [0.6, 0.4], (2, 3)),
    "houses": ("houses", ["house", "detached", "bungalow"], [0.62, 0.3, 0.08], (1, 2)),
    "village": ("village", ["house", "detached", "farm", "barn"], [0.6, 0.2, 0.08, 0.12], (1, 2)),
    "apartments": ("apartments", ["apartments", "residential", "dormitory"], [0.8, 0.15, 0.05],
        (4, 10)),
    "commercial": ("commercial", ["office", "commercial", "hotel"], [0.55, 0.35, 0.1], (2, 7)),
    "retail": ("retail", ["retail", "supermarket", "commercial"], [0.6, 0.2, 0.2], (1, 2)),
    "industrial": ("industrial", ["industrial", "warehouse", "manufacture"], [0.5, 0.35, 0.15],
        (1, 3)),
    "depot": ("industrial", ["warehouse", "industrial"], [0.6, 0.4], (1, 2)),
    "school": ("campus", ["school"], [1.0], (1, 3)),
    "university": ("campus", ["university", "college"], [0.8, 0.2], (3, 6)),
    "hospital": ("campus", ["hospital"], [1.0], (3, 7)),
    "farmyard": ("farmyard", ["farm_auxiliary", "barn", "farm", "greenhouse", "cowshed"],
                 [0.35, 0.3, 0.15, 0.08, 0.12], (1, 2)),
    "allotments": ("allotments", ["shed"], [1.0], (1, 1)),
}  # fmt: skip


def make_buildings(rng: np.random.Generator, blocks: Polygons, kind: NDArray[np.str_]) -> Features:
    """All buildings of the blocks. Heights follow from `building:levels`."""
    parts = []
    # Small plots of offices and shops are built up to the street, as in an old centre.
    tight = np.isin(kind, ["commercial", "retail"]) & (shapely.area(blocks) < 6500)
    kind = np.where(tight, "", kind)
    for name, (style, values, shares, levels) in BUILT.items():
        rows = np.flatnonzero(kind == name)
        if not len(rows):
            continue
        shapes, home = buildings.along_edges(rng, blocks[rows], buildings.STYLES[style])
        parts.append(_tagged(rng, shapes, values, shares, levels))
        if name in ("industrial", "depot", "retail", "commercial", "hospital", "university"):
            reach = buildings.STYLES[style].setback + buildings.STYLES[style].depth[1] + 6
            inner, _ = parts_of(shapely.buffer(blocks[rows], -reach, join_style="mitre"), 2)
            shapes, _ = buildings.along_edges(rng, inner, buildings.STYLES[style])
            parts.append(_tagged(rng, shapes, values, shares, levels))
        if name in ("houses", "village", "terraces", "rows"):
            sheds, _ = buildings.behind(rng, shapes, home, blocks[rows])
            some = rng.random(len(sheds)) < 0.45
            parts.append(
                _tagged(rng, sheds[some], ["garage", "shed", "garages"], [0.5, 0.4, 0.1], (1, 1))
            )
    rows = np.flatnonzero(kind == "courtyard")
    shapes, home = buildings.around_courtyards(rng, blocks[rows])
    parts.append(
        _tagged(rng, shapes, ["apartments", "yes", "residential"], [0.7, 0.1, 0.2], (3, 6))
    )
    shops = blocks[tight]
    shapes, _ = buildings.around_courtyards(rng, shops)
    parts.append(
        _tagged(rng, shapes, ["office", "commercial", "retail"], [0.4, 0.35, 0.25], (3, 6))
    )
    narrow = np.setdiff1d(np.arange(len(rows)), home)
    shapes, _ = buildings.along_edges(rng, blocks[rows][narrow], buildings.STYLES["rows"])
    parts.append(_tagged(rng, shapes, ["apartments", "house"], [0.6, 0.4], (2, 5)))
    parts.append(_churches(rng, blocks[kind == "church"]))
    return concat(parts)


def _tagged(
    rng: np.random.Generator,
    shapes: Polygons,
    values: list[str],
    shares: list[float],
    levels: tuple[int, int],
) -> Features:
    value = rng.choice(values, len(shapes), p=shares)
    level = rng.integers(levels[0], levels[1] + 1, len(shapes))
    tags: list[Tags] = [
        {"building": str(v), "building:levels": str(n)} for v, n in zip(value, level, strict=True)
    ]
    return features(shapes, tags)


def _churches(rng: np.random.Generator, blocks: Polygons) -> Features:
    items: list[tuple[shapely.Geometry, Tags]] = []
    for block in blocks:
        centre = np.array(block.point_on_surface().coords[0])
        angle = rng.normal(0, 0.15)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        k = min(1.0, float(block.area) ** 0.5 / 60)
        cross = [(-22, -6), (4, -6), (4, -13), (14, -13), (14, -6), (22, -4), (22, 4), (14, 6),
            (14, 13),
                 (4, 13), (4, 6), (-22, 6)]  # fmt: skip
        church = shapely.Polygon(centre + np.array(cross) * k @ turn)
        if block.contains(church):
            items.append(
                (
                    church,
                    {
                        "building": "church",
                        "amenity": "place_of_worship",
                        "religion": "christian",
                        "denomination": "catholic",
                        "height": "16",
                    },
                )
            )
    return features([g for g, _ in items], [t for _, t in items])


def make_grounds(rng: np.random.Generator, blocks: Polygons, kind: NDArray[np.str_]) -> Features:
    """Pitches, playgrounds, ponds, paths, car parks and pools within the blocks."""
    parts = [
        _pitches(rng, blocks[np.isin(kind, ["pitch", "school"])]),
        _park_inside(rng, blocks[kind == "park"]),
        _yards(
            rng,
            blocks[np.isin(kind, ["apartments", "retail", "commercial", "hospital", "industrial"])],
        ),
    ]
    pads = shapely.buffer(shapely.point_on_surface(blocks[kind == "hospital"]), 11.0, quad_segs=4)
    parts.append(features(pads, {"aeroway": "helipad", "surface": "concrete"}))
    aisles = blocks[kind == "parking"]
    if len(aisles):
        across = _middle_lines(aisles)
        parts.append(features(across, {"highway": "service", "service": "parking_aisle"}))
    return concat(parts)


def _middle_lines(shapes: Polygons) -> NDArray[np.object_]:
    """The long middle axis of each shape, within it."""
    xy = np.stack([shapely.get_coordinates(g)[:4] for g in shapely.oriented_envelope(shapes)])
    long = np.hypot(*(xy[:, 1] - xy[:, 0]).T) >= np.hypot(*(xy[:, 2] - xy[:, 1]).T)
    xy = np.where(long[:, None, None], xy, np.roll(xy, -1, axis=1))
    ends = np.stack([(xy[:, 0] + xy[:, 3]) / 2, (xy[:, 1] + xy[:, 2]) / 2], axis=1)
    lines, _ = parts_of(shapely.intersection(shapely.linestrings(ends), shapes), 1)
    return np.asarray(lines[shapely.length(lines) > 5], dtype=object)


def _rectangles(
    centre: NDArray[np.float64], angle: NDArray[np.float64], size: NDArray[np.float64]
) -> Polygons:
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    along, across = np.c_[cos, sin] * size[:, :1] / 2, np.c_[-sin, cos] * size[:, 1:] / 2
    ends = [centre - along - across, centre + along - across, centre + along + across]
    return (
        shapely.polygons(np.stack([*ends, centre - along + across], axis=1))
        if len(centre)
        else np.empty(0, object)
    )


def _pitches(rng: np.random.Generator, blocks: Polygons) -> Features:
    kinds = ["soccer", "tennis", "basketball", "athletics;soccer"]
    sizes = np.array([[96.0, 60.0], [36.0, 18.0], [28.0, 15.0], [96.0, 60.0]])
    choice = rng.choice(4, len(blocks), p=[0.4, 0.35, 0.2, 0.05])
    sides = shapely.get_coordinates(shapely.get_exterior_ring(blocks))
    first = np.r_[
        0, np.cumsum(shapely.get_num_coordinates(shapely.get_exterior_ring(blocks)))[:-1]
    ].astype(int)
    edge = sides[first + 1] - sides[first] if len(blocks) else np.empty((0, 2))
    centre = shapely.get_coordinates(shapely.point_on_surface(blocks))
    shape = _rectangles(centre, np.arctan2(edge[:, 1], edge[:, 0]), sizes[choice])
    fits = shapely.contains(blocks, shape)
    tags: list[Tags] = [{"leisure": "pitch", "sport": kinds[c]} for c in choice[fits]]
    for tag, c in zip(tags, choice[fits], strict=True):
        tag["surface"] = ["grass", "clay", "asphalt", "artificial_turf"][c]
    return features(shape[fits], tags)


def _park_inside(rng: np.random.Generator, parks: Polygons) -> Features:
    parts = []
    paths = _middle_lines(parks) if len(parks) else np.empty(0, object)
    parts.append(features(paths, {"highway": "footway", "surface": "gravel"}))
    middle = shapely.point_on_surface(parks)
    room = shapely.distance(middle, shapely.boundary(parks)) if len(parks) else np.empty(0)
    for share, tags in (
        (0.25, {"natural": "water", "water": "pond"}),
        (0.35, {"leisure": "playground"}),
    ):
        some = (rng.random(len(parks)) < share) & (room > 10)
        centre = shapely.get_coordinates(middle[some]) + rng.normal(0, 4, (int(some.sum()), 2))
        radius = np.minimum(room[some] * 0.4, 22)
        discs = shapely.buffer(shapely.points(centre), radius, quad_segs=4)
        parts.append(features(discs, dict(tags)))
    return concat(parts)


def _yards(rng: np.random.Generator, blocks: Polygons) -> Features:
    """Car parks inside large blocks."""
    middle = shapely.get_coordinates(shapely.point_on_surface(blocks))
    size = rng.uniform([28, 16], [70, 34], (len(blocks), 2))
    shape = _rectangles(middle, rng.uniform(0, np.pi, len(blocks)), size)
    inset = shapely.intersection(shape, shapely.buffer(blocks, -8))
    lots, _ = parts_of(inset, 2)
    lots = lots[shapely.area(lots) > 150]
    return features(lots, {"amenity": "parking", "surface": "asphalt", "access": "private"})
