"""The stream of packed batches against chips cut out one at a time; order, resume, failures."""

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geolink.graph import pack
from geolink.reader import Arrays, Dataset, open_dataset, read_shard
from geolink.stream import Batch, ShardStream, read_chips
from geolink.stream import source as stream_source
from schemas.dataset import read_arrays
from schemas.errors import GeoLinkError
from schemas.findings import CHIP_FLAGS
from schemas.training import Quality
from tests.shards import TAGS, make_dataset, tag_id

Key = tuple[int, int]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Seven shards of six chips in `train`, and one in `val`."""
    splits = ("val", *["train"] * 7)
    folder = tmp_path_factory.mktemp("dataset")
    return open_dataset(make_dataset(folder, shards=8, objects=5, splits=splits))


def make_stream(dataset: Dataset, **options: Any) -> ShardStream:
    """A stream of batches of 4, two windows of three shards and one of one."""
    plain = {"split": "train", "batch_size": 4, "seed": 1, "window_shards": 3}
    return ShardStream(dataset, **{**plain, **options})


def keys(batch: Batch) -> list[Key]:
    """Which chips a batch holds."""
    return [(a, b) for a, b in batch.chip_id.tolist()]


def epoch(source: Iterable[Batch]) -> list[list[Key]]:
    """Which chips every batch of an epoch holds, in no order within a batch, without padding."""
    return [
        sorted(k for k, w in zip(keys(batch), batch.weight.tolist(), strict=True) if w)
        for batch in source
    ]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Two dataclasses of tensors are equal, dtypes included."""
    for field in fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if torch.is_tensor(a):
            assert torch.is_tensor(b)
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=field.name)
        else:
            assert np.array_equal(a, b), field.name


def chips_of(dataset: Dataset) -> dict[Key, tuple[Arrays, int]]:
    """Every chip by id: its shard's arrays and its position there."""
    found = {}
    for row in dataset.rows:
        shard = read_shard(dataset, row)
        found |= {(a, b): (shard, n) for n, (a, b) in enumerate(shard["chip_id"].tolist())}
    return found


def expected_graph(chips: list[tuple[Arrays, int]], dataset: Dataset) -> Any:
    """The packed graphs of chips taken one object, tag and patch at a time."""
    texts = sorted(TAGS, key=tag_id)
    a: dict[str, list[Any]] = {
        name: []
        for name in (
            "kind", "osm_class", "osm_id", "size", "anchor", "tag", "tag_weight", "edge",
            "relation", "patch", "patch_weight",
        )
    }  # fmt: skip
    ends: dict[str, list[int]] = {
        "object_offset": [0],
        "tag_offset": [0],
        "edge_offset": [0],
        "patch_offset": [0],
    }
    for s, n in chips:
        names = s["tag_text"].tobytes()
        for i in range(s["object_offset"][n], s["object_offset"][n + 1]):
            for ours, theirs in (
                ("kind", "object_kind"), ("osm_class", "object_class"), ("osm_id", "object_osm"),
                ("size", "object_size"), ("anchor", "object_anchor"),
            ):  # fmt: skip
                a[ours].append(s[theirs][i])
            weights = []
            for t in s["object_tag"][s["object_tag_offset"][i] : s["object_tag_offset"][i + 1]]:
                text = names[s["tag_text_offset"][t] : s["tag_text_offset"][t + 1]].decode()
                a["tag"].append(texts.index(text))
                weights.append(float(dataset.key_weight[texts.index(text)]))
            a["tag_weight"] += [w / sum(weights) for w in weights]
            for p in range(s["patch_offset"][i], s["patch_offset"][i + 1]):
                a["patch"].append(s["patch"][p])
                a["patch_weight"].append(s["patch_weight"][p])
            ends["tag_offset"].append(len(a["tag"]))
            ends["patch_offset"].append(len(a["patch"]))
        for e in range(s["edge_offset"][n], s["edge_offset"][n + 1]):
            a["edge"].append(s["edge"][e])
            a["relation"].append(s["relation"][e])
        ends["object_offset"].append(len(a["kind"]))
        ends["edge_offset"].append(len(a["edge"]))
    dtypes = {"tag": np.int64, "tag_weight": np.float32}
    arrays = {name: np.array(values, dtypes.get(name)) for name, values in a.items()}
    return pack(**arrays, **{name: np.array(v, np.int64) for name, v in ends.items()})


