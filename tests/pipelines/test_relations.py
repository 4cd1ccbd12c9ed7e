"""Relations against shapely's DE-9IM matrix of one pair at a time, exact Delaunay, golden edges."""

import itertools
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.relations import build_relations
from schemas.layout import Kind, Relation

PAIRS = (
    "a1085095888_S2_20",
    "a472140250_FI_21",
    "a702502933_US_21",
    "n4503852781_DE_",
    "w221548378_US_21",
)
UTM = np.array([500_000.0, 5_000_000.0])
INVERSE = {
    Relation.COVERS: Relation.COVERED_BY,
    Relation.COVERED_BY: Relation.COVERS,
    Relation.CONTAINS_POINT: Relation.WITHIN,
    Relation.WITHIN: Relation.CONTAINS_POINT,
}


def relation_by_matrix(a: shapely.Geometry, b: shapely.Geometry) -> Relation | None:
    """The relation of a to b from one DE-9IM matrix, no prepared geometry, no bounds."""
    assert not shapely.is_prepared([a, b]).any()
    ii, ib, ie, bi, bb, be, ei, eb, _ = shapely.relate(a, b)
    if ii == ib == bi == bb == "F":
        return None
    points = [g.geom_type == "Point" for g in (a, b)]
    if all(points):
        return Relation.EQUALS
    if ii == "F":
        return Relation.TOUCHES
    if any(points):
        return Relation.WITHIN if points[0] else Relation.CONTAINS_POINT
    target_within, source_within = ei == eb == "F", ie == be == "F"
    if target_within and source_within:
        return Relation.EQUALS
    if target_within:
        return Relation.COVERS
    if source_within:
        return Relation.COVERED_BY
    dimensions = {"LineString": 1, "Polygon": 2}
    if int(ii) < max(dimensions[a.geom_type], dimensions[b.geom_type]):
        return Relation.CROSSES
    return Relation.OVERLAPS


def kinds(geometry: np.ndarray) -> np.ndarray:
    return shapely.get_dimensions(geometry).astype(np.uint8)


def edges_of(geometry, chip=None, chips=1):
    """{(source, target): relation} with shard-wide indices, and the layout's own promises kept."""
    geometry = np.array(geometry, dtype=object)
    chip = np.zeros(len(geometry), np.int64) if chip is None else np.asarray(chip, np.int64)
    graph = build_relations(geometry, chip, kinds(geometry), chips)
    offset, edge, relation = graph["edge_offset"], graph["edge"], graph["relation"]
    assert (offset.dtype, edge.dtype, relation.dtype) == (np.int64, np.int32, np.uint8)
    assert offset.shape == (chips + 1,)
    assert offset[0] == 0
    assert offset[-1] == len(edge) == len(relation)
    found = {}
    for n in range(chips):
        rows = [tuple(map(int, row)) for row in edge[offset[n] : offset[n + 1]]]
        assert rows == sorted(set(rows))
        first = int(np.searchsorted(chip, n))
        codes = relation[offset[n] : offset[n + 1]]
        found |= {
            (s + first, t + first): Relation(int(r)) for (s, t), r in zip(rows, codes, strict=True)
        }
    for (s, t), r in found.items():
        assert found[t, s] == INVERSE.get(r, r)
        assert (r == Relation.SELF) == (s == t)
    assert all((n, n) in found for n in range(len(geometry)))
    return found


def expected_edges(geometry, chip=None):
    """As `edges_of`, without near, from every ordered pair."""
    chip = [0] * len(geometry) if chip is None else chip
    expected = {(n, n): Relation.SELF for n in range(len(geometry))}
    by_dimension = sorted(range(len(geometry)), key=lambda n: -shapely.get_dimensions(geometry[n]))
    for s, t in itertools.combinations(by_dimension, 2):
        if chip[s] == chip[t]:
            relation = relation_by_matrix(geometry[s], geometry[t])
            if relation is not None:
                expected[s, t] = relation
                expected[t, s] = INVERSE.get(relation, relation)
    return expected


def without_near(edges):
    return {pair: r for pair, r in edges.items() if r != Relation.NEAR}


def relation(a: str, b: str) -> Relation | None:
    return edges_of(shapely.from_wkt([a, b])).get((0, 1))


