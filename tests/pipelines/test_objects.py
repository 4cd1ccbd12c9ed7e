"""Objects: against geopandas, and against shapely one geometry at a time."""

import dataclasses
from collections import Counter, defaultdict
from pathlib import Path

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.features import Features, load_features, make_features
from pipelines.objects import SLIVER_M, SLIVER_M2, Objects, clip
from pipelines.osm import Extract
from schemas.config import ObjectOptions
from schemas.errors import GeoLinkError
from schemas.grid import Grid, block_bounds, block_chips, block_of, chip_at, to_lonlat
from schemas.taxonomy import Taxonomy, TaxonomyClass, default_taxonomy

TAXONOMY = default_taxonomy()
ALL = ObjectOptions()


def _class(name: str) -> int:
    return TAXONOMY.names.index(name) + 1


def _features(
    geometry: list[shapely.Geometry], *tags: str, taxonomy: Taxonomy = TAXONOMY
) -> Features:
    """Features that all carry the same tags, with OSM ids 4, 8, 12, ..."""
    n = len(geometry)
    return make_features(
        np.array(geometry, object), np.arange(1, n + 1) * 4, np.arange(n + 1) * len(tags),
        list(tags) * n, taxonomy, np.arange(n), Counter(),
    )  # fmt: skip


def _lattice(side: int, chip_m: float = 8.0) -> NDArray[np.float64]:
    """Bounds of side x side chips from (0, 0) up, north-west first."""
    y, x = np.divmod(np.arange(side * side), side)
    west, south = x * chip_m, (side - 1 - y) * chip_m
    return np.stack([west, south, west + chip_m, south + chip_m], axis=1)


def _random(seed: int, count: int, snapped: bool) -> list[shapely.Geometry]:
    """Valid polygons, lines that cross themselves, and points, 0 to 32 m; perhaps on whole metres,
    where borders are met exactly."""
    rng = np.random.default_rng(seed)
    shapes: list[shapely.Geometry] = []
    while len(shapes) < count:
        size = rng.choice([1.0, 4.0, 20.0])
        xy = rng.uniform(-2, 34, 2) + rng.uniform(-size, size, (rng.integers(1, 9), 2))
        xy = np.round(xy) if snapped else xy
        if len(xy) == 1:
            shapes.append(shapely.Point(xy[0]))
        elif rng.random() < 0.4:
            line = shapely.LineString(xy)
            shapes.append(line if line.is_valid else shapely.Point(xy[0]))
        else:
            hull = shapely.convex_hull(shapely.MultiPoint(xy))
            hole = shapely.Point(xy.mean(axis=0)).buffer(size / 4, 2)
            area = hull.difference(hole) if rng.random() < 0.5 else hull
            shapes += [p for p in shapely.get_parts(area).tolist() if p.area > 0]
    return shapes


def _one_at_a_time(
    features: Features, bounds: NDArray[np.float64]
) -> dict[tuple[int, int], shapely.Geometry]:
    """What of each feature lies in each chip, by one shapely call a pair."""
    out = {}
    for i, b in enumerate(bounds):
        chip = shapely.box(*b)
        for f, geometry in enumerate(features.geometry):
            if geometry.geom_type == "Point":
                if b[0] <= geometry.x < b[2] and b[1] < geometry.y <= b[3]:
                    out[i, f] = geometry
                continue
            part = geometry if chip.covers(geometry) else geometry.intersection(chip)
            whole = [
                p for p in (part.geoms if hasattr(part, "geoms") else [part])
                if not p.is_empty and p.geom_type == geometry.geom_type
                and (p.area >= SLIVER_M2 or (p.area == 0 and p.length >= SLIVER_M))
            ]  # fmt: skip
            if whole:
                out[i, f] = shapely.union_all(whole)
    return out


def _check_against(expected: dict[tuple[int, int], shapely.Geometry], objects: Objects) -> None:
    pieces = defaultdict(list)
    for chip, source, geometry in zip(objects.chip, objects.source, objects.geometry, strict=True):
        pieces[int(chip), int(source)].append(geometry)
    assert set(pieces) == set(expected)
    for key, parts in pieces.items():
        assert _same(shapely.union_all(parts), expected[key])