def test_a_batch_holds_what_the_shards_say_of_its_chips(dataset: Dataset) -> None:
    by_key = chips_of(dataset)
    for batch in make_stream(dataset, batch_size=5, labels=("pixel",)):
        chips = [by_key[key] for key in keys(batch)]
        for name in (
            "image", "valid", "center_lonlat", "time", "label_patch", "label_region", "label_pixel"
        ):  # fmt: skip
            expected = np.stack([shard[name][n] for shard, n in chips])
            np.testing.assert_array_equal(getattr(batch, name), expected, strict=True)
        assert batch.gsd_m.tolist() == [10.0] * len(chips)
        assert batch.source == 0
        graph = expected_graph(chips, dataset)
        torch.testing.assert_close(batch.graph.tag_weight, graph.tag_weight)
        assert_equal(batch.graph, type(graph)(**{
            **vars(graph), "tag_weight": batch.graph.tag_weight
        }))  # fmt: skip


def test_chips_without_objects_make_batches_too(tmp_path: Path) -> None:
    empty = open_dataset(make_dataset(tmp_path, shards=2, objects=0))
    batches = list(ShardStream(empty, split="train", batch_size=4, seed=0))
    assert [(len(b), b.graph.nodes, b.graph.chips) for b in batches] == [(4, 0, 4)] * 3


def test_an_epoch_holds_every_chip_once(dataset: Dataset) -> None:
    source = make_stream(dataset, batch_size=5, drop_last=False)
    batches = epoch(source)
    found = [key for batch in batches for key in batch]
    every = {k for k, (s, _) in chips_of(dataset).items()} - {
        key for batch in read_chips(dataset, "val", batch_size=6) for key in keys(batch)
    }
    assert len(found) == len(set(found)) == 42
    assert set(found) == every
    assert [len(b) for b in batches] == [5] * 8 + [2]
    assert [len(b) for b in source] == [5] * 9
    dropped = make_stream(dataset, batch_size=5)
    assert (len(source), len(dropped)) == (9, 8)
    assert epoch(dropped) == batches[:8]


