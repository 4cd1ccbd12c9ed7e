"""Splits that share something are caught by name; everything against a check of every pair."""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Geod, Transformer

from pipelines.certificates import certify
from pipelines.leaks import SplitCheck, check_splits
from pipelines.snapshot import publish
from pipelines.store import prepare_dataset
from schemas.config import Splits
from schemas.dataset import certificate_name
from schemas.grid import Block, Grid, to_utm
from schemas.layout import OsmType
from tests.shards import Arrays, make_dataset, make_info, random_arrays, store_row, write_vocabulary

GRID = Grid(gsd_m=10.0, size=32, patch=8, shard_side=4)


def dataset(folder: Path, shards: list[tuple[Block, str, Arrays]], buffer_m: float = 0.0) -> Path:
    """A published dataset of some shards."""
    info = make_info(GRID, splits=Splits(buffer_m=buffer_m))
    prepare_dataset(folder, info)
    rows = [store_row(folder, block, arrays, split) for block, split, arrays in shards]
    publish(folder, rows, write_vocabulary(folder, 8), info)
    return folder


def arrays_at(block: Block, seed: int, chips: int = 16, objects: float = 4.0) -> Arrays:
    return random_arrays(seed, chips=chips, objects=objects, grid=GRID, block=block)


def with_object(arrays: Arrays, chip: int, osm: int) -> Arrays:
    """The first object of a chip gets another OSM id."""
    ids = arrays["object_osm"].copy()
    ids[arrays["object_offset"][chip]] = osm
    return {**arrays, "object_osm": ids}


def oracle(
    shards: list[tuple[Block, str, Arrays]], buffer_m: float
) -> tuple[dict[str, int], set[int], set[int]]:
    """Every pair of chips one at a time: pairs by kind, shared ids, and those shared nearby."""
    chips = [
        (split, block.epsg, shapely.box(*a["bounds"][n]),
         set(a["object_osm"][a["object_offset"][n]:a["object_offset"][n + 1]].tolist()))
        for block, split, a in shards for n in range(len(a["epsg"]))
    ]  # fmt: skip
    found, shared, nearby = {"pixels": 0, "buffer": 0}, set(), set()
    for (s, e, p, i), (t, f, q, j) in combinations(chips, 2):
        if s == t:
            continue
        shared |= i & j
        if e != f:
            fine = shapely.segmentize(q, 1.0)
            move = Transformer.from_crs(f, e, always_xy=True).transform
            q = shapely.transform(fine, lambda xy, m=move: np.column_stack(m(*xy.T)))
        apart = p.distance(q)
        if p.intersection(q).area > 10:
            found["pixels"] += 1
        elif apart < buffer_m - 1e-3:
            found["buffer"] += 1
        if apart <= buffer_m + 1e-3:
            nearby |= i & j
    return found, shared, nearby


