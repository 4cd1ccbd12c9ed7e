"""Splits at borders of UTM zones: against distances on the ground, chip by chip, and the check."""

from pathlib import Path

import numpy as np
import pyproj
import pytest
import shapely
from numpy.typing import NDArray

from pipelines.leaks import check_splits
from pipelines.region import BlockPlan, plan_blocks
from pipelines.snapshot import publish
from pipelines.store import prepare_dataset
from schemas.config import Splits
from schemas.grid import Grid, block_chips, blocks_in, pack_chips
from schemas.sources import Region
from schemas.splits import split_of
from tests.shards import make_info, random_arrays, store_row, write_vocabulary

GRID = Grid(gsd_m=10.0, size=32, patch=8, shard_side=4)


def splits(buffer_m: float, seed: int = 5) -> Splits:
    return Splits(block_km=2.5, train=0.5, val=0.2, test=0.3, buffer_m=buffer_m, seed=seed)


def planned(box: tuple[float, float, float, float], buffer_m: float) -> list[BlockPlan]:
    return plan_blocks(Region(bbox=box), GRID, splits(buffer_m))[0]


def all_of(box: tuple[float, float, float, float]) -> list[BlockPlan]:
    """The same with one split, so that no chip is left out."""
    return plan_blocks(Region(bbox=box), GRID, Splits(train=1, val=0, test=0))[0]


def on_the_ground(epsg: int, bounds: NDArray[np.float64], lon: float, lat: float) -> NDArray:
    """Chips as polygons in metres around a place, true to a hundred-thousandth over 20 km."""
    local = pyproj.CRS.from_proj4(f"+proj=aeqd +lon_0={lon} +lat_0={lat} +ellps=WGS84")
    move = pyproj.Transformer.from_crs(epsg, local, always_xy=True).transform
    fine = shapely.segmentize(shapely.box(*bounds.T), 100.0)
    return shapely.transform(fine, lambda xy: np.column_stack(move(*xy.T)))


def every_chip(
    box: tuple[float, float, float, float], lon: float, lat: float
) -> tuple[NDArray, NDArray, NDArray]:
    """Shape on the ground, split and zone of every chip of the grid in a box."""
    shapes, names, zones = [], [], []
    for block in sorted(set(blocks_in(GRID, box))):
        chips = block_chips(GRID, block)
        x, y = (block.col + 0.5) * GRID.shard_m, (block.row + 0.5) * GRID.shard_m
        owned = chips.bounds_utm[chips.owned]
        shapes.append(on_the_ground(block.epsg, owned, lon, lat))
        names += [split_of(splits(0), GRID, block.epsg, x, y)] * len(owned)
        zones += [block.epsg] * len(owned)
    return np.concatenate(shapes), np.array(names), np.array(zones)


@pytest.mark.parametrize(
    ("lon", "lat", "buffer_m"),
    [(12.0, 47.0, 0.0), (180.0, -16.5, 700.0), (6.0, 0.004, 700.0), (-6.0, 71.0, 0.0),
     (9.0, 0.0, 700.0)],
)  # fmt: skip
def test_across_a_zone_border_chips_of_other_splits_are_the_buffer_away(
    lon: float, lat: float, buffer_m: float
) -> None:
    dlat = 0.02
    dlon = dlat / np.cos(np.radians(lat))
    box = (lon - dlon, lat - dlat, lon + dlon, lat + dlat)
    wide = (lon - 1.5 * dlon, lat - 1.5 * dlat, lon + 1.5 * dlon, lat + 1.5 * dlat)
    shapes, names, zones = every_chip(wide, lon, lat)
    assert len(set(zones)) > 1
    tree = shapely.STRtree(shapes)
    whole = {p.block: p for p in all_of(box)}
    dropped = 0
    for plan in planned(box, buffer_m):
        chips = block_chips(GRID, plan.block)
        wanted = np.flatnonzero(whole[plan.block].chips)
        own = on_the_ground(plan.block.epsg, chips.bounds_utm[wanted], lon, lat)
        # Chips that only touch have no pixel in common.
        own = shapely.buffer(own, -0.01, join_style="mitre") if buffer_m == 0 else own
        a, b = tree.query(own, predicate="dwithin", distance=buffer_m)
        across = (zones[b] != plan.block.epsg) & (names[b] != plan.split)
        near = np.isin(np.arange(len(wanted)), a[across])
        assert not (near & plan.chips[wanted]).any()
        if buffer_m == 0:
            np.testing.assert_array_equal(near, ~plan.chips[wanted])
        dropped += int(near.sum())
    assert dropped >= 3


@pytest.mark.parametrize("buffer_m", [0.0, 500.0])
def test_what_is_planned_across_a_zone_border_passes_the_check(
    tmp_path: Path, buffer_m: float
) -> None:
    plans = planned((11.96, 46.98, 12.04, 47.02), buffer_m)
    assert len({p.block.epsg for p in plans}) == 2
    assert len({p.split for p in plans}) == 3
    info = make_info(GRID, splits=splits(buffer_m))
    prepare_dataset(tmp_path, info)
    rows = [
        store_row(tmp_path, plan.block, _arrays(plan, n), plan.split)
        for n, plan in enumerate(plans)
        if plan.chips.any()
    ]
    publish(tmp_path, rows, write_vocabulary(tmp_path, 8), info)
    check = check_splits(tmp_path)
    assert sum(n > 0 for n in check.chips.values()) == 3
    assert check.passed, check.leaks


def _arrays(plan: BlockPlan, seed: int) -> dict[str, NDArray]:
    """A shard of exactly the planned chips."""
    chips = block_chips(GRID, plan.block)
    at = np.flatnonzero(plan.chips)
    arrays = random_arrays(seed, chips=len(at), objects=2, grid=GRID, block=plan.block)
    return {
        **arrays,
        "chip_id": pack_chips(plan.block.epsg, GRID, chips.cols[at], chips.rows[at]),
        "bounds": chips.bounds_utm[at],
        "center_lonlat": chips.center_lonlat[at],
    }


def test_a_region_that_grows_leaves_the_chips_it_had_as_they_were() -> None:
    small = {p.block: p for p in planned((11.98, 46.99, 12.02, 47.01), 500.0)}
    large = {p.block: p for p in planned((11.95, 46.97, 12.05, 47.03), 500.0)}
    alone = {p.block: p for p in all_of((11.98, 46.99, 12.02, 47.01))}
    for block, plan in small.items():
        np.testing.assert_array_equal(plan.chips, large[block].chips & alone[block].chips)