SQUARE = "POLYGON ((0 0, 4 0, 4 4, 0 4, 0 0))"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (SQUARE, "POLYGON ((4 1, 6 1, 6 3, 4 3, 4 1))", Relation.TOUCHES),
        (SQUARE, "POLYGON ((4 4, 6 4, 6 6, 4 6, 4 4))", Relation.TOUCHES),
        (SQUARE, "POLYGON ((4 4, 0 4, 0 0, 2 0, 4 0, 4 4))", Relation.EQUALS),
        (SQUARE, "POLYGON ((1 1, 2 1, 2 2, 1 2, 1 1))", Relation.COVERS),
        (SQUARE, "POLYGON ((0 0, 2 0, 2 2, 0 2, 0 0))", Relation.COVERS),
        ("POLYGON ((0 0, 2 0, 2 2, 0 2, 0 0))", SQUARE, Relation.COVERED_BY),
        (SQUARE, "POLYGON ((2 2, 6 2, 6 6, 2 6, 2 2))", Relation.OVERLAPS),
        (SQUARE, "POLYGON ((5 5, 6 5, 6 6, 5 6, 5 5))", None),
        (
            "POLYGON ((0 0, 9 0, 9 9, 0 9, 0 0), (2 2, 6 2, 6 6, 2 6, 2 2))",
            "POLYGON ((2 2, 6 2, 6 6, 2 6, 2 2))",
            Relation.TOUCHES,
        ),
        (
            "POLYGON ((0 0, 9 0, 9 9, 0 9, 0 0), (2 2, 6 2, 6 6, 2 6, 2 2))",
            "POLYGON ((3 3, 4 3, 4 4, 3 4, 3 3))",
            None,
        ),
        (SQUARE, "LINESTRING (0 0, 4 0)", Relation.TOUCHES),
        (SQUARE, "LINESTRING (0 0, 4 0, 4 4, 0 4, 0 0)", Relation.TOUCHES),
        (SQUARE, "LINESTRING (0 0, 4 0, 2 2)", Relation.COVERS),
        (SQUARE, "LINESTRING (1 1, 9 9)", Relation.CROSSES),
        ("LINESTRING (1 1, 9 9)", SQUARE, Relation.CROSSES),
        ("LINESTRING (1 1, 2 2)", SQUARE, Relation.COVERED_BY),
        ("LINESTRING (0 0, 4 4)", "LINESTRING (0 4, 4 0)", Relation.CROSSES),
        ("LINESTRING (0 0, 4 4)", "LINESTRING (2 2, 4 0)", Relation.TOUCHES),
        ("LINESTRING (0 0, 4 4)", "LINESTRING (4 4, 9 0)", Relation.TOUCHES),
        ("LINESTRING (0 0, 4 4)", "LINESTRING (4 4, 2 2, 0 0)", Relation.EQUALS),
        ("LINESTRING (0 0, 4 0)", "LINESTRING (1 0, 3 0)", Relation.COVERS),
        ("LINESTRING (0 0, 4 0)", "LINESTRING (3 0, 6 0)", Relation.OVERLAPS),
        ("LINESTRING (0 0, 4 0)", "LINESTRING (4 0, 6 0)", Relation.TOUCHES),
        ("LINESTRING (0 0, 2 0, 2 2, 0 0)", "LINESTRING (2 0, 2 2, 0 0, 2 0)", Relation.EQUALS),
        ("LINESTRING (0 0, 2 0, 2 2, 0 0)", "POINT (0 0)", Relation.CONTAINS_POINT),
        ("LINESTRING (0 0, 2 0, 2 2)", "POINT (0 0)", Relation.TOUCHES),
        ("LINESTRING (0 0, 2 0, 2 2)", "POINT (2 0)", Relation.CONTAINS_POINT),
        ("POINT (1 0)", "LINESTRING (0 0, 2 0, 2 2)", Relation.WITHIN),
        (SQUARE, "POINT (2 2)", Relation.CONTAINS_POINT),
        ("POINT (2 2)", SQUARE, Relation.WITHIN),
        ("POINT (4 2)", SQUARE, Relation.TOUCHES),
        ("POINT (4 4)", SQUARE, Relation.TOUCHES),
        ("POINT (4 4)", "POINT (4 4)", Relation.EQUALS),
        ("POINT (4 4)", "POINT (4 5)", None),
    ],
)
def test_a_pair_has_the_relation_worked_out_by_hand(a, b, expected):
    assert relation(a, b) == expected
    assert relation(b, a) == INVERSE.get(expected, expected)


