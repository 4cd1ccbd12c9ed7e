"""Anchors against shapely's predicates, one object at a time."""

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.anchors import build_anchors

CHIP = np.array([[0.0, 0.0, 10.0, 10.0]])
UTM_CHIP = np.array([500_000.0, 5_000_000.0, 502_240.0, 5_002_240.0])


def anchors(geometry, bounds=CHIP, chip=None):
    geometry = np.array(geometry, dtype=object)
    kind = shapely.get_dimensions(geometry).astype(np.uint8)
    chip = np.zeros(len(geometry), np.int64) if chip is None else np.asarray(chip, np.int64)
    found = build_anchors(geometry, kind, chip, bounds)
    assert found.dtype == np.float32
    assert found.shape == (len(geometry), 4, 2)
    assert (found >= 0).all()
    assert (found <= 1).all()
    return found


def metres(anchor, bounds):
    """Back to UTM, points [M, 4]."""
    x_min, y_min, x_max, y_max = bounds
    xy = anchor.astype(float)
    return shapely.points(
        x_min + xy[..., 0] * (x_max - x_min), y_max - xy[..., 1] * (y_max - y_min)
    )


def test_a_point_is_itself_four_times_with_y_down():
    assert anchors([shapely.Point(2, 9)])[0] == pytest.approx(np.tile([0.2, 0.1], (4, 1)))


def test_a_line_is_its_centroid_its_start_and_twice_its_end():
    line = shapely.LineString([(0, 10), (10, 10), (10, 0)])
    expected = [[0.75, 0.25], [0, 0], [1, 1], [1, 1]]
    assert anchors([line])[0] == pytest.approx(np.array(expected))
    assert anchors([line.reverse()])[0] == pytest.approx(np.array(expected)[[0, 2, 1, 1]])


def test_a_closed_line_starts_and_ends_at_one_place():
    ring = shapely.LineString([(2, 2), (4, 2), (4, 4), (2, 4), (2, 2)])
    expected = [[0.3, 0.7], [0.2, 0.8], [0.2, 0.8], [0.2, 0.8]]
    assert anchors([ring])[0] == pytest.approx(np.array(expected))


def test_a_rectangle_has_three_points_along_its_longer_side_and_its_centroid():
    expected = [[1 / 6, 0.9 + 0.1 / 3], [1 / 2, 0.9 + 0.2 / 3], [5 / 6, 0.9 + 0.1 / 3], [0.5, 0.95]]
    assert anchors([shapely.box(0, 0, 10, 1)])[0] == pytest.approx(np.array(expected))
    upright = np.array(expected)[:, ::-1] - [0.9, 0]
    assert anchors([shapely.box(0, 0, 1, 10)])[0] == pytest.approx(upright)


@st.composite
def polygons(draw):
    places = st.lists(
        st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=3, max_size=8, unique=True
    )
    shell, hole = (shapely.make_valid(shapely.Polygon(draw(places))) for _ in range(2))
    parts = shapely.get_parts(shell.difference(hole))
    return [g for g in parts if g.geom_type == "Polygon" and not g.is_empty]


@settings(max_examples=50, deadline=None)
@given(st.lists(polygons(), min_size=1, max_size=4))
def test_interior_points_lie_strictly_inside_polygons_with_holes_and_notches(parts):
    geometry = [g for part in parts for g in part]
    for g, points in zip(geometry, metres(anchors(geometry), CHIP[0]), strict=True):
        assert all(g.contains(p) for p in points[:3]), g.wkt
        assert points[3].distance(g.centroid) < 1e-5
        assert len({p.wkt for p in points[:3]}) == 3


def test_interior_points_of_random_polygons_at_utm_coordinates_are_inside():
    rng = np.random.default_rng(0)
    angle = np.sort(rng.uniform(0, 2 * np.pi, (300, 15)), axis=1)
    radius = rng.uniform(3, 400, (300, 1, 1)) * rng.uniform(0.2, 1, (300, 15, 1))
    centre = rng.uniform(500, 1700, (300, 1, 2)) + UTM_CHIP[:2]
    stars = shapely.polygons(centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1))
    stars = stars[shapely.is_valid(stars)]
    points = metres(anchors(stars, UTM_CHIP[None]), UTM_CHIP)
    # float32 resolves 0.1 mm of this chip.
    assert shapely.distance(stars[:, None], points[:, :3]).max() < 2e-4
    assert shapely.contains(stars[:, None], points[:, :3]).mean() > 0.99
    spread = np.ptp(shapely.get_coordinates(points[:, :3]).reshape(-1, 3, 2), axis=1).max(axis=1)
    sides = np.diff(shapely.bounds(stars).reshape(-1, 2, 2), axis=1)[:, 0].max(axis=1)
    assert (spread > 0.5 * sides).all()


@pytest.mark.parametrize(
    "wkt",
    [
        "POLYGON ((4 0, 6 0, 6 5, 10 5, 10 10, 0 10, 0 5, 4 5, 4 0))",
        "POLYGON ((0 0, 10 0, 10 10, 9 10, 9 1, 1 1, 1 10, 0 10, 0 0))",
        "POLYGON ((0 0, 10 0, 10 10, 0 10, 0 0), (1 1, 1 9, 9 9, 9 1, 1 1))",
        "POLYGON ((0 0, 10 10, 10 9.999, 0.001 0, 0 0))",
        "POLYGON ((5 0, 10 5, 5 10, 0 5, 5 0), (5 2, 2 5, 5 8, 8 5, 5 2))",
    ],
)
def test_interior_points_are_inside_bent_hollow_and_thin_polygons(wkt):
    polygon = shapely.from_wkt(wkt)
    points = metres(anchors([polygon]), CHIP[0])[0, :3]
    assert shapely.contains(polygon, points).all()


def test_where_a_ring_starts_and_how_it_turns_does_not_matter():
    corners = [(1, 1), (7, 2), (9, 8), (4, 5), (2, 9)]
    ways = [
        shapely.Polygon(way[n:] + way[:n]) for way in (corners, corners[::-1]) for n in range(5)
    ]
    found = anchors(ways)
    np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), atol=1e-6)


def test_an_object_has_the_same_anchors_whatever_else_is_in_the_shard():
    geometry = [
        shapely.Point(1, 1),
        shapely.LineString([(0, 0), (5, 5)]),
        shapely.box(0, 0, 4, 3),
        shapely.LineString([(3, 3), (9, 1), (9, 9)]),
        shapely.Polygon([(1, 1), (9, 2), (5, 9)]),
    ]
    bounds = np.concatenate([CHIP, CHIP + 0, CHIP * 2])
    together = anchors(geometry, bounds, [0, 0, 1, 1, 2])
    for n, chip in enumerate([0, 0, 1, 1, 2]):
        assert (together[n] == anchors(geometry[n : n + 1], bounds[chip : chip + 1])[0]).all()


def test_a_vertex_outside_by_rounding_is_clamped_and_by_more_is_refused():
    assert anchors([shapely.Point(10 + 1e-9, -1e-9)])[0, 0].tolist() == [1, 1]
    with pytest.raises(ValueError, match="reaches out of the chip"):
        anchors([shapely.Point(10.01, 5)])


def test_no_objects_have_no_anchors():
    assert anchors([]).shape == (0, 4, 2)
    assert anchors([], np.empty((0, 4))).shape == (0, 4, 2)