@settings(max_examples=25, deadline=None)
@given(
    places=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(["train", "val", "test"])),
        min_size=2, max_size=5, unique_by=lambda p: p[:2],
    ),
    buffer_m=st.sampled_from([0.0, 300.0, 1500.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_what_is_found_is_what_a_look_at_every_pair_finds(
    tmp_path_factory: pytest.TempPathFactory,
    places: list[tuple[int, int, str]],
    buffer_m: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    shards = []
    for n, (col, row, split) in enumerate(places):
        block = Block(32632, 400 + col, 4000 + row)
        arrays = arrays_at(block, 10 * seed + n, chips=int(rng.integers(1, 17)), objects=3)
        few = rng.integers(1, 40, len(arrays["object_osm"])) << 2 | OsmType.WAY
        shards.append((block, split, {**arrays, "object_osm": few}))
    folder = dataset(tmp_path_factory.mktemp("pairs"), shards)
    found, shared, nearby = oracle(shards, buffer_m)
    for crossing, expected in (("leak", shared), ("count", nearby)):
        check = check_splits(folder, buffer_m=buffer_m, crossing=crossing)
        assert {k: check.found[k] for k in found} == found
        assert check.found["object"] == len(expected)
        assert check.found["crossing"] == len(shared) - len(expected)
        assert check.passed == (not expected and not any(found.values()))


@pytest.mark.parametrize("lon", [12.0, 180.0, 0.0])
def test_chips_that_overlap_across_a_zone_border_are_found(tmp_path: Path, lon: float) -> None:
    lat, side = 47.0, GRID.shard_m
    west = int((lon + 180) % 360 // 6) or 60
    epsgs = (32600 + west, 32600 + west % 60 + 1)
    shards = []
    for n, (epsg, split) in enumerate(zip(epsgs, ("train", "test"), strict=True)):
        x, y = to_utm(epsg).transform(lon, lat)
        block = Block(epsg, math.floor(x / side), math.floor(y / side))
        shards.append((block, split, arrays_at(block, n)))
    folder = dataset(tmp_path, shards)
    for buffer_m in (0.0, 500.0):
        found, _, _ = oracle(shards, buffer_m)
        check = check_splits(folder, buffer_m=buffer_m)
        assert found["pixels"] > 3
        assert {k: check.found[k] for k in found} == found
    assert check.leaks[0].kind == "pixels"
    assert f"chip {epsgs[0]}-10000-32-" in check.leaks[0].what
    assert f"chip {epsgs[1]}-10000-32-" in check.leaks[0].what


def test_a_planted_object_is_told_with_its_chips(tmp_path: Path) -> None:
    near, far = Block(32632, 400, 4000), Block(32632, 420, 4000)
    way = 123 << 2 | OsmType.WAY
    clean = [(near, "train", arrays_at(near, 1)), (far, "test", arrays_at(far, 2))]
    assert check_splits(dataset(tmp_path / "clean", clean)).passed
    planted = [(block, split, with_object(a, 5, way)) for block, split, a in clean]
    folder = dataset(tmp_path / "planted", planted)
    check = check_splits(folder)
    assert [leak.kind for leak in check.leaks] == ["object"]
    assert check.leaks[0].what == (
        "OSM way 123 is in chip 32632-10000-32-1601-16002 (train) and "
        "chip 32632-10000-32-1681-16002 (test)"
    )
    # Its parts are 24 km apart: it may be counted only, if the user says so.
    assert check_splits(folder, crossing="count").passed
    assert check_splits(folder, crossing="count", buffer_m=30_000).found["object"] == 1


def test_neighbours_closer_than_the_buffer_are_told_with_their_distance(tmp_path: Path) -> None:
    shards = [
        (block, split, arrays_at(block, n))
        for n, (block, split) in enumerate(
            [(Block(32632, 400, 4000), "train"), (Block(32632, 402, 4000), "val")]
        )
    ]
    folder = dataset(tmp_path, shards, buffer_m=1281.0)
    check = check_splits(folder)
    assert check.buffer_m == 1281.0
    # Four side by side, six across a corner.
    assert check.found["buffer"] == 10
    assert "(val) are 1,280.0 m apart" in check.leaks[0].what
    assert check.found["scene"] == sum("of the same scene" in leak.what for leak in check.leaks)
    assert check_splits(folder, buffer_m=1280.0).passed


def test_the_same_place_in_a_training_and_an_evaluation_set_is_found(tmp_path: Path) -> None:
    blocks = [Block(32632, 400, 4000), Block(32632, 500, 4000), Block(32632, 600, 4000)]
    sets = []
    for seed, some in enumerate((blocks[:2], blocks[2:], blocks[1:2])):
        shards = [(b, "train", arrays_at(b, 10 * seed + n)) for n, b in enumerate(some)]
        sets.append(dataset(tmp_path / f"set{seed}", shards))
    assert check_splits(sets[0], against=(sets[1], None)).passed
    check = check_splits(sets[0], against=(sets[2], 1))
    assert not check.passed
    assert check.found["pixels"] == 16
    assert str(sets[2]) in check.leaks[0].what


def test_a_certificate_names_the_snapshot_and_what_was_compared(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "a", shards=3)
    other = dataset(
        tmp_path / "b", [(Block(32633, 400, 4000), "val", arrays_at(Block(32633, 400, 4000), 9))]
    )
    for against in (None, (other, None)):
        check = check_splits(folder, against=against)
        assert certify(check) == certificate_name(1)
    written = json.loads((folder / certificate_name(1)).read_text())
    assert written["snapshot"] == 1
    assert len(written["snapshot_checksum"]) == 32
    assert set(written["checks"]) == {"splits", f"against {other}"}
    assert written["checks"]["splits"]["chips"] == {"train": 18, "val": 0, "test": 0}
    assert written["checks"][f"against {other}"]["against"]["snapshot"] == 1


def test_imported_pairs_stand_on_true_north(tmp_path: Path) -> None:
    # 2.9 degrees off the central meridian at 60 north, the grid is turned by 2.5 degrees.
    geod, lonlat, half = Geod(ellps="WGS84"), (11.9, 60.0), 500.0
    info = make_info(GRID, aligned=False)
    for gap, passes in ((-0.5, False), (0.5, True)):
        folder = tmp_path / str(gap)
        prepare_dataset(folder, info)
        north = geod.fwd(*lonlat, 0.0, 2 * half + gap)[:2]
        rows = []
        for n, (split, centre) in enumerate((("train", lonlat), ("test", north))):
            px, py = to_utm(32632).transform(*centre)
            arrays = random_arrays(n, chips=1, grid=GRID)
            arrays["bounds"] = np.array([[px - half, py - half, px + half, py + half]])
            arrays["center_lonlat"] = np.array([centre])
            arrays["chip_id"] = np.array([[0, n]], np.uint64)
            rows.append(store_row(folder, Block(32632, n, 0), arrays, split))
        publish(folder, rows, write_vocabulary(folder, 8), info)
        check: SplitCheck = check_splits(folder)
        assert check.passed == passes