def _same(a: shapely.Geometry, b: shapely.Geometry) -> bool:
    """The same set of points. Where a line crosses itself, its union with itself adds a rounded
    vertex, so lines are compared to within that."""
    close = a.hausdorff_distance(b) < 1e-9 and a.length == pytest.approx(b.length, rel=1e-12)
    return bool(a.equals(b) or (a.area == b.area == 0 and close))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
@example(5, True)
def test_clipping_equals_one_intersection_at_a_time(seed: int, snapped: bool) -> None:
    features = _features(_random(seed, 30, snapped), "building=yes")
    bounds = _lattice(4)
    objects = clip(features, bounds, ALL)
    _check_against(_one_at_a_time(features, bounds), objects)
    assert shapely.is_valid(objects.geometry).all()
    assert not (shapely.get_type_id(objects.geometry) > 3).any()
    box, square = shapely.bounds(objects.geometry), bounds[objects.chip]
    assert (box[:, :2] >= square[:, :2]).all()
    assert (box[:, 2:] <= square[:, 2:]).all()


def test_clipping_monaco_equals_one_intersection_at_a_time(monaco_extract: Extract) -> None:
    grid = Grid(gsd_m=2.0, size=64)
    block = block_of(grid, chip_at(grid, 7.42, 43.735))
    bounds = block_chips(grid, block).bounds_utm
    features = load_features(
        monaco_extract.parquet, block.epsg, block_bounds(grid, block), TAXONOMY
    )
    objects = clip(features, bounds, ALL)
    assert len(objects.geometry) > 3000
    sample = np.random.default_rng(0).choice(len(bounds), 12, replace=False)
    picked = np.flatnonzero(np.isin(objects.chip, sample))
    position = np.full(len(bounds), -1)
    position[sample] = np.arange(len(sample))
    part = dataclasses.replace(
        objects, geometry=objects.geometry[picked], chip=position[objects.chip[picked]],
        source=objects.source[picked],
    )  # fmt: skip
    _check_against(_one_at_a_time(features, bounds[sample]), part)


def test_a_coast_of_many_vertices_is_clipped_like_any_other() -> None:
    angle = np.linspace(0, 2 * np.pi, 3000, endpoint=False)
    radius = 12 + np.sin(angle * 90)
    coast = np.stack([16 + radius * np.cos(angle), 16 + radius * np.sin(angle)], axis=1)
    features = _features(
        [shapely.Polygon(coast), shapely.LineString([*coast, coast[0]])], "natural=water"
    )
    bounds = _lattice(8, 4.0)
    objects = clip(features, bounds, ALL)
    _check_against(_one_at_a_time(features, bounds), objects)
    assert objects.size[objects.kind == 2].sum() == pytest.approx(shapely.Polygon(coast).area)


def test_a_lake_of_very_many_vertices_is_clipped_like_any_other() -> None:
    angle = np.linspace(0, 2 * np.pi, 12_000, endpoint=False)
    radius = 40 + 0.4 * np.cos(angle * 3000)
    rim = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    # A second lake has an arm that runs along the edge of all that is looked at.
    arm = shapely.box(-8.0, -60.0, -4.0, 40.0)
    lakes = [shapely.Polygon(rim), shapely.union(shapely.Polygon(rim), arm)]
    assert all(shapely.get_num_coordinates(lake) > 4096 for lake in lakes)
    features = _features(lakes, "natural=water")
    bounds = _lattice(8, 4.0)
    objects = clip(features, bounds, ALL)
    _check_against(_one_at_a_time(features, bounds), objects)
    for chip, source, geometry in zip(objects.chip, objects.source, objects.geometry, strict=True):
        direct = shapely.intersection(lakes[source], shapely.box(*bounds[chip]))
        assert any(
            geometry.equals_exact(p, 1e-9, normalize=True) for p in shapely.get_parts(direct)
        )


def test_a_point_on_a_border_belongs_to_one_chip() -> None:
    xy = [(x, y) for x in (0, 8, 12, 16) for y in (0, 4, 8, 16)]
    objects = clip(_features([shapely.Point(p) for p in xy], "natural=tree"), _lattice(2), ALL)
    at = {xy[s]: int(c) for s, c in zip(objects.source, objects.chip, strict=True)}
    assert len(at) == len(objects.source)
    # Chips: 0 north-west, 1 north-east, 2 south-west, 3 south-east; top and left borders are own.
    assert at == {
        (0, 4): 2, (0, 8): 2, (0, 16): 0, (8, 4): 3, (8, 8): 3, (8, 16): 1,
        (12, 4): 3, (12, 8): 3, (12, 16): 1,
    }  # fmt: skip


