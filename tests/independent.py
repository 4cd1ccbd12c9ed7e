"""What a chip must hold, worked out from the inputs by the plainest means there are.

Nothing here uses the code that builds datasets, and nothing is done in bulk: libosmium reads the
extract, shapely handles one object or one pair at a time, rasterio one chip at a time. Slow, and
meant to be believed. `compare.py` beside it holds the stored arrays against this.
"""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import osmium
import shapely
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.features import rasterize
from rasterio.transform import from_bounds
from scipy.spatial import Delaunay
from shapely import LineString, MultiLineString, MultiPolygon, Point, Polygon

from schemas.config import ObjectOptions
from schemas.layout import Kind, Relation
from schemas.taxonomy import Taxonomy

Box = tuple[float, float, float, float]
"""x_min, y_min, x_max, y_max in metres."""

SLIVER_M2, SLIVER_M = 1e-6, 1e-3
_KINDS = {"Point": Kind.POINT, "LineString": Kind.LINE, "Polygon": Kind.POLYGON}


@dataclass(frozen=True)
class Feature:
    """One part of an OSM element, in metres."""

    geometry: shapely.Geometry
    osm: int
    part: int = 0
    tags: tuple[str, ...] = ()
    osm_class: int = 0
    width_m: float = 0.0

    @property
    def kind(self) -> Kind:
        return _KINDS[self.geometry.geom_type]


@dataclass(frozen=True)
class Object:
    """A piece of a feature in a chip."""

    geometry: shapely.Geometry
    feature: Feature

    @property
    def kind(self) -> Kind:
        return self.feature.kind

    @property
    def size(self) -> float:
        return self.geometry.area if self.kind == Kind.POLYGON else self.geometry.length


# ---------------------------------------------------------------------------- the OSM extract


def read_features(
    pbf: Path, epsg: int, drop_keys: Sequence[str], taxonomy: Taxonomy
) -> list[Feature]:
    """Every feature of an extract, projected, repaired, in single parts."""
    project = Transformer.from_crs("EPSG:4326", f"EPSG:{epsg}", always_xy=True)
    features = []
    for osm, geometry, tags in _elements(pbf):
        kept = {k: v for k, v in tags.items() if not any(_glob(p, k) for p in drop_keys)}
        if kept:
            moved = shapely.transform(
                geometry, lambda xy: np.array([project.transform(x, y) for x, y in xy])
            )
            features += feature_parts(moved, osm, kept, taxonomy)
    return features


def feature_parts(
    geometry: shapely.Geometry, osm: int, tags: dict[str, str], taxonomy: Taxonomy
) -> list[Feature]:
    """The valid single parts of a geometry that are of its own dimension."""
    dimension = shapely.get_dimensions(geometry)
    whole = geometry if geometry.is_valid else shapely.make_valid(geometry)
    parts = [p for p in single_parts(whole) if shapely.get_dimensions(p) == dimension]
    texts = tuple(sorted((f"{k}={v}" for k, v in tags.items()), key=tag_id))
    return [
        Feature(part, osm, n, texts, *classify(tags, _KINDS[part.geom_type], taxonomy))
        for n, part in enumerate(parts)
    ]


def _elements(pbf: Path) -> Iterable[tuple[int, shapely.Geometry, dict[str, str]]]:
    relations = {o.id: dict(o.tags) for o in osmium.FileProcessor(str(pbf), osmium.osm.RELATION)}
    for o in osmium.FileProcessor(str(pbf)).with_locations().with_areas():
        tags = dict(o.tags)
        if o.is_area():
            if not o.from_way():
                yield o.orig_id() << 2 | 3, _area(o), relations[o.orig_id()]
        elif not tags:
            continue
        elif o.is_node():
            yield o.id << 2 | 1, Point(o.location.lon, o.location.lat), tags
        elif o.is_way() and all(n.location.valid() for n in o.nodes):
            xy = [(n.location.lon, n.location.lat) for n in o.nodes]
            if len(set(xy)) > 1:
                area = xy[0] == xy[-1] and len(set(xy)) > 2 and _means_area(tags)
                yield o.id << 2 | 2, Polygon(xy) if area else LineString(xy), tags