def _place(draw):
    return (draw(st.integers(0, 5)), draw(st.integers(0, 5)))


@st.composite
def objects(draw):
    """Valid points, lines (closed and self-crossing ones too), polygons, some with a hole."""
    shape = draw(st.sampled_from(["point", "line", "ring", "box", "frame", "polygon"]))
    if shape == "point":
        return shapely.Point(_place(draw))
    if shape in ("box", "frame"):
        x, y = _place(draw)
        w, h = draw(st.integers(3, 5)), draw(st.integers(3, 5))
        hole = [[(x + 1, y + 1), (x + w - 1, y + 1), (x + w - 1, y + h - 1), (x + 1, y + h - 1)]]
        shell = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
        return shapely.Polygon(shell, hole if shape == "frame" else [])
    least = 2 if shape == "line" else 3
    places = st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=least, max_size=5, unique=True
    )
    vertices = draw(places)
    if shape == "line":
        return shapely.LineString(vertices)
    if shape == "ring":
        return shapely.LineString([*vertices, vertices[0]])
    polygon = shapely.Polygon(vertices)
    return polygon if polygon.is_valid and polygon.area > 0 else shapely.Point(vertices[0])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), objects()), min_size=1, max_size=14),
    st.sampled_from([(1.0, 0.0, 0.0), (0.1, 0.0, 0.0), (7.3, 500_000.1, 5_000_000.7)]),
)
def test_every_pair_of_a_chip_has_the_relation_of_its_matrix(members, frame):
    members = sorted(members, key=lambda member: member[0])
    chip = [member[0] for member in members]
    scale, x, y = frame
    geometry = shapely.transform(
        np.array([member[1] for member in members], dtype=object), lambda xy: xy * scale + [x, y]
    )
    found = edges_of(geometry, chip, chips=4)
    assert without_near(found) == expected_edges(geometry, chip)


def test_a_corner_cut_on_another_polygons_edge_is_judged_like_its_matrix():
    """Clipping puts vertices on edges up to rounding, where fast predicates can differ."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        turn, clip = shapely.Point(0, 0).buffer(50, quad_segs=1), shapely.box(-20, -30, 25, 40)
        angles = rng.uniform(0, 360, 3)
        whole = np.array([shapely.affinity.rotate(turn, angle) for angle in angles], dtype=object)
        lines = shapely.get_exterior_ring(whole)
        cut = shapely.intersection(
            np.r_[
                whole, shapely.linestrings([shapely.get_coordinates(line)[:3] for line in lines])
            ],
            clip,
        )
        pieces = shapely.get_parts(cut)
        geometry = np.r_[whole, pieces[~shapely.is_empty(pieces)]]
        geometry = shapely.transform(geometry, lambda xy: xy * 1.37 + UTM)
        assert without_near(edges_of(geometry)) == expected_edges(geometry)


def random_objects(rng: np.random.Generator, n: int) -> np.ndarray:
    """Objects without exact coincidences: stars, walks and points at UTM coordinates."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, (n, 9)), axis=1)
    radius = rng.uniform(20, 150, (n, 9, 1))
    centre = rng.uniform(0, 1000, (n, 1, 2)) + UTM
    stars = shapely.polygons(centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1))
    walks = shapely.linestrings(centre + np.cumsum(rng.normal(0, 40, (n, 8, 2)), axis=1))
    points = shapely.points(rng.uniform(0, 1000, (n, 2)) + UTM)
    return np.concatenate([stars[shapely.is_valid(stars)], walks, points])


def test_random_objects_have_the_relations_of_their_matrices():
    geometry = random_objects(np.random.default_rng(7), 50)
    found = without_near(edges_of(geometry))
    assert found == expected_edges(geometry)
    assert {Relation.OVERLAPS, Relation.COVERS, Relation.CROSSES, Relation.WITHIN} <= set(
        found.values()
    )


