"""The order of a stream, whoever reads it: ranks, readers, lanes, resumed or not; what is read."""

from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geolink.reader import Dataset, open_dataset
from geolink.stream import Batch, ShardStream
from geolink.stream.order import Sequence
from geolink.stream.sampling import MOST, Selection, repeat_factor, select
from pipelines.snapshot import publish
from pipelines.store import prepare_dataset
from schemas.errors import GeoLinkError
from schemas.findings import CHIP_FLAGS
from schemas.grid import Block
from schemas.storage_local import LocalStorage
from schemas.training import Quality
from tests.shards import make_grid, make_info, random_arrays, store_row, write_vocabulary

Key = tuple[int, int]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Nine shards of 3 to 40 chips."""
    folder = tmp_path_factory.mktemp("dataset")
    grid = make_grid(size=16, patch=8, shard_side=8)
    prepare_dataset(folder, make_info(grid))
    rows = []
    for n, chips in enumerate((3, 40, 17, 8, 16, 33, 5, 20, 11)):
        block = Block(32632, 10 + n, 100)
        arrays = random_arrays(n, chips=chips, objects=2, grid=grid, block=block)
        rows.append(store_row(folder, block, arrays))
    publish(folder, rows, write_vocabulary(folder, 4), make_info(grid))
    return open_dataset(folder)


def make_stream(dataset: Dataset, **options: Any) -> ShardStream:
    return ShardStream(dataset, **{"split": "train", "batch_size": 8, "seed": 3} | options)


def keys(batch: Batch) -> list[tuple[int, int, float]]:
    """Chips of a batch with their weights."""
    return [(a, b, w) for (a, b), w in zip(batch.chip_id.tolist(), batch.weight.tolist())]


def run(dataset: Dataset, ranks: int, steps: int | None, state: Any, **options: Any) -> Any:
    """What the ranks' batches hold together, step by step, and the state after so many steps."""
    streams = [make_stream(dataset, rank=r, world_size=ranks, **options) for r in range(ranks)]
    for stream in streams:
        if state is not None:
            stream.load_state_dict(state)
    parts = [[keys(batch) for batch in islice(stream, steps)] for stream in streams]
    states = [stream.state_dict() for stream in streams]
    assert all(state == states[0] for state in states)
    return [list(chain(*step)) for step in zip(*parts, strict=True)], states[0]


@given(
    lanes=st.sampled_from([1, 2, 4, 8]),
    ranks=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=2, max_size=3),
    readers=st.integers(1, 3),
    window=st.integers(1, 12),
    drop_last=st.booleans(),
    balance=st.sampled_from([0.0, 0.9]),
    epoch=st.integers(0, 2),
    stops=st.lists(st.integers(0, 9), min_size=2, max_size=2),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_who_reads_and_who_goes_on_changes_nothing(
    dataset: Dataset, lanes: int, ranks: list[int], readers: int, window: int, drop_last: bool,
    balance: float, epoch: int, stops: list[int],
) -> None:  # fmt: skip
    options: dict[str, Any] = {
        "lanes": lanes, "window_shards": window, "drop_last": drop_last, "balance": balance,
    }  # fmt: skip
    alone = make_stream(dataset, **options)
    alone.set_epoch(epoch)
    expected = [keys(batch) for batch in alone]
    alone.set_epoch(epoch)
    state, found = alone.state_dict(), []
    for number, size in enumerate(ranks):
        size = min(size, lanes)
        last = number + 1 == len(ranks)
        steps = None if last else min(stops[number], len(expected) - len(found))
        if steps == 0:
            continue
        if len(found) < len(expected):
            part, state = run(dataset, size, steps, state, readers=readers, **options)
            found += part
    assert found == expected
    assert len(found) == len(alone)
    assert all(len(step) == 8 for step in found)
    counted = Counter((a, b) for a, b, w in chain(*found) if w)
    times = set(counted.values())
    total = sum(counted.values())
    assert total == (len(found) * 8 if drop_last else alone.chips)
    assert times <= ({1} if balance == 0 else set(range(1, MOST + 1)))
    if not drop_last and balance == 0:
        assert len(counted) == alone.chips == 153