def _area(area: "osmium.osm.Area") -> shapely.Geometry:
    def ring(nodes: Iterable["osmium.osm.NodeRef"]) -> list[tuple[float, float]]:
        return [(n.lon, n.lat) for n in nodes]

    polygons = [
        Polygon(ring(outer), [ring(inner) for inner in area.inner_rings(outer)])
        for outer in area.outer_rings()
    ]
    # The order of parts and rings depends on how the ways were joined: it is made canonical.
    one = polygons[0] if len(polygons) == 1 else MultiPolygon(polygons)
    return shapely.normalize(one)


def _means_area(tags: dict[str, str]) -> bool:
    """Whether a closed way is an area, by the table that QuackOSM ships; roundabouts are not."""
    if tags.get("area") in ("yes", "no"):
        return tags["area"] == "yes"
    table = _area_table()
    for key, value in tags.items():
        if key == "junction":
            if value not in ("circular", "roundabout"):
                return True
        elif (
            key in table["all"]
            or value in table["allowlist"].get(key, ())
            or (key in table["denylist"] and value not in table["denylist"][key])
        ):
            return True
    return False


@lru_cache
def _area_table() -> dict[str, Any]:
    text = files("quackosm").joinpath("osm_way_polygon_features.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@cache
def _glob(pattern: str, key: str) -> bool:
    return bool(re.fullmatch(".*".join(re.escape(p) for p in pattern.split("*")), key))


def tag_id(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode()).digest()[:8], "big")


def classify(tags: dict[str, str], kind: Kind, taxonomy: Taxonomy) -> tuple[int, float]:
    """Class and drawn width: the class drawn last of those whose rules hold, its widest width."""
    held: dict[int, list[float]] = {}
    for number, c in enumerate(taxonomy.classes, start=1):
        for rule in c.rules:
            key, _, value = rule.partition("=")
            holds = key in tags and (tags[key] == value or (value == "*" and tags[key] != "no"))
            width = c.widths.get(rule, c.width_m) or 0.0
            if holds and (width or kind != Kind.LINE):
                held.setdefault(number, []).append(width)
    if not held:
        return 0, 0.0
    number = max(held)
    return number, max(held[number]) if kind == Kind.LINE else 0.0


# ------------------------------------------------------------------------------------ clipping


def single_parts(geometry: shapely.Geometry) -> list[shapely.Geometry]:
    if hasattr(geometry, "geoms"):
        return [part for g in geometry.geoms for part in single_parts(g)]
    return [] if geometry.is_empty else [geometry]


def clip_chip(
    features: Iterable[Feature], chip: Box, options: ObjectOptions | None = None
) -> list[Object]:
    """The objects of a chip in stored order."""
    options = options or ObjectOptions()
    found = [Object(g, f) for f in features for g in clip_feature(f, chip)]
    width, height = chip[2] - chip[0], chip[3] - chip[1]
    least = {
        Kind.POINT: 0.0,
        Kind.LINE: options.min_line_fraction * 2 * (width + height),
        Kind.POLYGON: options.min_polygon_fraction * width * height,
    }
    found = [o for o in found if o.size >= least[o.kind]]
    found.sort(key=lambda o: (o.kind, o.feature.osm, o.feature.part, *o.geometry.bounds))
    if options.max_per_chip is not None:
        extent = [o.size**0.5 if o.kind == Kind.POLYGON else o.size for o in found]
        largest = sorted(range(len(found)), key=lambda n: -extent[n])[: options.max_per_chip]
        found = [found[n] for n in sorted(largest)]
    return found


def clip_feature(feature: Feature, chip: Box) -> list[shapely.Geometry]:
    """What of a feature lies in a chip, in single parts of its own dimension."""
    x0, y0, x1, y1 = chip
    g = feature.geometry
    if feature.kind == Kind.POINT:
        return [g] if x0 <= g.x < x1 and y0 < g.y <= y1 else []
    left, bottom, right, top = g.bounds
    if left > x1 or right < x0 or bottom > y1 or top < y0:
        return []
    if x0 <= left and right <= x1 and y0 <= bottom and top <= y1:
        pieces = [g]
    else:
        pieces = single_parts(g.intersection(shapely.box(*chip)))
        if feature.kind == Kind.LINE:
            # Overlay cuts a line also where it touches the border from inside.
            lines = MultiLineString([p for p in pieces if p.geom_type == "LineString"])
            pieces = single_parts(shapely.line_merge(lines, directed=True))
    if feature.kind == Kind.LINE:
        return [p for p in pieces if p.geom_type == "LineString" and p.length >= SLIVER_M]
    return [p for p in pieces if p.geom_type == "Polygon" and p.area >= SLIVER_M2]


