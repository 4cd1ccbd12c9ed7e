"""The chip grid: every place has one chip, every chip one shard."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pyproj import CRS

from schemas.errors import GeoLinkError
from schemas.grid import (
    Chip,
    Grid,
    block_bounds,
    block_chips,
    block_of,
    blocks_in,
    chip_at,
    chip_bounds,
    chip_center_lonlat,
    chip_name,
    neighbours,
    pack_chips,
    parse_chip,
    to_utm,
    unpack_chip,
    utm_epsg,
)

GRIDS = [
    Grid(gsd_m=10, size=64, patch=8),
    Grid(gsd_m=1, size=224),
    Grid(gsd_m=0.3, size=96, patch=12, shard_side=5),
    Grid(gsd_m=30, size=128, shard_side=7),
]
grids = st.sampled_from(GRIDS)
longitudes = st.floats(-180, 180) | st.builds(
    lambda k, d: 6.0 * k + d, st.integers(-30, 30), st.floats(-0.02, 0.02)
)
latitudes = st.floats(-79.9, 83.9) | st.floats(-0.02, 0.02) | st.just(0.0)
quick = settings(max_examples=50, deadline=None)


@quick
@given(grids, longitudes, latitudes)
def test_the_chip_of_a_place_contains_it(grid: Grid, lon: float, lat: float) -> None:
    chip = chip_at(grid, lon, lat)
    x0, y0, x1, y1 = chip_bounds(chip)
    x, y = to_utm(chip.epsg).transform(lon, lat)
    assert x0 <= x <= x1
    assert y0 <= y <= y1
    assert x1 - x0 == pytest.approx(grid.chip_m)
    assert y1 - y0 == pytest.approx(grid.chip_m)
    assert (chip.gsd_mm, chip.size) == (grid.gsd_mm, grid.size)


@quick
@given(grids, st.integers(-30, 29), st.floats(0.1, 5.9), st.floats(-79, 83))
def test_inside_a_zone_all_places_of_a_chip_have_that_chip(
    grid: Grid, zone: int, east: float, lat: float
) -> None:
    lat += 0.1 if 0 <= lat < 0.1 else -0.1 if -0.1 < lat < 0 else 0
    # Half a chip is less than 0.1 degrees of longitude below 60 degrees.
    lat = max(-60.0, min(60.0, lat))
    chip = chip_at(grid, 6.0 * zone + east, lat)
    assert chip.epsg == (32600 if lat >= 0 else 32700) + zone + 31
    lon, lat = chip_center_lonlat(chip)
    assert chip_at(grid, lon, lat) == chip


@quick
@given(grids, st.integers(-29, 29), st.floats(-0.01, 0.01), st.floats(-79, 83))
def test_a_place_on_a_zone_border_has_one_chip(
    grid: Grid, border: int, east: float, lat: float
) -> None:
    chip = chip_at(grid, 6.0 * border + east, lat)
    assert chip == chip_at(grid, 6.0 * border + east + 360.0, lat)
    west_zone = 30 + border
    assert chip.epsg % 100 in (west_zone, west_zone + 1)
    lon, centre_lat = chip_center_lonlat(chip)
    clear = abs(lon - 6.0 * border) > 2 * abs(east) + grid.chip_m / 5_000
    if clear and min(abs(lat), abs(centre_lat)) > 0.1:
        assert chip.epsg == utm_epsg(lon, lat)


@quick
@given(grids, st.floats(-180, 180), st.floats(-0.01, 0.01))
def test_at_the_equator_north_begins(grid: Grid, lon: float, lat: float) -> None:
    assert utm_epsg(lon, lat) // 100 == (326 if lat >= 0 else 327)
    chip = chip_at(grid, lon, lat)
    assert chip.epsg // 100 == 326 or chip_bounds(chip)[1] <= 10_000_000


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("lat", [0.0, -1e-12, -3e-5, 3e-5, -1e-4])
def test_around_the_equator_chips_can_be_printed_and_packed(grid: Grid, lat: float) -> None:
    chip = chip_at(grid, 10.0, lat)
    assert parse_chip(chip_name(chip)) == chip
    packed = pack_chips(chip.epsg, grid, np.array([chip.col]), np.array([chip.row]))
    assert unpack_chip(packed[0]) == chip


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("lat", [-80.0, 84.0])
def test_a_place_at_the_limits_of_utm_has_a_chip(grid: Grid, lat: float) -> None:
    x0, y0, x1, y1 = chip_bounds(chip_at(grid, 1.0, lat))
    x, y = to_utm(utm_epsg(1.0, lat)).transform(1.0, lat)
    assert x0 <= x <= x1
    assert y0 <= y <= y1


def test_both_sides_of_the_antimeridian_are_one_place() -> None:
    grid = GRIDS[0]
    assert chip_at(grid, 180.0, -17.0) == chip_at(grid, -180.0, -17.0)
    assert chip_at(grid, 190.0, 10.0) == chip_at(grid, -170.0, 10.0)
    assert utm_epsg(180.0, 1.0) == utm_epsg(-180.0, 1.0) == 32601
    assert utm_epsg(179.999, 1.0) == 32660


@quick
@given(st.floats(-180, 179.99), st.floats(-80, 84))
def test_the_zone_is_the_one_whose_area_of_use_holds_the_place(lon: float, lat: float) -> None:
    epsg = utm_epsg(lon, lat)
    area = CRS(epsg).area_of_use
    assert area is not None
    assert area.west - 1e-9 <= lon <= area.east + 1e-9
    assert area.south - 1e-9 <= lat <= area.north + 1e-9


def test_norway_and_svalbard_are_no_exceptions() -> None:
    assert utm_epsg(5.3, 60.4) == 32631
    assert utm_epsg(10.0, 78.0) == 32632


@pytest.mark.parametrize(
    ("lon", "lat"), [(0, 84.01), (0, -80.01), (0, 90), (10, math.nan), (math.inf, 0), (math.nan, 0)]
)
def test_a_place_outside_utm_is_an_error(lon: float, lat: float) -> None:
    with pytest.raises(GeoLinkError, match=r"outside UTM.*-80 and 84"):
        utm_epsg(lon, lat)
    with pytest.raises(GeoLinkError, match="outside UTM"):
        chip_at(GRIDS[0], lon, lat)


chips = st.builds(
    Chip,
    st.builds(lambda a, b: a + b, st.sampled_from([32600, 32700]), st.integers(1, 60)),
    st.integers(1, 1_000_000),
    st.integers(8, 4096),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)


@quick
@given(chips)
def test_a_printed_chip_is_that_chip(chip: Chip) -> None:
    assert parse_chip(chip_name(chip)) == chip


@pytest.mark.parametrize("name", ["", "32632-10000-64-1", "32632-10000-64-1-x", "1-2-3-4-5-6", "a"])
def test_what_is_no_chip_id_is_an_error(name: str) -> None:
    with pytest.raises(GeoLinkError, match="not a chip id"):
        parse_chip(name)


@quick
@given(grids, st.sampled_from([32601, 32660, 32701, 32760]), st.data())
def test_a_packed_chip_is_that_chip(grid: Grid, epsg: int, data: st.DataObject) -> None:
    number = st.integers(0, 2**32 - 1)
    places = data.draw(st.lists(st.tuples(number, number), max_size=8, unique=True))
    cols, rows = np.array(places, np.int64).reshape(-1, 2).T
    packed = pack_chips(epsg, grid, cols, rows)
    assert packed.dtype == np.uint64
    assert packed.shape == (len(places), 2)
    assert [unpack_chip(p) for p in packed] == [
        Chip(epsg, grid.gsd_mm, grid.size, col, row) for col, row in places
    ]
    assert len(np.unique(packed, axis=0)) == len(places)


@quick
@given(grids, st.floats(-170, 170), st.floats(-70, 70))
def test_neighbours_surround_a_chip(grid: Grid, lon: float, lat: float) -> None:
    chip = chip_at(grid, lon, lat)
    around = neighbours(chip)
    if chip.row == 0:
        assert len(set(around)) == 5
        assert min(c.row for c in around) == 0
        return
    assert len(set(around)) == 8
    assert chip not in around
    x0, y0, x1, y1 = chip_bounds(chip)
    boxes = np.array([chip_bounds(c) for c in around])
    np.testing.assert_allclose(boxes[:, :2].min(axis=0), [x0 - grid.chip_m, y0 - grid.chip_m])
    np.testing.assert_allclose(boxes[:, 2:].max(axis=0), [x1 + grid.chip_m, y1 + grid.chip_m])
    assert around[0] == chip._replace(col=chip.col - 1, row=chip.row + 1)
    assert all(chip in neighbours(c) for c in around)


@quick
@given(grids, st.floats(-179, 179), st.floats(-79, 83))
def test_a_chip_lies_in_its_shard_and_in_no_other(grid: Grid, lon: float, lat: float) -> None:
    chip = chip_at(grid, lon, lat)
    block = block_of(grid, chip)
    x0, y0, x1, y1 = block_bounds(grid, block)
    c0, d0, c1, d1 = chip_bounds(chip)
    slack = 1e-6
    assert x0 - slack <= c0 < c1 <= x1 + slack
    assert y0 - slack <= d0 < d1 <= y1 + slack
    members = block_chips(grid, block)
    assert (chip.col, chip.row) in set(zip(members.cols.tolist(), members.rows.tolist()))
    assert {block_of(grid, chip._replace(col=c, row=r)) for c, r in zip(members.cols, members.rows)}
    assert len(members.cols) == grid.shard_side**2


@pytest.mark.parametrize("grid", GRIDS)
def test_the_chips_of_a_shard_tile_it_from_the_north_west(grid: Grid) -> None:
    block = block_of(grid, chip_at(grid, 7.42, 43.73))
    members = block_chips(grid, block)
    side = grid.shard_side
    x0, y0, x1, y1 = block_bounds(grid, block)
    west, south, east, north = members.bounds_utm.reshape(side, side, 4).transpose(2, 0, 1)
    np.testing.assert_allclose(
        west, np.broadcast_to(x0 + grid.chip_m * np.arange(side), west.shape)
    )
    np.testing.assert_allclose(
        north, np.broadcast_to(y1 - grid.chip_m * np.arange(side)[:, None], north.shape)
    )
    np.testing.assert_allclose(east[:, -1], x1)
    np.testing.assert_allclose(south[-1], y0)
    for i in (0, side - 1, side * side - 1):
        chip = Chip(block.epsg, grid.gsd_mm, grid.size, int(members.cols[i]), int(members.rows[i]))
        assert members.bounds_utm[i] == pytest.approx(chip_bounds(chip))
        assert members.center_lonlat[i] == pytest.approx(chip_center_lonlat(chip))


@pytest.mark.parametrize(("lon", "lat"), [(6.0, 43.7), (6.0, 0.0), (-78.0, -33.0), (180.0, 10.0)])
def test_along_a_border_a_shard_owns_the_chips_centred_in_its_zone(lon: float, lat: float) -> None:
    grid = GRIDS[0]
    owners = []
    for east in (-0.005, 0.005):
        block = block_of(grid, chip_at(grid, lon + east, lat + 0.003))
        members = block_chips(grid, block)
        zones = [utm_epsg(*place) for place in members.center_lonlat.tolist()]
        assert members.owned.tolist() == [zone == block.epsg for zone in zones]
        owners.append(block.epsg)
        for i in np.flatnonzero(members.owned)[::37]:
            chip = chip_at(grid, *members.center_lonlat[i].tolist())
            assert (chip.col, chip.row) == (members.cols[i], members.rows[i])
    assert owners[0] != owners[1]


@quick
@given(
    grids, st.floats(-180, 180), st.floats(-70, -1e-6) | st.floats(0, 70),
    st.floats(0.01, 0.3), st.floats(0.01, 0.3),
    st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_the_shards_of_a_region_hold_every_chip_centred_in_it(
    grid: Grid, west: float, south: float, width: float, height: float, u: float, v: float
) -> None:
    region = (west, south, west + width, south + height)
    chip = chip_at(grid, west + u * width, south + v * height)
    lon, lat = chip_center_lonlat(chip)
    inside = (lon - west) % 360.0 < width and region[1] < lat < region[3]
    if inside and utm_epsg(lon, lat) == chip.epsg:
        assert block_of(grid, chip) in set(blocks_in(grid, region))


def test_a_region_across_the_antimeridian_has_shards_on_both_sides() -> None:
    grid = GRIDS[0]
    blocks = list(blocks_in(grid, (179.95, -17.0, 180.05, -16.9)))
    assert {b.epsg for b in blocks} == {32760, 32701}
    assert blocks == list(blocks_in(grid, (-180.05, -17.0, -179.95, -16.9)))
    assert len(set(blocks)) == len(blocks)
    assert len(blocks) < 20


@pytest.mark.parametrize("south", [0.0, -1e-12, -1e-200])
def test_a_region_from_the_equator_has_shards(south: float) -> None:
    blocks = list(blocks_in(GRIDS[0], (10.0, south, 10.1, 0.05)))
    assert {b.epsg for b in blocks} == {32632}
    assert min(b.row for b in blocks) == 0


def test_a_region_across_the_equator_has_shards_of_both_hemispheres() -> None:
    blocks = list(blocks_in(GRIDS[0], (10.0, -0.05, 10.1, 0.05)))
    assert {b.epsg for b in blocks} == {32632, 32732}


@pytest.mark.parametrize("region", [(10, 50, 10, 51), (10, 51, 11, 50), (10, 50, 9, 51)])
def test_a_region_without_area_is_an_error(region: tuple[float, float, float, float]) -> None:
    with pytest.raises(GeoLinkError, match="has no area"):
        list(blocks_in(GRIDS[0], region))


@pytest.mark.parametrize("region", [(10, 80, 11, 85), (10, -85, 11, -79)])
def test_a_region_that_leaves_utm_is_an_error(region: tuple[float, float, float, float]) -> None:
    with pytest.raises(GeoLinkError, match="outside UTM"):
        list(blocks_in(GRIDS[0], region))


def test_sentinel_2_pixels_are_not_resampled() -> None:
    # Sentinel-2 tiles start at multiples of 10 m.
    x0, y0, x1, y1 = chip_bounds(chip_at(GRIDS[0], 7.42, 43.73))
    assert [v % 10 for v in (x0, y0, x1, y1)] == [0, 0, 0, 0]


def test_a_shard_prints_as_zone_column_row() -> None:
    grid = GRIDS[0]
    block = block_of(grid, Chip(32632, 10_000, 64, 12 * 16 + 3, 345 * 16))
    assert block.name == "32632-00012-00345"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gsd_m": 10, "size": 64, "patch": 10}, r"patch 10 does not divide size 64.*\[2, 4, 8"),
        ({"gsd_m": 0.00015, "size": 64}, "not a whole number of millimetres"),
        ({"gsd_m": 1, "size": 4096, "patch": 8}, "more than 256 patches"),
        ({"gsd_m": 0, "size": 64}, "greater than 0"),
        ({"gsd_m": 1, "size": 64, "tile": 3}, "Extra inputs"),
    ],
)
def test_a_grid_that_does_not_divide_is_an_error(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Grid.model_validate(fields)
