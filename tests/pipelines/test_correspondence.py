"""Correspondence against shapely's intersection with one patch at a time."""

import itertools

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.correspondence import build_correspondence, patch_shares

CHIP = np.array([[0.0, 0.0, 8.0, 8.0]])
UTM_CHIP = np.array([[500_160.0, 4_999_680.0, 502_400.0, 5_001_920.0]])


def kinds(geometry):
    return shapely.get_dimensions(geometry).astype(np.uint8)


def shares(geometry, bounds=CHIP, chip=None, patches=4):
    """[M, patches ** 2], and the promises of the layout kept."""
    geometry = np.array(geometry, dtype=object)
    chip = np.zeros(len(geometry), np.int64) if chip is None else np.asarray(chip, np.int64)
    offset, patch, share = patch_shares(geometry, kinds(geometry), chip, bounds, patches)
    table = build_correspondence(geometry, kinds(geometry), chip, bounds, patches)
    assert offset.tolist() == table["patch_offset"].tolist()
    assert patch.tolist() == table["patch"].tolist()
    assert (table["patch"].dtype, table["patch_weight"].dtype) == (np.uint16, np.uint8)
    assert (table["patch_weight"] >= 1).all()
    assert np.abs(table["patch_weight"] / 255 - share).max(initial=0) <= 1 / 255
    dense = np.zeros((len(geometry), patches**2))
    for m, (first, last) in enumerate(itertools.pairwise(offset)):
        assert (np.diff(patch[first:last]) > 0).all()
        dense[m, patch[first:last]] = share[first:last]
    assert (share > 0).all()
    assert (share <= 1).all()
    return dense


def expected_shares(geometry, bounds=CHIP, chip=None, patches=4):
    """From the intersection of every object with every patch, one at a time."""
    chip = [0] * len(geometry) if chip is None else chip
    expected = np.zeros((len(geometry), patches**2))
    for m, g in enumerate(geometry):
        x_min, y_min, x_max, y_max = bounds[chip[m]]
        w, h = (x_max - x_min) / patches, (y_max - y_min) / patches
        for row, column in itertools.product(range(patches), range(patches)):
            box = shapely.box(
                x_min + column * w, y_max - (row + 1) * h, x_min + (column + 1) * w, y_max - row * h
            )
            part = shapely.intersection(g, box)
            expected[m, row * patches + column] = (
                part.area / box.area if g.geom_type == "Polygon" else part.length / g.length
            )
    return expected


def star(rng, centre, radius, corners=12):
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    reach = radius * rng.uniform(0.2, 1, (corners, 1))
    return shapely.make_valid(
        shapely.Polygon(centre + reach * np.column_stack([np.cos(angle), np.sin(angle)]))
    )


def clipped_objects(rng, bounds, n):
    """Polygons (some with holes) and lines of all sizes, cut by the chip's border."""
    x_min, y_min, x_max, y_max = bounds
    size = x_max - x_min
    found = []
    for _ in range(n):
        centre = rng.uniform([x_min, y_min], [x_max, y_max])
        radius = size * rng.choice([0.01, 0.1, 0.5, 1.0])
        polygon = star(rng, centre, radius)
        found += [polygon, polygon.difference(star(rng, centre, radius / 2, 5))]
        found.append(
            shapely.LineString(centre + np.cumsum(rng.normal(0, radius / 3, (9, 2)), axis=0))
        )
    cut = shapely.get_parts(shapely.intersection(found, shapely.box(*bounds)))
    return cut[np.isin(shapely.get_type_id(cut), (1, 3)) & ~shapely.is_empty(cut)]


def test_shares_are_the_areas_and_lengths_of_intersections_with_the_patches():
    geometry = clipped_objects(np.random.default_rng(1), CHIP[0], 20)
    assert {"Polygon", "LineString"} == {g.geom_type for g in geometry}
    assert any(len(g.interiors) for g in geometry if g.geom_type == "Polygon")
    for patches in (1, 4, 7):
        np.testing.assert_allclose(
            shares(geometry, patches=patches),
            expected_shares(geometry, patches=patches),
            rtol=1e-9,
            atol=1e-12,
        )


def test_shares_at_utm_coordinates_agree_to_the_rounding_of_metres():
    geometry = clipped_objects(np.random.default_rng(2), UTM_CHIP[0], 12)
    np.testing.assert_allclose(
        shares(geometry, UTM_CHIP, patches=14),
        expected_shares(geometry, UTM_CHIP, patches=14),
        rtol=0,
        atol=1e-9,
    )


def test_chips_of_a_shard_are_measured_each_in_its_own_bounds():
    rng = np.random.default_rng(3)
    bounds = np.array([[0.0, 0.0, 8.0, 8.0], [2.0, -3.0, 12.0, 2.0], [0.0, 0.0, 8.0, 8.0]])
    parts = [clipped_objects(rng, b, 4) for b in bounds]
    chip = np.repeat([0, 1, 2], [len(p) for p in parts])
    geometry = np.concatenate(parts)
    np.testing.assert_allclose(
        shares(geometry, bounds, chip), expected_shares(geometry, bounds, chip), atol=1e-12
    )