def walk_clip(line: LineString, chip: Box) -> list[list[tuple[float, float]]]:
    """Pieces of a line in a closed square, segment after segment (Liang and Barsky 1984)."""
    x0, y0, x1, y1 = chip
    pieces: list[list[tuple[float, float]]] = []
    last_inside = False
    for (ax, ay), (bx, by) in itertools.pairwise(line.coords):
        enter, leave = 0.0, 1.0
        for p, q in (
            (ax - bx, ax - x0),
            (bx - ax, x1 - ax),
            (ay - by, ay - y0),
            (by - ay, y1 - ay),
        ):
            if p == 0 and q < 0:
                leave = -1.0
            elif p < 0:
                enter = max(enter, q / p)
            elif p > 0:
                leave = min(leave, q / p)
        if enter > leave:
            last_inside = False
            continue
        start = (ax + enter * (bx - ax), ay + enter * (by - ay))
        end = (bx, by) if leave == 1.0 else (ax + leave * (bx - ax), ay + leave * (by - ay))
        if last_inside and enter == 0.0:
            pieces[-1].append(end)
        else:
            pieces.append([start, end])
        last_inside = leave == 1.0
    return [p for p in pieces if LineString(p).length >= SLIVER_M]


# ----------------------------------------------------------------------------------- relations

_INVERSE = {
    Relation.COVERS: Relation.COVERED_BY,
    Relation.COVERED_BY: Relation.COVERS,
    Relation.CONTAINS_POINT: Relation.WITHIN,
    Relation.WITHIN: Relation.CONTAINS_POINT,
}


def relation_of(a: shapely.Geometry, b: shapely.Geometry) -> Relation | None:
    """Relation of a to b from their DE-9IM matrix; a is of the same or higher dimension."""
    matrix = shapely.relate(a, b)
    interiors, a_outside, b_outside = matrix[0], matrix[2::3][:2], matrix[6:8]
    if matrix[:2] + matrix[3:5] == "FFFF":
        return None
    if a.geom_type == b.geom_type == "Point":
        return Relation.EQUALS
    if interiors == "F":
        return Relation.TOUCHES
    if b.geom_type == "Point":
        return Relation.CONTAINS_POINT
    if a_outside == b_outside == "FF":
        return Relation.EQUALS
    if b_outside == "FF":
        return Relation.COVERS
    if a_outside == "FF":
        return Relation.COVERED_BY
    if int(interiors) < max(shapely.get_dimensions(a), shapely.get_dimensions(b)):
        return Relation.CROSSES
    return Relation.OVERLAPS


def relations(geometry: Sequence[shapely.Geometry]) -> dict[tuple[int, int], Relation]:
    """Every ordered pair that has a relation by its matrix, self edges included; no near ones."""
    found = {(n, n): Relation.SELF for n in range(len(geometry))}
    bounds = shapely.bounds(np.array(geometry, object)).reshape(-1, 4)
    dimension = [shapely.get_dimensions(g) for g in geometry]
    for i, j in _boxes_meet(bounds):
        a, b = (i, j) if dimension[i] >= dimension[j] else (j, i)
        relation = relation_of(geometry[a], geometry[b])
        if relation is not None:
            found[a, b] = relation
            found[b, a] = _INVERSE.get(relation, relation)
    return found


def _boxes_meet(bounds: NDArray[np.float64]) -> Iterator[tuple[int, int]]:
    x0, y0, x1, y1 = bounds.T
    for i, (left, bottom, right, top) in enumerate(bounds.tolist()):
        meet = (x0 <= right) & (x1 >= left) & (y0 <= top) & (y1 >= bottom)
        yield from ((i, j) for j in np.flatnonzero(meet).tolist() if j > i)


