"""Regions: against distances taken one by one, and boxes drawn by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Geod

from pipelines.places import region_geometry, region_points
from pipelines.region import plan_blocks, search_boxes
from schemas.config import Splits
from schemas.errors import GeoLinkError
from schemas.grid import Grid, block_bounds, block_chips, blocks_in, to_lonlat
from schemas.sources import Region

GRID = Grid(gsd_m=10, size=32, patch=8, shard_side=4)
SPLITS = Splits(train=1, val=0, test=0)
GEOD = Geod(ellps="WGS84")

Place = tuple[float, float]


def _chips(region: Region, grid: Grid = GRID) -> set[Place]:
    """Centres of the planned chips, degrees."""
    return {
        (round(lon, 9), round(lat, 9))
        for plan in plan_blocks(region, grid, SPLITS)[0]
        for lon, lat in block_chips(grid, plan.block).center_lonlat[plan.chips].tolist()
    }


def _expected(points: list[Place], radius_m: float, grid: Grid = GRID) -> set[Place]:
    """The same by looking at every chip in a wide box around each point, one distance a time."""
    found = set()
    for x, y in points:
        dlat = 2 * radius_m / 110_000 + 0.02
        dlon = dlat / np.cos(np.radians(min(abs(y) + dlat, 84)))
        south, north = max(y - dlat, -80), min(y + dlat, 84)
        for block in set(blocks_in(grid, (x - dlon, south, x + dlon, north))):
            chips = block_chips(grid, block)
            for lon, lat in chips.center_lonlat[chips.owned].tolist():
                if GEOD.inv(lon, lat, x, y)[2] <= radius_m:
                    found.add((round(lon, 9), round(lat, 9)))
    return found


@pytest.mark.parametrize(
    "points",
    [
        [(7.42, 43.73)],
        [(6.001, 48.0), (5.999, -48.0)],  # a zone border, on both hemispheres
        [(9.0, 0.004)],  # the equator
        [(179.999, 10.0), (-179.99, -10.0)],  # the antimeridian
        [(15.01, 72.0)],
        [(180.0, 0.0)],
    ],
)
def test_chips_near_a_point_are_those_whose_centre_is_within_the_radius(
    points: list[Place],
) -> None:
    region = Region(points=tuple(points), radius_m=1500)
    assert _chips(region) == _expected(points, 1500)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-180, 180), st.floats(-79.9, 83.9)), min_size=1, max_size=3),
    st.floats(300, 3000),
)
def test_anywhere_on_earth_chips_near_points_are_found(
    points: list[Place], radius_m: float
) -> None:
    expected = _expected(points, radius_m)
    if expected:
        assert _chips(Region(points=tuple(points), radius_m=radius_m)) == expected


def test_a_wide_radius_reaches_over_several_zones() -> None:
    grid = Grid(gsd_m=100, size=64, patch=8, shard_side=4)
    zones = {p.block.epsg for p in plan_blocks(
        Region(points=((15.1, 79.0),), radius_m=200_000), grid, SPLITS)[0]}  # fmt: skip
    assert zones >= {32631, 32632, 32633, 32634}
    found = _chips(Region(points=((15.1, 79.0),), radius_m=200_000), grid)
    assert found == _expected([(15.1, 79.0)], 200_000, grid)


def test_scattered_points_plan_only_the_blocks_around_them() -> None:
    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(-180, 180, 300), rng.uniform(-79, 83, 300)], axis=1)
    region = Region(points=tuple(map(tuple, points.tolist())), radius_m=250)
    plans, _ = plan_blocks(region, GRID, SPLITS)
    assert len(plans) <= 4 * 300
    assert sum(int(p.chips.sum()) for p in plans) <= 6 * 300
    boxes = search_boxes(GRID, plans)
    assert len(boxes) > 200
    assert sum((e - w) * (n - s) for w, s, e, n in boxes) < 100


def test_points_come_from_pairs_csv_and_geojson_alike(tmp_path: Path) -> None:
    pairs = ((7.4, 43.7), (-70.5, -33.25), (7.4, 43.7))
    expected = [[7.4, 43.7], [-70.5, -33.25]]
    texts = {
        "plain.csv": "7.4,43.7\n-70.5,-33.25\n\n7.4,43.7\n",
        "header.csv": "\ufeffname;Latitude;Longitude\na;43.7;7.4\nb;-33.25;-70.5\n",
        "tabs.tsv": "lat\tlon\n43.7\t7.4\n-33.25\t-70.5\n",
        "points.geojson": json.dumps(
            {"type": "FeatureCollection", "features": [
                {"type": "Feature", "properties": {},
                 "geometry": {"type": "Point", "coordinates": expected[0]}},
                {"type": "Feature", "properties": {},
                 "geometry": {"type": "MultiPoint", "coordinates": expected}},
            ]}
        ),
    }  # fmt: skip
    assert region_points(Region(points=pairs, radius_m=1)).tolist() == expected
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        region = Region(points=tmp_path / name, radius_m=1)
        assert region_points(region).tolist() == expected, name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lon,lat\n43.7,107.4\n", r"\(43.7, 107.4\) .* latitude and longitude look swapped"),
        ("lat,lon\n107.4,43.7\n", "look swapped"),
        ("377000,4843000\n", "look like metres"),
        ("10,85\n", "outside UTM"),
        ("a,b\nc,d\n", "neither GeoJSON nor a table"),
        ("5\n", "neither GeoJSON nor a table"),
        ("nan,5\n", "not .longitude, latitude. in degrees"),
        ("", "holds no point"),
        ('{"type": "Point"', "not valid GeoJSON"),
        ('{"type": "LineString", "coordinates": [[0, 0], [1, 1]]}', "are no points"),
    ],
)
def test_a_file_of_bad_points_is_told(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "points"
    path.write_text(text)
    with pytest.raises(GeoLinkError, match=message):
        plan_blocks(Region(points=path, radius_m=100), GRID, SPLITS)


def test_a_polygon_with_swapped_axes_is_told(tmp_path: Path) -> None:
    path = tmp_path / "region.geojson"
    tokyo = shapely.box(139.0, 35.0, 140.0, 36.0)
    swapped = shapely.transform(tokyo, lambda xy: xy[:, ::-1])
    path.write_text(shapely.to_geojson(swapped))
    with pytest.raises(GeoLinkError, match="look swapped"):
        region_geometry(Region(file=path))


def test_a_point_too_small_for_a_chip_is_told() -> None:
    with pytest.raises(GeoLinkError, match=r"no centre of a chip .* within 1 m of a point"):
        plan_blocks(Region(points=((7.42, 43.73),), radius_m=1), GRID, SPLITS)


def test_points_near_no_chip_are_named() -> None:
    # Half a chip is 160 m: a corner of four chips is 226 m from each of their centres.
    x, y = block_bounds(GRID, next(blocks_in(GRID, (7.4, 43.7, 7.5, 43.8))))[:2]
    corner, centre = (to_lonlat(32632).transform(x + d, y + d) for d in (320.0, 160.0))
    region = Region(points=(corner, centre, (7.45, 43.75)), radius_m=200)
    plans, found = plan_blocks(region, GRID, SPLITS)
    assert list(found) == ["point_without_chip"]
    assert found["point_without_chip"][0] == f"({corner[0]:.8g}, {corner[1]:.8g})"
    near = {p for p in (corner, centre, (7.45, 43.75)) if _expected([p], 200)}
    assert len(found["point_without_chip"]) == 3 - len(near)
    assert centre in near
    assert sum(int(p.chips.sum()) for p in plans) == len(_expected(list(near), 200))
    assert plan_blocks(Region(points=(centre,), radius_m=200), GRID, SPLITS)[1] == {}


def test_discs_have_the_radius_on_the_map() -> None:
    discs = region_geometry(Region(points=((179.99, 60.0), (10.0, -5.0)), radius_m=5000))
    parts = shapely.get_parts(discs)
    assert len(parts) == 2
    for part in parts:
        x, y = part.centroid.coords[0]
        corners = shapely.get_coordinates(part)[:-1]
        distance = GEOD.inv(*np.tile([x, y], (len(corners), 1)).T, *corners.T)[2]
        assert distance == pytest.approx(np.full(32, 5000.0), rel=1e-3)


def test_far_islands_of_a_polygon_do_not_cost_the_sea_between() -> None:
    islands = shapely.union_all(
        [shapely.box(-170, 20, -169.9, 20.1), shapely.box(0, 0.5, 0.1, 0.6)]
    )
    region = Region(geojson=json.loads(shapely.to_geojson(islands)))
    plans, _ = plan_blocks(region, GRID, SPLITS)
    assert {p.block.epsg for p in plans} == {32602, 32631}
    assert len(search_boxes(GRID, plans)) == 2


def _covered(boxes: list[tuple[float, ...]], lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    inside = np.zeros(len(lon), bool)
    for west, south, east, north in boxes:
        assert -180 <= west < 180
        assert west < east
        turned = west + (lon - west) % 360
        inside |= (turned <= east) & (south <= lat) & (lat <= north)
    return inside


@pytest.mark.parametrize(
    ("bbox", "most"),
    [
        ((7.0, 43.0, 8.0, 44.0), 1),
        ((179.5, -17.5, 180.5, -16.5), 1),
        ((11.5, -0.5, 12.5, 0.5), 1),
    ],
)
def test_a_compact_region_is_searched_in_one_box(bbox: tuple[float, ...], most: int) -> None:
    plans, _ = plan_blocks(Region(bbox=bbox), GRID, SPLITS)
    boxes = search_boxes(GRID, plans)
    assert len(boxes) == most
    for plan in plans:
        x0, y0, x1, y1 = block_bounds(GRID, plan.block)
        lon, lat = to_lonlat(plan.block.epsg).transform([x0, x1, x0, x1], [y0, y0, y1, y1])
        assert _covered(boxes, np.array(lon), np.array(lat)).all()
    west, south, east, north = boxes[0]
    assert (east - west) * (north - south) < 1.2


def test_a_long_thin_region_is_searched_along_itself() -> None:
    line = shapely.LineString([(0.5, 40.0), (20.0, 55.0)]).buffer(0.05)
    grid = Grid(gsd_m=10, size=256, patch=16, shard_side=4)
    plans, _ = plan_blocks(Region(geojson=json.loads(shapely.to_geojson(line))), grid, SPLITS)
    boxes = search_boxes(grid, plans)
    assert sum((e - w) * (n - s) for w, s, e, n in boxes) < 40  # one box: 290
    assert len(boxes) < 40
    centres = np.concatenate([block_chips(grid, p.block).center_lonlat[p.chips] for p in plans])
    assert _covered(boxes, *centres.T).all()