def test_chips_that_overlap_in_coordinates_keep_to_themselves():
    geometry = random_objects(np.random.default_rng(3), 10)
    one = edges_of(geometry)
    both = edges_of(np.concatenate([geometry, geometry]), np.repeat([1, 3], len(geometry)), 5)
    n = len(geometry)
    assert both == one | {(s + n, t + n): r for (s, t), r in one.items()}


def test_a_chip_does_not_depend_on_the_rest_of_its_shard():
    rng = np.random.default_rng(11)
    parts = [random_objects(rng, n) for n in (6, 1, 9)]
    shard = edges_of(np.concatenate(parts), np.repeat([0, 1, 2], [len(p) for p in parts]), 3)
    first = 0
    for part in parts:
        here = {
            (s - first, t - first): r
            for (s, t), r in shard.items()
            if first <= s < first + len(part)
        }
        assert here == edges_of(part)
        first += len(part)


def delaunay_edges(places: list[tuple[float, float]]) -> tuple[set, set]:
    """Edges of every Delaunay triangulation and of at least one, in exact arithmetic.

    An edge is Delaunay if a circle through its ends is empty. Centres of circles through both lie
    on the bisector; every other place bounds the parameter of the centre on one side.
    """
    exact = [(Fraction(x), Fraction(y)) for x, y in places]
    always, possible = set(), set()
    for (i, a), (j, b) in itertools.combinations(enumerate(exact), 2):
        mx, my = (a[0] + b[0]) / 2, (a[1] + b[1]) / 2
        low, high, blocked = None, None, False
        for k, c in enumerate(exact):
            if k in (i, j):
                continue
            side = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
            power = (c[0] - mx) ** 2 + (c[1] - my) ** 2 - (a[0] - mx) ** 2 - (a[1] - my) ** 2
            if side == 0:
                blocked |= power < 0
            elif side > 0:
                high = min(power / (2 * side), power / (2 * side) if high is None else high)
            else:
                low = max(power / (2 * side), power / (2 * side) if low is None else low)
        if blocked:
            continue
        if low is None or high is None or low < high:
            always.add((i, j))
        if low is None or high is None or low <= high:
            possible.add((i, j))
    return always, possible


def near_pairs(places, chip=None, chips=1):
    edges = edges_of(shapely.points(places), chip, chips)
    return {(s, t) for (s, t), r in edges.items() if r == Relation.NEAR and s < t}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=4, max_size=14, unique=True),
    st.sampled_from([np.array([0.0, 0.0]), UTM]),
)
def test_near_points_are_neighbours_in_a_delaunay_triangulation(places, origin):
    always, possible = delaunay_edges(places)
    near = near_pairs(np.array(places) + origin)
    thin = np.linalg.matrix_rank(np.subtract(places, places[0]), tol=1e-9) < 2
    if thin:
        ordered = sorted(range(len(places)), key=lambda n: places[n])
        assert near == {tuple(sorted(pair)) for pair in itertools.pairwise(ordered)}
    else:
        assert always <= near <= possible


def test_near_points_at_utm_coordinates_are_exactly_delaunay():
    rng = np.random.default_rng(5)
    for places in (
        np.round(rng.uniform(0, 300, (30, 2)), 2) + UTM,
        np.concatenate([rng.uniform(0, 2000, (9, 2)), 1000 + rng.uniform(0, 0.02, (9, 2))]),
        np.column_stack([np.arange(15.0), 2 * np.arange(15.0) + rng.normal(0, 1e-4, 15)]) * 99,
    ):
        always, possible = delaunay_edges(places.tolist())
        assert always == possible == near_pairs(places)


def test_three_points_have_no_neighbours_and_four_do():
    places = [(0.0, 0.0), (9.0, 0.0), (0.0, 9.0), (8.0, 7.0)]
    assert not near_pairs(places[:3])
    assert near_pairs(places)