def test_each_rank_reads_its_share_of_the_shards(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [Path(dataset.path) / row.path / "image" for row in dataset.rows]
    whole = sum(p.stat().st_size for image in images for p in image.glob("c.*"))
    read: list[int] = []
    plain = LocalStorage.read_into

    def counted(self: LocalStorage, name: str, out: Any) -> Any:
        if "/image/" in name:
            read.append((self.folder / name).stat().st_size)
        return plain(self, name, out)

    monkeypatch.setattr(LocalStorage, "read_into", counted)
    shares = []
    for rank in range(4):
        read.clear()
        list(make_stream(dataset, rank=rank, world_size=4, lanes=4))
        shares.append(sum(read) / whole)
    # Chunks of 16 chips on the borders of lanes are read twice; these shards are very small.
    assert max(shares) < 0.5
    assert 1 <= sum(shares) < 1.5


def test_lanes_that_cannot_be_shared_are_refused(dataset: Dataset) -> None:
    with pytest.raises(
        GeoLinkError, match=r"2 lanes cannot be shared evenly by 4 ranks.*set lanes"
    ):
        make_stream(dataset, lanes=2, world_size=4)
    with pytest.raises(GeoLinkError, match="lanes was 4 and is 2 now"):
        make_stream(dataset, lanes=2).load_state_dict(make_stream(dataset, lanes=4).state_dict())
    with pytest.raises(GeoLinkError, match="153 chips cannot be cut into 256 lanes"):
        make_stream(dataset, lanes=256, batch_size=256)


def test_a_budget_of_memory_makes_windows_smaller(dataset: Dataset) -> None:
    assert make_stream(dataset, memory_mb=1000).state_dict()["order"]["lanes"] == 8
    small = make_stream(dataset, memory_mb=33, window_shards=64, batch_size=64)
    assert small.state_dict()["order"]["lanes"] < 64
    assert sum(len(b) for b in small) == 128
    with pytest.raises(GeoLinkError, match=r"memory_mb 33 is too little .* set it to \d+ at least"):
        make_stream(dataset, memory_mb=33, lanes=64, batch_size=64)


@given(
    share=st.lists(st.floats(0.05, MOST), min_size=1, max_size=40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_shares_are_rounded_up_or_down_and_add_up(share: list[float], seed: int) -> None:
    n = len(share)
    selection = Selection(np.array([0, n]), np.arange(n), np.array(share))
    times = selection.times(np.random.default_rng(seed))
    assert times.sum() == selection.total == round(sum(share))
    scaled = np.array(share) * selection.total / sum(share)
    assert np.all(times >= np.floor(scaled - 1e-9))
    assert np.all(times <= np.ceil(scaled + 1e-9))


def test_rare_classes_are_seen_more_often() -> None:
    # 100 chips: class 0 on all, class 1 on 4 of them, class 2 on one, class 3 on none.
    presence = np.zeros((100, 4), bool)
    presence[:, 0] = True
    presence[:4, 1] = True
    presence[4, 2] = True
    factor = repeat_factor(presence, 0.16)
    assert factor[:4].tolist() == [2.0] * 4
    assert factor[4] == 4.0
    assert factor[5:].tolist() == [1.0] * 95
    kept = [np.ones(60, bool), np.ones(40, bool)]
    selection = select(kept, None, [presence[:60], presence[60:]], 0.16)
    assert selection.total == 107
    counts = Counter(
        chip
        for w in Sequence(selection, 0, 5).windows(0, 1, 8)
        for p in Sequence(selection, 0, 5).pieces(w)
        for chip in (p.chips + 60 * p.shard).tolist()
    )
    assert [counts[n] for n in range(6)] == [2, 2, 2, 2, 4, 1]


def test_a_chip_seen_several_times_is_so_far_apart() -> None:
    share = np.ones(256)
    share[:20] = 4
    selection = Selection(np.array([0, 256]), np.arange(256), share)
    sequence = Sequence(selection, 1)
    (window,) = sequence.windows(0, 1, 1)
    (piece,) = sequence.pieces(window)
    chips = piece.chips[sequence.order(window, [piece])]
    for chip in range(20):
        places = np.flatnonzero(chips == chip)
        assert len(places) == 4
        assert np.diff(places).min() > len(chips) / 4 * 0.7


def test_chips_are_seen_as_often_as_their_findings_weigh(dataset: Dataset) -> None:
    quality = Quality(weights={"chip_seam": 0.5}, by="sampling")
    counted: Counter[Key] = Counter()
    stream = make_stream(dataset, quality=quality, drop_last=False)
    for epoch in range(12):
        stream.set_epoch(epoch)
        for batch in stream:
            assert set(batch.weight.tolist()) <= {0.0, 1.0}
            counted.update((a, b) for a, b, w in keys(batch) if w)
    seam = 1 << CHIP_FLAGS.index("chip_seam")
    flags = np.concatenate([np.array(r.chip_findings) & seam for r in dataset.rows]) > 0
    assert stream.chips == round(153 - flags.sum() / 2)
    assert sum(counted.values()) == 12 * stream.chips
    assert sorted(counted.values())[-5:] == [12] * 5
    assert 4 <= np.mean(sorted(counted.values())[: flags.sum()]) <= 8