def test_a_chip_of_its_own_has_all_four_borders_and_its_own_features_only() -> None:
    bounds = np.array([[0.0, 0, 8, 8], [0.0, 0, 8, 8]])
    corners = [shapely.Point(p) for p in ((0, 0), (8, 0), (8, 8), (9, 9))]
    objects = clip(_features(corners, "natural=tree"), bounds, ALL, frame=np.array([0, 0, 1, 1]))
    assert objects.chip.tolist() == [0, 0, 1]
    assert objects.source.tolist() == [0, 1, 2]


def test_a_feature_that_only_touches_a_chip_is_no_object_of_it() -> None:
    house, fence = shapely.box(4, 2, 8, 6), shapely.LineString([(6, 4), (8, 4)])
    objects = clip(_features([house, fence], "building=yes"), _lattice(2), ALL)
    assert objects.chip.tolist() == [2, 2]
    assert objects.counts == {"touch_only": 2}


def test_a_piece_that_touches_beside_one_that_does_not_is_not_counted() -> None:
    hook = shapely.Polygon([(8, 1), (12, 1), (12, 7), (8, 7), (8, 6), (10, 6), (10, 2), (8, 2)])
    arm = shapely.union(hook, shapely.box(7, 6, 9, 7))
    objects = clip(_features([arm], "building=yes"), _lattice(2), ALL)
    assert objects.chip.tolist() == [2, 3]
    assert objects.counts == {}


def test_a_line_that_bends_at_the_border_stays_one_object() -> None:
    line = shapely.LineString([(2, 2), (8, 4), (2, 6), (2, 20)])
    objects = clip(_features([line], "highway=path"), _lattice(1), ALL)
    assert len(objects.geometry) == 1
    assert shapely.get_coordinates(objects.geometry).tolist() == [[2, 2], [8, 4], [2, 6], [2, 8]]


def test_a_line_that_bends_at_the_border_stays_one_object_beside_a_mere_touch() -> None:
    # Along the west border, out, and back to the corner alone.
    line = shapely.LineString([(0.5, 0), (0, 0.5), (0, 1), (-0.5, 0), (0, 0)])
    objects = clip(_features([line], "highway=path"), _lattice(1), ALL)
    assert [g.wkt for g in objects.geometry] == ["LINESTRING (0.5 0, 0 0.5, 0 1)"]


def test_pieces_that_leave_a_chip_at_one_place_keep_their_direction() -> None:
    line = shapely.LineString([(5, 5), (8, 4), (9, 4), (9, 9), (7, 9), (7, 7), (8, 4), (9, 3)])
    objects = clip(_features([line], "highway=path"), _lattice(1), ALL)
    ends = {(g.coords[0], g.coords[-1]) for g in objects.geometry}
    assert ends == {((5, 5), (8, 4)), ((7, 8), (8, 4))}


def test_small_objects_and_those_over_the_cap_are_counted() -> None:
    sides = [4.0, 3.0, 2.0, 1.0, 0.0005]
    squares = [shapely.box(10 * i, 0, 10 * i + s, s) for i, s in enumerate(sides)]
    lines = [shapely.LineString([(0, 10 * i), (s, 10 * i)]) for i, s in enumerate(sides[:4])]
    features = _features(squares + lines, "building=yes")
    bounds = np.array([[-0.5, -0.5, 99.5, 99.5]])
    options = ObjectOptions(min_polygon_fraction=2e-4, min_line_fraction=5e-3, max_per_chip=4)
    objects = clip(features, bounds, options)
    assert objects.counts == {
        "object_sliver": 1, "object_below_minimum": 2, "object_over_cap": 2,
    }  # fmt: skip
    # Left by the minima: squares of 4, 3 and 2 m, lines of 4, 3 and 2 m.
    assert sorted(objects.size.tolist()) == [3, 4, 9, 16]