def near_faults(points: Sequence[tuple[float, float]], edges: set[tuple[int, int]]) -> list[str]:
    """What is wrong with the Delaunay `edges` among points (both directions given), in words.

    Where four or more places lie on one empty circle within a micrometre, any triangulation of
    them will do: then edges may be there that `_empty_circle` allows, and those of the choice may
    be missing, but there must be as many as a triangulation has.
    """
    copies: dict[tuple[float, float], list[int]] = {}
    for n, place in enumerate(points):
        copies.setdefault(place, []).append(n)
    places = list(copies)
    index = {place: n for n, place in enumerate(places)}
    between = {(index[points[p]], index[points[q]]) for p, q in edges}
    faults = []
    if {(p, q) for a, b in between for p in copies[places[a]] for q in copies[places[b]]} != edges:
        faults.append("points at one place do not share their neighbours")
    if len(places) < 4:
        return faults + (["near edges among fewer than four places"] if edges else [])
    row = _row_of(places)
    if row is not None:
        strung = {pair for a, b in itertools.pairwise(row) for pair in ((a, b), (b, a))}
        return faults + ([] if strung == between else ["a row of points is not strung"])

    found = {(a, b) for a, b in between if a < b}
    required, total = _delaunay(places)
    if required - found:
        faults.append(f"{len(required - found)} Delaunay edges are missing")
    wrong = [pair for pair in found - required if not _empty_circle(places, pair)]
    if wrong:
        faults.append(f"{len(wrong)} edges are not Delaunay")
    if len(found) != total:
        faults.append(f"{len(found)} edges, but a triangulation has {total}")
    return faults


def _row_of(places: list[tuple[float, float]]) -> list[int] | None:
    """The places along their line, if they lie within a micrometre of one."""
    xy = np.array(places) - places[0]
    away = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))
    a, b = np.unravel_index(away.argmax(), away.shape)
    direction = (xy[b] - xy[a]) / away[a, b]
    off = np.abs((xy - xy[a]) @ np.array([-direction[1], direction[0]]))
    return np.argsort(xy @ direction, kind="stable").tolist() if off.max() <= 1e-6 else None


def _delaunay(places: list[tuple[float, float]]) -> tuple[set[tuple[int, int]], int]:
    """Edges that every Delaunay triangulation of some places has, and how many each has."""
    xy = np.array(places) - places[0]
    triangulation = Delaunay(xy)
    assert not len(triangulation.coplanar), "scipy left places out"
    apexes: dict[tuple[int, int], list[int]] = {}
    for triangle in triangulation.simplices.tolist():
        for a, b in itertools.combinations(sorted(triangle), 2):
            apexes.setdefault((a, b), []).append(sum(triangle) - a - b)
    sure = {
        pair for pair, ends in apexes.items()
        if len(ends) == 1 or not _on_one_circle(*(places[n] for n in (*pair, *ends)))
    }  # fmt: skip
    return sure, len(apexes)


def _on_one_circle(*four: tuple[float, float]) -> bool:
    """Whether the last of four places lies within a micrometre of the others' circle."""
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = [map(Fraction, p) for p in four]
    rows = [(x - dx, y - dy) for x, y in ((ax, ay), (bx, by), (cx, cy))]
    lifted = [(x, y, x * x + y * y) for x, y in rows]
    (p, q, r), (s, t, u), (v, w, z) = lifted
    value = p * (t * z - u * w) - q * (s * z - u * v) + r * (s * w - t * v)
    turn = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    far = max(r, u, z)
    return abs(float(value)) <= 1e-6 * abs(float(turn)) * float(far) ** 0.5


def _empty_circle(places: list[tuple[float, float]], pair: tuple[int, int]) -> bool:
    """Whether some circle through two places holds no other one by more than a micrometre.

    Its centre lies t along the bisector; every other place bounds t from one side.
    """
    (ax, ay), (bx, by) = (tuple(map(Fraction, places[n])) for n in pair)
    mx, my, nx, ny = (ax + bx) / 2, (ay + by) / 2, ay - by, bx - ax
    radius = (nx * nx + ny * ny) / 4
    low, high = -math.inf, math.inf
    for n, place in enumerate(places):
        if n in pair:
            continue
        ux, uy = Fraction(place[0]) - mx, Fraction(place[1]) - my
        square, side = ux * ux + uy * uy, ux * nx + uy * ny
        slack = 1e-6 * (float(square) ** 0.5 + float(radius) ** 0.5)
        room = float(square - radius) + slack
        if side > 0:
            high = min(high, room / (2 * float(side)))
        elif side < 0:
            low = max(low, room / (2 * float(side)))
        elif room < 0:
            return False
    return low <= high


