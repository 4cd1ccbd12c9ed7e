"""Sampling: against chips measured one by one, and what must hold of every choice."""

import dataclasses

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipelines.features import load_features
from pipelines.osm import Extract
from pipelines.region import BlockPlan, plan_blocks
from pipelines.sampling import (
    _land_use,
    _zones,
    choose_evenly,
    objects_per_chip,
    sample_blocks,
    seeded_rank,
)
from schemas.config import Splits
from schemas.grid import Grid, block_chips, to_utm
from schemas.layout import Kind
from schemas.sources import Region, Sampling
from schemas.taxonomy import default_taxonomy

GRID = Grid(gsd_m=10, size=16, patch=8, shard_side=4)
TAXONOMY = default_taxonomy()
MONACO = (7.405, 43.72, 7.445, 43.755)


@pytest.fixture(scope="module")
def plans() -> list[BlockPlan]:
    return plan_blocks(Region(bbox=MONACO), GRID, Splits())[0]


@pytest.fixture(scope="module")
def in_parts(monaco_extract: Extract, tmp_path_factory: pytest.TempPathFactory) -> Extract:
    """Monaco in row groups of 300 features: as large tables are, more than one part."""
    path = tmp_path_factory.mktemp("parts") / "monaco.parquet"
    pq.write_table(pq.read_table(monaco_extract.parquet), path, row_group_size=300)
    return dataclasses.replace(monaco_extract, parquet=path)


def _squares(plans: list[BlockPlan]) -> np.ndarray:
    return np.concatenate([block_chips(GRID, p.block).bounds_utm[p.chips] for p in plans])


def test_objects_per_chip_are_those_that_pandas_counts(
    monaco_extract: Extract, in_parts: Extract, plans: list[BlockPlan]
) -> None:
    squares = _squares(plans)
    frame = geopandas.read_parquet(monaco_extract.parquet)
    centre = (frame["xmin"] + frame["xmax"]) / 2, (frame["ymin"] + frame["ymax"]) / 2
    x, y = to_utm(32632).transform(*centre)
    expected = [((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).sum() for x0, y0, x1, y1 in squares]
    assert sum(expected) > 5000
    for extract in (monaco_extract, in_parts):
        zones = _zones(GRID, plans)
        assert objects_per_chip(extract, zones, GRID, len(squares)).tolist() == expected


def test_land_use_is_the_class_that_covers_most_of_a_chip(
    monaco_extract: Extract, in_parts: Extract, plans: list[BlockPlan]
) -> None:
    squares = _squares(plans)
    x0, y0 = squares[:, :2].min(axis=0)
    x1, y1 = squares[:, 2:].max(axis=0)
    features = load_features(monaco_extract.parquet, 32632, (x0, y0, x1, y1), TAXONOMY)
    area = np.zeros((len(squares), len(TAXONOMY.classes) + 1))
    rows = np.flatnonzero((features.kind == Kind.POLYGON) & (features.osm_class > 0))
    for chip, square in enumerate(squares):
        box = shapely.box(*square)
        for row in rows[shapely.intersects(features.geometry[rows], box)]:
            shared = shapely.intersection(features.geometry[row], box).area
            area[chip, features.osm_class[row]] += shared
    expected = np.where(area.max(axis=1) > 0, area.argmax(axis=1), 0)
    assert len(np.unique(expected)) > 5
    for extract in (monaco_extract, in_parts):
        found = _land_use(extract, _zones(GRID, plans), GRID, TAXONOMY, len(squares))
        assert (found == expected).all()


@pytest.mark.parametrize("by", ["place", "land-use", "osm-density"])
def test_a_sample_is_even_over_strata_and_the_same_every_time(
    by: str, in_parts: Extract, monaco_extract: Extract, plans: list[BlockPlan]
) -> None:
    sample = Sampling(chips=40, by=by, seed=5)  # type: ignore[arg-type]
    first, counts = sample_blocks(plans, sample, GRID, monaco_extract, TAXONOMY)
    again, _ = sample_blocks(plans, sample, GRID, in_parts, TAXONOMY)
    assert counts == {}
    assert [p.block for p in first] == [p.block for p in again]
    assert all((a.chips == b.chips).all() for a, b in zip(first, again, strict=True))
    assert sum(int(p.chips.sum()) for p in first) == 40
    by_block = {p.block: p for p in plans}
    assert all(not (p.chips & ~by_block[p.block].chips).any() for p in first)
    other, _ = sample_blocks(plans, Sampling(chips=40, seed=6), GRID, monaco_extract, TAXONOMY)
    assert [p.chips.tobytes() for p in other] != [p.chips.tobytes() for p in first]


def test_a_region_with_too_few_chips_is_kept_whole_and_counted(
    monaco_extract: Extract, plans: list[BlockPlan]
) -> None:
    chips = sum(int(p.chips.sum()) for p in plans)
    sample = Sampling(chips=chips + 7)
    kept, counts = sample_blocks(plans, sample, GRID, monaco_extract, TAXONOMY)
    assert counts == {"sample_short": 7}
    assert sum(int(p.chips.sum()) for p in kept) == chips


def test_what_a_large_region_chooses_here_a_small_region_here_chooses_too(
    monaco_extract: Extract, plans: list[BlockPlan]
) -> None:
    def chosen(some: list[BlockPlan]) -> set[tuple[str, int]]:
        kept, _ = sample_blocks(some, Sampling(chips=50), GRID, monaco_extract, TAXONOMY)
        return {(p.block.name, int(i)) for p in kept for i in np.flatnonzero(p.chips)}

    half = plans[: len(plans) // 2]
    names = {p.block.name for p in half}
    here = {c for c in chosen(plans) if c[0] in names}
    assert 0 < len(here) < 50
    assert here <= chosen(half)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 4)),
    st.integers(1, 70),
    st.integers(0, 2**32),
)
def test_no_stratum_gets_more_than_one_chip_above_another_that_has_more(
    stratum: np.ndarray, chips: int, seed: int
) -> None:
    ids = np.stack([np.arange(len(stratum)), np.arange(len(stratum))], axis=1).astype(np.uint64)
    rank = seeded_rank(seed, ids)
    kept = choose_evenly(stratum, rank, ids, chips)
    assert len(kept) == min(chips, len(stratum))
    assert (np.diff(kept) > 0).all()
    of = np.bincount(stratum, minlength=5)
    got = np.bincount(stratum[kept], minlength=5)
    for a in range(5):
        unused = rank[(stratum == a) & ~np.isin(np.arange(len(stratum)), kept)]
        used = rank[kept][stratum[kept] == a]
        assert not len(unused) or not len(used) or used.max() <= unused.min()
        if got[a] < of[a]:
            assert (got[a] + 1 >= got).all()
    order = np.random.default_rng(0).permutation(len(stratum))
    shuffled = choose_evenly(stratum[order], rank[order], ids[order], chips)
    assert set(order[shuffled].tolist()) == set(kept.tolist())


def test_ranks_are_spread_and_depend_on_the_seed() -> None:
    ids = np.stack([np.full(4096, 7), np.arange(4096)], axis=1).astype(np.uint64)
    a, b = seeded_rank(0, ids), seeded_rank(1, ids)
    assert len(np.unique(np.r_[a, b])) == 8192
    assert np.bincount((a >> np.uint64(61)).astype(int), minlength=8).min() > 400
    assert abs(np.corrcoef(a.astype(float), b.astype(float))[0, 1]) < 0.05