def test_objects_come_by_chip_kind_osm_id_part_and_place() -> None:
    rng = np.random.default_rng(1)
    features = _features(_random(11, 80, False), "building=yes")
    objects = clip(features, _lattice(4), ALL)
    left = shapely.bounds(objects.geometry)[:, 0]
    part = features.part[objects.source]
    key = list(zip(objects.chip, objects.kind, objects.osm, part, left, strict=True))
    assert key == sorted(key)
    # The order of the features does not matter.
    order = rng.permutation(80)
    shuffled = make_features(
        features.geometry[order], features.osm[order], np.arange(81), ["building=yes"] * 80,
        TAXONOMY, np.arange(80), Counter(),
    )  # fmt: skip
    again = clip(shuffled, _lattice(4), ALL)
    assert shapely.to_wkb(again.geometry).tolist() == shapely.to_wkb(objects.geometry).tolist()
    assert np.array_equal(again.osm, objects.osm)


def test_an_empty_block_has_no_objects() -> None:
    objects = clip(_features([], "building=yes"), _lattice(2), ObjectOptions(max_per_chip=3))
    arrays = objects.arrays()
    assert arrays["object_offset"].tolist() == [0, 0, 0, 0, 0]
    assert {name: a.dtype.name for name, a in arrays.items()} == {
        "object_offset": "int64", "object_kind": "uint8", "object_class": "uint8",
        "object_osm": "int64", "object_size": "float32",
    }  # fmt: skip


def test_features_of_monaco_are_those_of_geopandas(monaco_extract: Extract) -> None:
    frame = geopandas.read_parquet(monaco_extract.parquet)
    box = (7.418, 43.730, 7.428, 43.740)
    x0, y0, x1, y1 = geopandas.GeoSeries([shapely.box(*box)], crs=4326).to_crs(32632).total_bounds
    around = to_lonlat(32632).transform_bounds(x0, y0, x1, y1, densify_pts=21)
    inside = frame[
        (frame.xmin <= around[2]) & (frame.xmax >= around[0])
        & (frame.ymin <= around[3]) & (frame.ymax >= around[1])
    ].sort_values("osm").to_crs(32632).explode(ignore_index=True)  # fmt: skip
    features = load_features(monaco_extract.parquet, 32632, (x0, y0, x1, y1), TAXONOMY)
    assert 1500 < len(features.osm) < len(frame)
    assert np.array_equal(features.osm, inside.osm.to_numpy())
    assert np.allclose(shapely.area(features.geometry), inside.area, rtol=1e-9)
    assert np.allclose(shapely.length(features.geometry), inside.length, rtol=1e-9)
    tags = [
        sorted(features.tags[t] for t in features.tag[a:b])
        for a, b in zip(features.tag_offset, features.tag_offset[1:])
    ]
    assert tags == [list(t) for t in inside.tags]


def test_classes_of_monaco_follow_the_rules_one_feature_at_a_time(monaco_extract: Extract) -> None:
    bounds = (370_000.0, 4_840_000.0, 376_000.0, 4_847_000.0)
    features = load_features(monaco_extract.parquet, 32632, bounds, TAXONOMY)
    assert len(features.osm) > 7000
    for i in range(len(features.osm)):
        row = features.tag[features.tag_offset[i] : features.tag_offset[i + 1]]
        tags = dict(features.tags[t].split("=", 1) for t in row)
        number, width = 0, 0.0
        for n, c in enumerate(TAXONOMY.classes, start=1):
            hits = [
                c.widths.get(rule, c.width_m or 0.0)
                for rule in c.rules
                for key, value in [rule.split("=")]
                if tags.get(key) == value or (value == "*" and tags.get(key, "no") != "no")
            ]
            if features.kind[i] == 1:
                hits = [w for w in hits if w]
            if hits:
                number, width = n, max(hits)
        assert features.osm_class[i] == number
        assert features.width_m[i] == np.float32(width if features.kind[i] == 1 else 0)


def test_the_class_drawn_last_wins_and_no_means_no() -> None:
    point, line, area = (
        shapely.Point(1, 1),
        shapely.LineString([(0, 0), (1, 1)]),
        shapely.box(0, 0, 1, 1),
    )
    shapes = [point, line, area]

    def classes(*tags: str) -> list[int]:
        return _features(shapes, *tags).osm_class.tolist()

    building, forest, road = _class("building"), _class("forest"), _class("road_minor")
    assert classes("landuse=forest", "building=yes") == [building, 0, building]
    assert classes("landuse=forest", "building=no") == [forest, 0, forest]
    assert classes("highway=service", "building=yes") == [building, road, building]
    assert classes("man_made=mast") == [0, 0, 0]
    river = _features(shapes, "waterway=river", "natural=water")
    assert river.width_m.tolist() == [0, 15, 0]