def test_the_order_is_a_function_of_seed_and_epoch(dataset: Dataset) -> None:
    source = make_stream(dataset)
    first = epoch(source)
    assert epoch(source) == first == epoch(make_stream(dataset, readers=3))
    assert epoch(make_stream(dataset, seed=2)) != first
    source.set_epoch(1)
    second = epoch(source)
    assert second != first
    later = make_stream(dataset)
    later.set_epoch(1)
    assert epoch(later) == second
    # Chips of one window's shards come mixed.
    shard_of = {(a, b): n for n, r in enumerate(dataset.rows)
                for a, b in read_shard(dataset, r, ["chip_id"])["chip_id"].tolist()}  # fmt: skip
    assert len({shard_of[key] for key in first[0]}) == 2
    mixed = epoch(make_stream(dataset, lanes=1))
    assert len({shard_of[key] for key in chain(*mixed[:4])}) == 3


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_share_the_batch_that_one_process_takes(
    dataset: Dataset, world_size: int
) -> None:
    alone = epoch(make_stream(dataset, lanes=4))
    ranks = [
        epoch(make_stream(dataset, lanes=4, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert all(len(part) == 4 // world_size for rank in ranks for part in rank)
    assert [sorted(chain(*parts)) for parts in zip(*ranks, strict=True)] == alone


def test_a_last_batch_is_filled_up_with_chips_of_no_weight(dataset: Dataset) -> None:
    options = {"batch_size": 8, "drop_last": False, "lanes": 8}
    alone = epoch(make_stream(dataset, **options))
    assert sorted(chain(*alone)) == sorted(set(chain(*alone)))
    assert [len(part) for part in alone] == [8] * 5 + [2]
    ranks = [list(make_stream(dataset, rank=r, world_size=8, **options)) for r in range(8)]
    assert [[len(batch) for batch in rank] for rank in ranks] == [[1] * 6] * 8
    shared = zip(*(epoch(rank) for rank in ranks), strict=True)
    assert [sorted(chain(*parts)) for parts in shared] == alone


def test_a_stream_goes_on_where_another_stood(dataset: Dataset) -> None:
    whole = [keys(batch) for batch in make_stream(dataset)]
    for step in range(len(whole) + 1):
        source = make_stream(dataset)
        list(islice(source, step))
        resumed = make_stream(dataset, readers=2)
        resumed.load_state_dict(source.state_dict())
        assert [keys(batch) for batch in resumed] == whole[step:]
    # At another number of ranks, and without a state, too.
    source = make_stream(dataset)
    list(islice(source, 3))
    halves = [make_stream(dataset, rank=rank, world_size=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(source.state_dict())
    pairs = zip(*(epoch(half) for half in halves), strict=True)
    assert [sorted(a + b) for a, b in pairs] == [sorted(batch) for batch in whole[3:]]
    assert [keys(batch) for batch in source] == whole[3:]
    assert [keys(batch) for batch in source] == whole


def test_a_state_of_another_order_is_refused(dataset: Dataset) -> None:
    state = make_stream(dataset).state_dict()
    with pytest.raises(GeoLinkError, match="batch_size was 4 and is 6 now"):
        make_stream(dataset, batch_size=6).load_state_dict(state)
    with pytest.raises(GeoLinkError, match="seed was 1 and is 2 now"):
        make_stream(dataset, seed=2).load_state_dict(state)


def test_ranks_and_splits_that_cannot_be_are_refused(dataset: Dataset) -> None:
    with pytest.raises(GeoLinkError, match="batch_size 4 cannot be shared evenly by 3 ranks"):
        make_stream(dataset, world_size=3)
    with pytest.raises(GeoLinkError, match="rank 2"):
        make_stream(dataset, rank=2, world_size=2)
    with pytest.raises(GeoLinkError, match="no chips in split test"):
        make_stream(dataset, split="test")


def test_chips_of_too_few_valid_pixels_are_left_out(dataset: Dataset) -> None:
    valid = {key: s["valid"][n] for key, (s, n) in chips_of(dataset).items()}
    for batches in (
        make_stream(dataset, split=None, min_valid=0.75, drop_last=False),
        read_chips(dataset, None, batch_size=4, min_valid=0.75),
    ):
        found = [key for part in epoch(batches) for key in part]
        assert sorted(found) == sorted(key for key, v in valid.items() if v >= 0.75)
        assert 0 < len(found) < len(valid)


def test_chips_with_findings_are_left_out_or_weighed(dataset: Dataset) -> None:
    quality = Quality(drop=("chip_shifted", "chip_cloudy"),
                      weights={"chip_seam": 0.5, "chip_osm_empty": 0.25})  # fmt: skip
    finding = {key: int(s["finding"][n]) for key, (s, n) in chips_of(dataset).items()}
    bit = {code: 1 << n for n, code in enumerate(CHIP_FLAGS)}
    drop = bit["chip_shifted"] | bit["chip_cloudy"]
    source = make_stream(dataset, split=None, quality=quality, drop_last=False)
    weight = {k: w for b in source for k, w in zip(keys(b), b.weight.tolist(), strict=True) if w}
    assert weight.keys() == {key for key, bits in finding.items() if not bits & drop}
    assert 0 < len(weight) == source.chips < len(finding)
    for key, found in weight.items():
        seam, empty = (bool(finding[key] & bit[c]) for c in ("chip_seam", "chip_osm_empty"))
        assert found == 0.5**seam * 0.25**empty
    assert set(weight.values()) == {1.0, 0.5, 0.25, 0.125}


def test_findings_are_filtered_without_reading_shards(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a shard was read")

    monkeypatch.setattr(stream_source, "read_arrays", refuse)
    filtered = make_stream(dataset, quality=Quality(drop=("chip_shifted",)))
    assert 0 < filtered.chips < sum(r.chips for r in dataset.split_rows("train"))


def test_a_stream_without_some_chips_goes_on_where_it_stood(dataset: Dataset) -> None:
    options = {"quality": Quality(drop=("chip_shifted",)), "batch_size": 2}
    whole = epoch(make_stream(dataset, **options))
    first = make_stream(dataset, **options)
    begun = [sorted(keys(batch)) for batch in islice(first, 3)]
    second = make_stream(dataset, **options)
    second.load_state_dict(first.state_dict())
    assert begun + epoch(second) == whole
    # Weights do not change the order; what is dropped does.
    weighed = Quality(drop=("chip_shifted",), weights={"chip_seam": 0.5})
    make_stream(dataset, quality=weighed, batch_size=2).load_state_dict(first.state_dict())
    with pytest.raises(GeoLinkError, match="drop was"):
        make_stream(dataset, batch_size=2).load_state_dict(first.state_dict())


def test_chips_are_read_in_stored_order(dataset: Dataset) -> None:
    batches = list(read_chips(dataset, None, batch_size=7))
    assert [len(b) for b in batches] == [7] * 6 + [6]
    stored = np.concatenate([read_shard(dataset, r, ["chip_id"])["chip_id"] for r in dataset.rows])
    np.testing.assert_array_equal(np.concatenate([b.chip_id for b in batches]), stored)


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("geolink-")]


def test_a_loop_left_early_leaves_no_thread(dataset: Dataset) -> None:
    source = make_stream(dataset, readers=2)
    for _ in source:
        assert _threads()
        break
    gc.collect()
    assert _threads() == []


def test_memory_is_bounded_by_a_few_windows(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def counted(*arguments: Any) -> Any:
        read.append(arguments)
        return read_arrays(*arguments)

    monkeypatch.setattr(stream_source, "read_arrays", counted)
    batches = iter(make_stream(dataset, window_shards=1, readers=3))
    next(batches)
    time.sleep(0.5)
    # Three batches of four chips are made: they come from two shards of six; one more is ahead.
    assert len(read) <= 4
    del batches


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[tuple[Dataset, str]]:
    dataset = open_dataset(make_dataset(tmp_path, shards=6))
    row = dataset.rows[3]
    chunk = tmp_path / row.path / "image" / "c.0.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"x" * 9)
    return dataset, row.shard  # type: ignore[return-value]


def test_a_damaged_shard_ends_the_stream_with_its_name(damaged: tuple[Dataset, str]) -> None:
    dataset, shard = damaged
    with pytest.raises(GeoLinkError, match=f"{shard}.*'image' is missing or damaged"):
        list(make_stream(dataset, window_shards=1))
    assert _threads() == []


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from geolink.reader import open_dataset
from geolink.stream import ShardStream
stream = ShardStream(open_dataset(Path(sys.argv[1])), split="train", batch_size=2, seed=0)
batches = iter(stream)
next(batches)
if sys.argv[2] == "interrupt":
    # An interrupt that comes while Python cleans up is lost: then another comes.
    signal.setitimer(signal.ITIMER_REAL, 0.2, 5)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    while True:
        for batch in stream:
            pass
"""


@pytest.mark.parametrize(("how", "code"), [("leave", 0), ("interrupt", -2)])
def test_a_process_ends_at_once_though_batches_are_ahead(
    dataset: Dataset, how: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(dataset.path), how],
        timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert ("KeyboardInterrupt" in done.stderr) == (how == "interrupt")