# ----------------------------------------------------------------------- anchors and coverage


def anchors(geometry: shapely.Geometry) -> list[list[tuple[float, float]]]:
    """Four anchors in metres; for each, every choice that is as good as the best within 1e-7 m.

    None where the line that carries it lies between vertices less than 1e-7 m apart.
    """
    centre = geometry.centroid
    middle = (centre.x, centre.y)
    if geometry.geom_type == "Point":
        return [[middle]] * 4
    if geometry.geom_type == "LineString":
        first, last = geometry.coords[0], geometry.coords[-1]
        return [[middle], [first], [last], [last]]
    x0, y0, x1, y1 = geometry.bounds
    vertices = shapely.get_coordinates(geometry)
    tall = y1 - y0 > x1 - x0
    # y counts down in a chip: a tall polygon's first sixth is the northern one.
    low, high, own = (-y1, -y0, -vertices[:, 1]) if tall else (x0, x1, vertices[:, 0])
    choices: list[list[tuple[float, float]]] = []
    for share, across in ((1 / 6, 1 / 3), (1 / 2, 2 / 3), (5 / 6, 1 / 3)):
        at = low + share * (high - low)
        if len(np.unique(own[np.abs(own - at) < 1e-7])) > 1:
            choices.append([])
            continue
        lines = {_off_vertices(at + hair, at, own) for hair in (-1e-7, 0.0, 1e-7)}
        choices.append([p for t in lines for p in _widest(geometry, t, across, tall)])
    return [*choices, [middle]]


def _off_vertices(side: float, at: float, own: NDArray[np.float64]) -> float:
    """`at` kept a sixteenth off the vertices about `side`."""
    if not own.min() <= side < own.max():
        return at
    below, above = float(own[own <= side].max()), float(own[own > side].min())
    margin = (above - below) / 16
    return min(max(at, below + margin), above - margin)


def _widest(geometry: Polygon, at: float, across: float, tall: bool) -> list[tuple[float, float]]:
    """The places `across` the widest stretches of a polygon on its line at `at`."""
    x0, y0, x1, y1 = geometry.bounds
    line = LineString([(x0 - 1, -at), (x1 + 1, -at)] if tall else [(at, y1 + 1), (at, y0 - 1)])
    stretches = [p for p in single_parts(geometry.intersection(line)) if p.length]
    widest = max((p.length for p in stretches), default=0.0)
    return [_along(p, across, tall) for p in stretches if p.length >= widest - 1e-7]


def _along(stretch: LineString, share: float, tall: bool) -> tuple[float, float]:
    x0, y0, x1, y1 = stretch.bounds
    return (x0 + share * (x1 - x0), y0) if tall else (x0, y1 - share * (y1 - y0))


def patch_box(chip: Box, patches: int, n: int) -> Box:
    """Metres of a patch of a chip; row-major, y down."""
    row, column = divmod(n, patches)
    w, h = (chip[2] - chip[0]) / patches, (chip[3] - chip[1]) / patches
    left, top = chip[0] + column * w, chip[3] - row * h
    return (left, top - h, left + w, top)


def coverage(geometry: shapely.Geometry, chip: Box, patches: int) -> dict[int, float]:
    """Share of every patch that an object meets: of the patch's area, or of the line's length."""
    left, bottom, right, top = geometry.bounds
    shares = {}
    for n in range(patches**2):
        x0, y0, x1, y1 = patch_box(chip, patches, n)
        if left > x1 or right < x0 or bottom > y1 or top < y0:
            continue
        row, column = divmod(n, patches)
        if geometry.geom_type == "Point":
            share = float(
                (x0 <= geometry.x < x1 or (column == patches - 1 and geometry.x == x1))
                and (y0 < geometry.y <= y1 or (row == patches - 1 and geometry.y == y0))
            )
        elif geometry.geom_type == "Polygon":
            share = geometry.intersection(shapely.box(x0, y0, x1, y1)).area / (
                (x1 - x0) * (y1 - y0)
            )
        else:
            # A stretch on a border belongs to the patch to the right or below, or to the last.
            not_ours = []
            if column < patches - 1:
                not_ours.append(LineString([(x1, y0), (x1, y1)]))
            if row < patches - 1:
                not_ours.append(LineString([(x0, y0), (x1, y0)]))
            square = shapely.box(x0, y0, x1, y1)
            share = 0.0
            for ends in itertools.pairwise(geometry.coords):
                part = LineString(ends).intersection(square)
                share += part.length - sum(part.intersection(e).length for e in not_ours)
            share /= geometry.length
        if share > 0:
            shares[n] = share
    return shares