def test_a_rule_for_a_value_and_one_for_its_key_may_be_of_two_classes() -> None:
    taxonomy = Taxonomy(
        classes=(
            TaxonomyClass(name="any", color="#000000", rules=("k=*",), width_m=3),
            TaxonomyClass(name="one", color="#000001", rules=("k=a",)),
        )
    )
    shapes = [shapely.LineString([(0, 0), (1, 1)]), shapely.box(0, 0, 1, 1)]
    assert _features(shapes, "k=a", taxonomy=taxonomy).osm_class.tolist() == [1, 2]
    assert _features(shapes, "k=b", taxonomy=taxonomy).osm_class.tolist() == [1, 1]
    assert _features(shapes, "k=no", taxonomy=taxonomy).osm_class.tolist() == [0, 0]


def test_invalid_polygons_are_repaired_and_what_is_lost_is_counted() -> None:
    bow = shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])
    spike = shapely.Polygon([(5, 0), (7, 0), (7, 2), (5, 2), (5, 6)])
    flat = shapely.Polygon([(0, 9), (4, 9), (2, 9)])
    features = _features([bow, spike, flat], "building=yes")
    assert features.counts == {"invalid_repaired": 3, "repair_piece_dropped": 3}
    assert features.osm.tolist() == [4, 4, 8]
    assert features.part.tolist() == [0, 1, 0]
    assert shapely.area(features.geometry).tolist() == [1, 1, 4]
    assert features.tag_offset.tolist() == [0, 1, 2, 3]


def _write(path: Path, geometry: list[shapely.Geometry]) -> Path:
    bounds = shapely.bounds(geometry)
    n = len(geometry)
    pq.write_table(
        pa.table(
            {"osm": np.arange(1, n + 1) * 4, "geometry": pa.array(shapely.to_wkb(geometry)),
             **{c: bounds[:, i] for i, c in enumerate(("xmin", "ymin", "xmax", "ymax"))},
             "tags": [["building=yes"]] * n}
        ), path,
    )  # fmt: skip
    return path


def test_a_block_at_the_antimeridian_takes_features_of_both_sides(tmp_path: Path) -> None:
    """Around 180 degrees on the equator a thousandth of a degree is 111 m, on both sides."""
    east, west = shapely.box(179.998, 1, 180, 1.001), shapely.box(-180, 1, -179.997, 1.001)
    parquet = _write(tmp_path / "x.parquet", [east, west, shapely.box(0, 1, 0.1, 1.1)])
    for epsg in (32660, 32601):
        x, y = to_utm_of(epsg, 180.0, 1.0)
        features = load_features(parquet, epsg, (x - 2000, y - 2000, x + 2000, y + 2000), TAXONOMY)
        assert features.osm.tolist() == [4, 8]
        area = shapely.area(features.geometry)
        assert area == pytest.approx(np.array([2, 3]) * 111.32 * 110.57, rel=3e-3)
        assert features.geometry[0].distance(features.geometry[1]) < 1e-6


def to_utm_of(epsg: int, lon: float, lat: float) -> tuple[float, float]:
    point = geopandas.GeoSeries([shapely.Point(lon, lat)], crs=4326).to_crs(epsg)[0]
    return point.x, point.y


def test_a_feature_across_a_zone_border_has_the_same_size_in_both_zones(tmp_path: Path) -> None:
    parquet = _write(tmp_path / "x.parquet", [shapely.box(11.99, 48, 12.01, 48.01)])
    sizes = []
    for epsg in (32632, 32633):
        x, y = to_utm_of(epsg, 12.0, 48.0)
        features = load_features(parquet, epsg, (x - 50, y - 50, x + 50, y + 50), TAXONOMY)
        sizes.append(float(shapely.area(features.geometry)[0]))
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_a_block_far_from_any_feature_is_empty(monaco_extract: Extract) -> None:
    features = load_features(monaco_extract.parquet, 32632, (5e5, 5e6, 5.1e5, 5.01e6), TAXONOMY)
    assert len(features.geometry) == len(features.tag) == 0
    assert clip(features, _lattice(2), ALL).chips == 4


def test_a_converted_extract_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match="cannot read converted extract"):
        load_features(tmp_path / "x.parquet", 32632, (0, 0, 1, 1), TAXONOMY)