def test_points_at_one_place_count_once_and_share_their_neighbours():
    places = [(0.0, 0.0), (9.0, 0.0), (0.0, 9.0)]
    assert not near_pairs([*places, *places])
    edges = edges_of(shapely.points([*places, (8.0, 7.0), (8.0, 7.0)]))
    assert edges[3, 4] == Relation.EQUALS
    for other in (1, 2):
        assert edges[3, other] == edges[4, other] == Relation.NEAR


@pytest.mark.parametrize("slope", [(1.0, 0.0), (0.0, 1.0), (1.0, 1 / 3), (0.1, -0.7)])
def test_collinear_points_are_neighbours_along_their_line(slope):
    t = np.random.default_rng(2).permutation(np.arange(20) * 13.7)
    places = np.outer(t, slope) + UTM
    order = np.argsort(t)
    assert near_pairs(places) == {tuple(sorted(p)) for p in itertools.pairwise(order.tolist())}


def test_neighbours_do_not_depend_on_the_order_of_cocircular_points():
    grid = np.array(list(itertools.product(range(5), range(5))), float)
    seen = set()
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(len(grid))
        pairs = near_pairs(grid[order])
        seen.add(frozenset(frozenset((int(order[s]), int(order[t]))) for s, t in pairs))
    assert len(seen) == 1


def test_a_shard_without_objects_or_chips_has_an_empty_graph():
    assert edges_of([], chips=0) == {}
    assert edges_of([], chips=3) == {}
    assert edges_of([shapely.Point(1, 2)], [2], chips=4) == {(0, 0): Relation.SELF}


def test_the_objects_are_left_as_they_were():
    geometry = random_objects(np.random.default_rng(1), 5)
    before = shapely.to_wkb(geometry).tolist()
    edges_of(geometry)
    assert shapely.to_wkb(geometry).tolist() == before
    assert not shapely.is_prepared(geometry).any()


SAME_DIMENSION = {
    0: Relation.SELF,
    2: Relation.TOUCHES,
    3: Relation.OVERLAPS,
    4: Relation.COVERS,
    5: Relation.COVERED_BY,
    6: Relation.EQUALS,
}


def golden_relation(source: Kind, target: Kind, code: int) -> Relation:
    """A code of the golden files, whose mixed pairs carry one code in both directions."""
    if source == target == Kind.POINT:
        return Relation.NEAR if code == 1 else Relation.SELF
    if source == target:
        return SAME_DIMENSION[code]
    if Kind.POINT in (source, target):
        inside = Relation.WITHIN if source == Kind.POINT else Relation.CONTAINS_POINT
        return {2: Relation.TOUCHES, 3: inside}[code]
    inside = Relation.COVERED_BY if source == Kind.LINE else Relation.COVERS
    return {2: Relation.TOUCHES, 3: Relation.CROSSES, 4: inside}[code]


def test_real_pairs_have_the_golden_edges(shared: Path):
    golden = np.load(shared / "reference/golden/graph_edges.npz")
    geometry, chip, owners = [], [], []
    for n, pair in enumerate(PAIRS):
        for kind in Kind:
            name = f"{pair}_{kind.name.lower()}.geojson"
            path = shared / "data/pairs" / pair / name
            features = json.loads(path.read_text())["features"] if path.exists() else []
            geometry += [shapely.geometry.shape(f["geometry"]) for f in features]
            owners += [(n, kind, m) for m in range(len(features))]
            chip += [n] * len(features)
    place = {owner: index for index, owner in enumerate(owners)}
    expected = {}
    for n, pair in enumerate(PAIRS):
        for source, target in itertools.product(Kind, Kind):
            key = f"{pair}/corrected/{source.name.lower()}__{target.name.lower()}"
            for (s, t), code in zip(
                golden[f"{key}/edge_index"].T, golden[f"{key}/code"], strict=True
            ):
                ends = place[n, source, int(s)], place[n, target, int(t)]
                expected[ends] = golden_relation(source, target, int(code))

    found = edges_of(geometry, chip, len(PAIRS))

    # The golden files count lines that cross as overlapping.
    kind = kinds(np.array(geometry, dtype=object))
    merged = {
        (s, t): Relation.OVERLAPS if r == Relation.CROSSES and kind[s] == kind[t] else r
        for (s, t), r in found.items()
    }
    assert merged == expected
    assert Counter(merged.values())[Relation.NEAR] == 46