# -------------------------------------------------------------------------------------- labels


def drawn(features: Iterable[Feature]) -> list[tuple[shapely.Geometry, int]]:
    """Areas to draw with their classes, in drawing order; lines as bands of their width."""
    areas = []
    for f in features:
        if f.osm_class and f.kind == Kind.POLYGON:
            areas.append((f.geometry, f.osm_class))
        elif f.osm_class and f.kind == Kind.LINE and f.width_m:
            band = f.geometry.buffer(
                f.width_m / 2, quad_segs=4, cap_style="flat", join_style="round"
            )
            areas.append((band, f.osm_class))
    return sorted((a for a in areas if not a[0].is_empty), key=lambda a: a[1])


def _meeting(
    areas: Iterable[tuple[shapely.Geometry, int]], chip: Box
) -> list[tuple[shapely.Geometry, int]]:
    x0, y0, x1, y1 = chip
    return [
        (g, c) for g, c in areas
        if g.bounds[0] < x1 and g.bounds[2] > x0 and g.bounds[1] < y1 and g.bounds[3] > y0
    ]  # fmt: skip


def raster_by_rasterio(
    areas: Iterable[tuple[shapely.Geometry, int]], chip: Box, cells: int
) -> NDArray[np.uint8]:
    """Classes of `cells` x `cells` cells of one chip, y down, drawn by rasterio."""
    raster = np.zeros((cells, cells), np.uint8)
    shapes = _meeting(areas, chip)
    if shapes:
        rasterize(shapes, out=raster, transform=from_bounds(*chip, cells, cells))
    return raster


def raster_by_centres(
    areas: Iterable[tuple[shapely.Geometry, int]], chip: Box, cells: int
) -> NDArray[np.uint8]:
    """As `raster_by_rasterio`, by asking for every centre of a cell whether it is in the area."""
    x0, y0, x1, y1 = chip
    x = x0 + (np.arange(cells) + 0.5) * (x1 - x0) / cells
    y = y1 - (np.arange(cells) + 0.5) * (y1 - y0) / cells
    raster = np.zeros((cells, cells), np.uint8)
    for g, c in _meeting(areas, chip):
        shapely.prepare(g)
        raster[shapely.contains_xy(g, x[None, :], y[:, None])] = c
    return raster


def pixel_labels(raster2x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The commonest of each pixel's four half pixels, ties by the pattern of the contract."""
    size = len(raster2x) // 2
    quads = raster2x.reshape(size, 2, size, 2).transpose(0, 2, 1, 3).reshape(size, size, 4)
    label = np.zeros((size, size), np.uint8)
    for y, x in np.ndindex(size, size):
        four = quads[y, x]
        if (four == four[0]).all():
            label[y, x] = four[0]
            continue
        counts = Counter(four.tolist())
        best = [c for c, n in counts.items() if n == max(counts.values())]
        label[y, x] = max(best) if (y + 2 * x) % 4 < 2 else min(best)
    return label


def patch_counts(raster2x: NDArray[np.uint8], patches: int, classes: int) -> NDArray[np.int64]:
    """Half pixels of each class in each patch [patches, patches, classes]."""
    side = len(raster2x) // patches
    counts = np.zeros((patches, patches, classes), np.int64)
    for row, column in np.ndindex(patches, patches):
        part = raster2x[row * side : (row + 1) * side, column * side : (column + 1) * side]
        counts[row, column] = np.bincount(part.ravel(), minlength=classes + 1)[1:]
    return counts
