"""Streams of remote, damaged and mixed datasets, and what they take in memory."""

import json
import logging
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from geolink.reader import Dataset, open_dataset, tag_table
from geolink.stream import Batch, MixedStream, ShardStream, mixed_vocabulary, read_chips
from geolink.stream.cache import cache_folder
from schemas import storage_objects
from schemas.errors import GeoLinkError, NetworkFault
from schemas.storage import storage
from tests.servers.s3 import environment, proxy, s3
from tests.shards import make_dataset, make_grid

Key = tuple[int, int]


def keys(batch: Batch) -> list[Key]:
    return [(a, b) for a, b in batch.chip_id.tolist()]


def make_stream(dataset: Dataset, **options: Any) -> ShardStream:
    return ShardStream(dataset, **{"split": "train", "batch_size": 4, "seed": 3} | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"), shards=6, chips=7, objects=4)


@pytest.fixture(scope="module")
def endpoint(folder: Path) -> Iterator[str]:
    """An S3 endpoint that holds the dataset at s3://data/set."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3() as address, pytest.MonkeyPatch.context() as patch:
        reach(patch, address)
        remote = storage("s3://data/set")
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            remote.write(path.relative_to(folder).as_posix(), path.read_bytes())
        yield address


def reach(patch: pytest.MonkeyPatch, address: str) -> None:
    for name, value in environment(address).items():
        patch.setenv(name, value)
    storage_objects._bucket.cache_clear()


def test_faults_of_the_store_change_nothing(
    folder: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_stream(open_dataset(folder))
    rates: Any = {"500": 0.05, "503": 0.05, "slow": 0.02, "cut": 0.05, "close": 0.05}
    with proxy(endpoint, rates, seed=1) as faulty:
        reach(monkeypatch, faulty.address)
        far = make_stream(open_dataset("s3://data/set"), readers=3)
        for ours, theirs in zip(far, local, strict=True):
            assert keys(ours) == keys(theirs)
            assert torch.equal(ours.image, theirs.image)
            assert torch.equal(ours.graph.edge, theirs.graph.edge)
        assert sum(faulty.faults.values()) > 10


def test_a_cache_holds_what_was_read_once_and_mends_itself(
    folder: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = [keys(batch) for batch in make_stream(open_dataset(folder))]
    with proxy(endpoint) as counted:
        reach(monkeypatch, counted.address)
        far = make_stream(open_dataset("s3://data/set"), cache=tmp_path)
        assert [keys(batch) for batch in far] == expected
        cold = counted.requests["GET"]
        assert [keys(batch) for batch in far] == expected
        assert counted.requests["GET"] == cold
        kept = cache_folder(tmp_path, "s3://data/set")
        assert kept is not None
        images = sorted(kept.glob("shards/*/*.zarr/image/c.*"))
        assert len(images) == 6
        images[0].write_bytes(images[0].read_bytes()[:-9] + b"x" * 9)
        images[1].write_bytes(b"")
        images[2].unlink()
        (kept / images[3].relative_to(kept).parents[1] / "zarr.json").write_text("{")
        pixels = [batch.image for batch in far]
        assert counted.requests["GET"] > cold
        mended = counted.requests["GET"]
        assert all(torch.equal(a, b.image) for a, b in zip(pixels, far, strict=True))
        assert counted.requests["GET"] == mended
        # More arrays of the same shards.
        labelled = make_stream(open_dataset("s3://data/set"), cache=tmp_path, labels=("pixel",))
        assert all(batch.label_pixel is not None for batch in labelled)
    assert cache_folder(tmp_path, folder) is None


def test_a_store_that_is_down_is_no_corrupt_shard(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach(monkeypatch, endpoint)
    opened = open_dataset("s3://data/set")

    def down(*_: object) -> None:
        raise NetworkFault("s3://data cannot be reached")

    monkeypatch.setattr(storage_objects.ObjectStorage, "read", down)
    stream = make_stream(opened, on_corrupt="skip")
    with pytest.raises(NetworkFault):
        list(stream)
    assert stream.skipped == {}


def damage(dataset: Dataset, number: int) -> str:
    row = dataset.rows[number]
    chunk = Path(dataset.path) / row.path / "image" / "c.0.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"x" * 9)
    return row.shard


@pytest.mark.parametrize("lanes", [1, 4])
def test_a_damaged_shard_is_skipped_and_the_rest_stays_in_order(tmp_path: Path, lanes: int) -> None:
    dataset = open_dataset(make_dataset(tmp_path, shards=6, chips=8))
    options = {"lanes": lanes, "window_shards": 4}
    whole = [keys(batch) for batch in make_stream(dataset, **options)]
    shards = {k: r.shard for b, r in zip(read_chips(dataset, None, batch_size=8), dataset.rows)
              for k in keys(b)}  # fmt: skip
    bad = {damage(dataset, 1), damage(dataset, 4)}
    stream = make_stream(dataset, on_corrupt="skip", **options)
    found = [keys(batch) for batch in stream]
    assert found == [keys(batch) for batch in make_stream(dataset, on_corrupt="skip", **options)]
    assert [len(batch) for batch in found] == [len(batch) for batch in whole]
    assert stream.skipped.keys() == bad
    assert all("'image' is missing or damaged" in why for why in stream.skipped.values())
    for expected, got in zip(whole, found, strict=True):
        kept = [k for k in expected if shards[k] not in bad]
        assert not Counter(kept) - Counter(got)
        assert not any(shards[k] in bad for k in got)
    # Gone on in the middle, by two ranks where there are lanes for them.
    ranks = min(lanes, 2)
    parts = [
        make_stream(dataset, on_corrupt="skip", rank=r, world_size=ranks, **options)
        for r in range(ranks)
    ]
    for part in parts:
        part.load_state_dict({**part.state_dict(), "step": 5})
    rest = zip(*([keys(b) for b in part] for part in parts), strict=True)
    assert [list(chain(*step)) for step in rest] == found[5:]


def test_a_dataset_of_damaged_shards_only_ends_the_stream(tmp_path: Path) -> None:
    dataset = open_dataset(make_dataset(tmp_path, shards=2, chips=8))
    damage(dataset, 0)
    with pytest.raises(GeoLinkError, match="'image' is missing or damaged"):
        list(make_stream(dataset))
    damage(dataset, 1)
    with pytest.raises(GeoLinkError, match="no shard can be read"):
        list(make_stream(dataset, on_corrupt="skip"))
    assert not [t.name for t in threading.enumerate() if t.name.startswith("geolink-")]


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    other = make_dataset(tmp_path_factory.mktemp("other"), shards=3, chips=6, objects=3, seed=7)
    # It has two tags more, the first and the last.
    path = other / "tags" / "fabricated.parquet"
    more = pa.table({
        "id": pa.array([1, 2**64 - 1], pa.uint64()), "key": ["a", "z"], "value": ["b", "y"],
        "objects": pa.array([1, 1], pa.int64()),
    })  # fmt: skip
    pq.write_table(pa.concat_tables([more[:1], pq.read_table(path), more[1:]]), path)
    vectors = other / "tags" / "fabricated-wordllama.npy"
    np.save(vectors, np.pad(np.load(vectors), ((1, 1), (0, 0)), constant_values=2))
    return [open_dataset(folder), open_dataset(other)]


def make_mix(datasets: list[Dataset], weight: float, **options: Any) -> MixedStream:
    _, rows = mixed_vocabulary(datasets)
    streams = [
        make_stream(d, number=n, vocabulary=v, **options)
        for n, (d, v) in enumerate(zip(datasets, rows, strict=True))
    ]
    return MixedStream(streams, [weight], seed=5)


def test_a_mix_has_batches_of_one_dataset_each_in_proportion(mixed: list[Dataset]) -> None:
    stream = make_mix(mixed, 0.7)
    alone = [make_stream(dataset) for dataset in mixed]
    expected: list[list[list[Key]]] = [[], []]
    for epoch in range(6):
        for found, source in zip(expected, alone, strict=True):
            source.set_epoch(epoch)
            found += [keys(batch) for batch in source]
    seen: list[list[list[Key]]] = [[], []]
    orders = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        batches = list(stream)
        orders.append([batch.source for batch in batches])
        for batch in batches:
            seen[batch.source].append(keys(batch))
    assert [Counter(order) for order in orders] == [Counter({0: 10, 1: 7})] * 3
    assert len(stream) == 17
    assert len({tuple(order) for order in orders}) == 3
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours == theirs[: len(ours)]


def test_a_mix_goes_on_where_it_stood_at_another_number_of_ranks(mixed: list[Dataset]) -> None:
    whole = make_mix(mixed, 0.7)
    whole.set_epoch(2)
    expected = [(batch.source, keys(batch)) for batch in whole]
    for step in (0, 1, 8, 16, 17):
        first = make_mix(mixed, 0.7)
        first.set_epoch(2)
        list(islice(first, step))
        ranks = [make_mix(mixed, 0.7, rank=r, world_size=2) for r in range(2)]
        for rank in ranks:
            rank.load_state_dict(json.loads(json.dumps(first.state_dict())))
        found = zip(*(list(rank) for rank in ranks), strict=True)
        assert [(a.source, keys(a) + keys(b)) for a, b in found] == expected[step:]
    with pytest.raises(GeoLinkError, match="batches was"):
        make_mix(mixed, 0.5).load_state_dict(whole.state_dict())


def test_tags_of_a_mix_are_rows_of_one_table(mixed: list[Dataset]) -> None:
    table, rows = mixed_vocabulary(mixed)
    ids = np.concatenate([mixed[0].vocabulary, np.array([1, 2**64 - 1], np.uint64)])
    assert len(table) == len(ids)
    for dataset, places in zip(mixed, rows, strict=True):
        np.testing.assert_array_equal(dataset.vocabulary, ids[places])
    np.testing.assert_array_equal(table[rows[1]], tag_table(mixed[1]).astype(np.float32))
    plain = [list(make_stream(dataset)) for dataset in mixed]
    for batch in islice(make_mix(mixed, 0.7), 5):
        (alone,) = (b for b in plain[batch.source] if keys(b) == keys(batch))
        assert torch.equal(batch.graph.tag, torch.from_numpy(rows[batch.source])[alone.graph.tag])
        assert torch.equal(batch.graph.tag_weight, alone.graph.tag_weight)


def test_a_batch_goes_to_a_device_whole(folder: Path) -> None:
    batch = next(iter(make_stream(open_dataset(folder), labels=("pixel",))))
    there = batch.to("meta")
    assert all(t.device.type == "meta" for t in tensors(there))
    assert len(tensors(there)) == len(tensors(batch)) == 22
    assert there.chip_id is batch.chip_id


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_come_in_page_locked_memory(folder: Path) -> None:
    opened = open_dataset(folder)
    for pinned, plain in zip(make_stream(opened, pin=True), make_stream(opened), strict=True):
        assert all(t.is_pinned() for t in tensors(pinned))
        assert torch.equal(pinned.to("cuda", non_blocking=True).image.cpu(), plain.image)
        assert plain.pin_memory().image.is_pinned()


def tensors(batch: Batch) -> list[torch.Tensor]:
    found = [*vars(batch).values(), *vars(batch.graph).values()]
    return [value for value in found if torch.is_tensor(value)]


MEMORY = """
import sys
from pathlib import Path
from geolink.reader import open_dataset
from geolink.stream import ShardStream

def peak():
    # Not `ru_maxrss`: that of a new program begins with what the one that started it had.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(n.split()[1]) for n in lines if n.startswith("VmHWM")) / 1e3

stream = ShardStream(open_dataset(Path(sys.argv[1])), split="train", batch_size=16, seed=0,
                     window_shards=64, memory_mb=int(sys.argv[2]), readers=2)
for batch in ShardStream(open_dataset(Path(sys.argv[3])), split="train", batch_size=4, seed=0):
    pass
before = peak()
for epoch in range(2):
    for batch in stream:
        pass
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_stream_keeps_to_its_budget_of_memory(tmp_path: Path) -> None:
    # Shards of 10 MB, 200 MB in all.
    grid = make_grid(size=224, patch=16, shard_side=8)
    folder = make_dataset(tmp_path / "large", shards=20, chips=64, objects=40, grid=grid)
    small = make_dataset(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder), "120", str(small)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert 40 < float(done.stdout) < 120