@st.composite
def lattice_polygons(draw):
    """Valid polygons whose vertices lie on quarter patches, borders and corners included."""
    places = st.lists(
        st.tuples(st.integers(0, 16), st.integers(0, 16)), min_size=3, max_size=7, unique=True
    )
    shell = shapely.Polygon(np.array(draw(places)) / 2)
    hole = shapely.Polygon(np.array(draw(places)) / 2)
    polygons = shapely.get_parts(shapely.make_valid(shell).difference(shapely.make_valid(hole)))
    return [g for g in polygons if g.geom_type == "Polygon" and not g.is_empty]


@settings(max_examples=50, deadline=None)
@given(st.lists(lattice_polygons(), min_size=1, max_size=4))
def test_polygons_with_edges_on_patch_borders_have_their_exact_shares(parts):
    geometry = list(itertools.chain(*parts))
    found = shares(geometry)
    np.testing.assert_allclose(found, expected_shares(geometry), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1) * 4, shapely.area(geometry), rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 16), st.integers(0, 16)), min_size=2, max_size=6, unique=True)
)
def test_the_shares_of_a_line_add_up_to_one_even_along_patch_borders(places):
    line = shapely.LineString(np.array(places) / 2)
    np.testing.assert_allclose(shares([line]).sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(shares([line]), shares([line.reverse()]), rtol=1e-12)


def test_rings_may_turn_either_way():
    shell, hole = [(1, 1), (7, 1), (7, 7), (1, 7)], [(2, 2), (6, 2), (6, 6), (2, 6)]
    ways = [
        shapely.Polygon(s, [h])
        for s in (shell, shell[::-1])
        for h in (hole, hole[::-1], hole[2:] + hole[:2])
    ]
    corner, side, hole = 0.25, 0.5, 0.0
    expected = [
        [corner, side, side, corner],
        [side, hole, hole, side],
        [side, hole, hole, side],
        [corner, side, side, corner],
    ]
    for table in shares(ways):
        np.testing.assert_allclose(table, np.ravel(expected))


def test_an_object_that_fills_the_chip_covers_every_patch_whole():
    assert (shares([shapely.box(0, 0, 8, 8)]) == 1).all()
    table = build_correspondence(
        np.array([shapely.box(*UTM_CHIP[0])]), np.array([2], np.uint8), np.array([0]), UTM_CHIP, 14
    )
    assert table["patch"].tolist() == list(range(196))
    assert (table["patch_weight"] == 255).all()


@pytest.mark.parametrize(
    ("place", "patch"),
    [
        ((0.0, 8.0), 0),
        ((2.0, 8.0), 1),
        ((0.0, 6.0), 4),
        ((2.0, 6.0), 5),
        ((1.9, 6.1), 0),
        ((8.0, 8.0), 3),
        ((8.0, 0.0), 15),
        ((0.0, 0.0), 12),
    ],
)
def test_a_point_on_a_border_belongs_to_the_patch_right_and_below(place, patch):
    assert np.flatnonzero(shares([shapely.Point(place)])).tolist() == [patch]
    assert shares([shapely.Point(place)]).max() == 1


@pytest.mark.parametrize(
    ("line", "patches"),
    [
        ([(2, 8), (2, 6)], [1]),
        ([(8, 8), (8, 4)], [3, 7]),
        ([(0, 6), (4, 6)], [4, 5]),
        ([(0, 0), (2, 0)], [12]),
        ([(4, 4), (2, 6)], [5]),
    ],
)
def test_a_line_along_a_border_counts_once_in_the_patch_right_or_below(line, patches):
    for way in (line, line[::-1]):
        table = shares([shapely.LineString(way)])[0]
        assert np.flatnonzero(table).tolist() == patches
        np.testing.assert_allclose(table[patches], 1 / len(patches))


def test_a_sliver_keeps_a_weight_of_one_at_least():
    sliver = shapely.box(1, 1, 1 + 1e-6, 1.5)
    table = build_correspondence(
        np.array([sliver]), np.array([2], np.uint8), np.array([0]), CHIP, 4
    )
    assert table["patch"].tolist() == [12]
    assert table["patch_weight"].tolist() == [1]


def test_a_polygon_that_ends_on_a_border_does_not_reach_the_next_patch():
    assert np.flatnonzero(shares([shapely.box(2, 2, 4, 4)])).tolist() == [9]


def test_a_shard_without_objects_has_an_empty_correspondence():
    empty = np.empty(0, object), np.empty(0, np.uint8), np.empty(0, np.int64)
    for bounds in (np.empty((0, 4)), CHIP):
        table = build_correspondence(*empty, bounds, 14)
        assert table["patch_offset"].tolist() == [0]
        assert len(table["patch"]) == len(table["patch_weight"]) == 0


def test_an_object_beyond_its_chip_or_in_parts_is_refused():
    outside = np.array([shapely.box(1, 1, 9, 2)])
    with pytest.raises(ValueError, match="reaches out of the chip"):
        patch_shares(outside, np.array([2], np.uint8), np.array([0]), CHIP, 4)
    parts = np.array([shapely.from_wkt("MULTILINESTRING ((0 0, 1 1), (2 2, 3 3))")])
    with pytest.raises(ValueError, match="split multiparts"):
        patch_shares(parts, np.array([1], np.uint8), np.array([0]), CHIP, 4)
