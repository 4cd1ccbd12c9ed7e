"""Datasets in a real S3 endpoint on loopback, well and ill, against the same built in a folder."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import yaml

from geolink.reader import open_dataset
from geolink.stream import ShardStream
from pipelines import execute, snapshot, store
from pipelines.build import BuildResult, build_dataset
from pipelines.world import World
from schemas import storage_objects
from schemas.config import DatasetConfig
from schemas.dataset import read_snapshot, snapshot_numbers
from schemas.errors import GeoLinkError, NetworkFault
from schemas.load import load_config
from schemas.storage import storage
from tests.servers.s3 import Kind, Proxy, environment, proxy, s3

FEW = {"grid": {"gsd_m": 10, "size": 32, "patch": 8, "shard_side": 4}}
"""Nine shards of the town."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3() as address:
        yield address


@pytest.fixture
def reached_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets where this process and those it starts find the endpoint."""

    def reach(address: str) -> None:
        for name, value in environment(address).items():
            monkeypatch.setenv(name, value)
        storage_objects._bucket.cache_clear()

    return reach


@pytest.fixture
def bucket(endpoint: str, reached_at: Callable[[str], None]) -> Callable[[str], str]:
    """Address of a dataset in the bucket."""
    reached_at(endpoint)
    return lambda name: f"s3://data/{name}-{time.monotonic_ns()}"


def _build(path: Path, **options: Any) -> BuildResult:
    return build_dataset(load_config(path, DatasetConfig), **options)


def _files(dataset: Path | str) -> dict[str, bytes]:
    """Every file of a dataset but the catalog, which holds times."""
    files = storage(dataset)
    names = [e.name for e in files.entries() if "catalog.duckdb" not in e.name]
    ahead = files.ahead(names)
    return {name: ahead.read(name) for name in names}


@pytest.fixture(scope="module")
def in_folder(
    town: World, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of the dataset, built in a folder."""
    folder = tmp_path_factory.mktemp("plain")
    path = folder / "plain.yaml"
    path.write_text(yaml.safe_dump(_config(town, cache, "plain")))
    return _files(_build(path).dataset)


def _config(town: World, cache: Path, dataset: str) -> dict[str, Any]:
    return {
        "name": "satellite", "dataset": dataset, "region": {"bbox": list(town.bounds_lonlat)},
        "sensor": {"preset": "sentinel-2-l2a", "bands": ["blue", "green", "red", "nir"]},
        "scenes": {"stac": str(town.s2_catalog)}, "osm": {"pbf": str(town.pbf)},
        "splits": {"block_km": 1.28, "train": 0.6, "val": 0.2, "test": 0.2}, "cache": str(cache),
        **FEW,
    }  # fmt: skip


@pytest.fixture
def config(town: World, cache: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the config of a dataset at an address."""

    def write(address: str, **changes: Any) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(_config(town, cache, address) | changes), encoding="utf-8")
        return path

    return write


def test_a_dataset_in_a_bucket_has_the_bytes_of_one_in_a_folder(
    bucket: Callable[[str], str], config: Callable[..., Path], in_folder: dict[str, bytes]
) -> None:
    path = config(bucket("whole"))
    first = _build(path, workers=2)
    assert (first.snapshot, first.published, first.failed) == (1, True, {})
    assert _files(first.dataset) == in_folder
    again = _build(path)
    assert (again.built, again.unchanged, again.published) == (0, len(first.rows), False)
    assert snapshot_numbers(first.dataset) == [1]
    opened = open_dataset(first.dataset)
    chips = [
        batch.chip_id for batch in ShardStream(opened, split=None, batch_size=8, seed=0,
                                               drop_last=False, readers=2)
    ]  # fmt: skip
    assert len(np.unique(np.concatenate(chips), axis=0)) == sum(r.chips for r in first.rows)


SOAK = pytest.mark.soak
RATES: list[Any] = [
    pytest.param({"503": 0.3}, marks=SOAK),
    pytest.param({"500": 0.3}, marks=SOAK),
    pytest.param({"cut": 0.3}, marks=SOAK),
    pytest.param({"slow": 0.3}, marks=SOAK),
    pytest.param({"lost": 0.2, "close": 0.1}, marks=SOAK),
    {"500": 0.05, "503": 0.05, "slow": 0.05, "cut": 0.05, "close": 0.03, "lost": 0.03},
]


@pytest.mark.parametrize("rates", RATES, ids=lambda r: "+".join(r))
def test_faults_of_the_store_change_no_byte(
    bucket: Callable[[str], str], config: Callable[..., Path], in_folder: dict[str, bytes],
    endpoint: str, reached_at: Callable[[str], None], rates: dict[Kind, float],
) -> None:  # fmt: skip
    address = bucket("faulty")
    with proxy(endpoint, rates, seed=1) as faulty:
        reached_at(faulty.address)
        result = _build(config(address))
        found = _files(address)
        assert sum(faulty.faults.values()) >= 0.1 * sum(faulty.requests.values())
    assert result.published
    assert found == in_folder


def test_a_store_that_does_not_answer_is_one_sentence(
    bucket: Callable[[str], str], config: Callable[..., Path], endpoint: str,
    reached_at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    address = bucket("down")
    path = config(address)
    monkeypatch.setattr(execute, "RETRY_WAITS_S", ())
    monkeypatch.setattr(execute, "_DOWN_AFTER", 2)
    with proxy(endpoint) as going_down:
        reached_at(going_down.address)
        whole = store.write_shard

        def broken(*args: Any, **kwargs: Any) -> Any:
            going_down.rates = {"503": 1.0}
            return whole(*args, **kwargs)

        monkeypatch.setattr(store, "write_shard", broken)
        with pytest.raises(
            NetworkFault, match=r"s3://data/.* cannot be reached .*503.*; run the same"
        ):
            _build(path)
    monkeypatch.undo()
    reached_at(endpoint)
    assert _build(path).published


def test_what_cannot_be_had_is_said_in_a_sentence(
    bucket: Callable[[str], str], config: Callable[..., Path]
) -> None:
    del bucket
    with pytest.raises(GeoLinkError, match="there is no bucket s3://nowhere; create it first"):
        _build(config("s3://nowhere/x"))
    with pytest.raises(GeoLinkError, match=r"ftp:// is not supported; use s3://, gs:// or az://"):
        _build(config("ftp://data/x"))
    with pytest.raises(GeoLinkError, match=r"s3://data/nothing is no GeoLink dataset"):
        open_dataset("s3://data/nothing")


def test_two_builds_at_once_both_end_in_the_dataset(
    bucket: Callable[[str], str], config: Callable[..., Path], town: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    address = bucket("two")
    first = _build(config(address))
    west, south, east, north = town.bounds_lonlat
    step = (east - west) / 100
    sides = [
        shapely.box(west, south, west + step, north), shapely.box(east - step, south, east, north)
    ]  # fmt: skip
    # Both have derived their rows from snapshot 1 when the first of them publishes.
    gate, publish, passed = threading.Barrier(2), snapshot.publish, set()

    def together(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() not in passed:
            passed.add(threading.get_ident())
            gate.wait(60)
        return publish(*args, **kwargs)

    monkeypatch.setattr(snapshot, "publish", together)
    changed = load_config(config(address, min_valid=0.99), DatasetConfig)
    results: list[BuildResult] = []
    threads = [
        threading.Thread(target=lambda h=h: results.append(build_dataset(changed, within=h)))
        for h in sides
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.snapshot or 0 for r in results) == [2, 3]
    assert snapshot_numbers(address) == [1, 2, 3]
    # Neither has undone the other.
    keys = {r.shard: r.key for r in read_snapshot(address).rows}
    before = {r.shard: r.key for r in first.rows}
    changed_shards = {s for s, key in keys.items() if key != before[s]}
    assert len(changed_shards) == sum(r.built for r in results)
    assert keys.keys() == before.keys()
    monkeypatch.undo()


def test_a_build_that_is_killed_goes_on_in_the_bucket(
    bucket: Callable[[str], str], config: Callable[..., Path], in_folder: dict[str, bytes]
) -> None:
    address = bucket("killed")
    path = config(address)
    for finished in (1, 4):
        process = subprocess.Popen(
            [sys.executable, "-m", "geolink.cli", "build", str(path)],
            stderr=subprocess.DEVNULL, env=dict(os.environ),
        )  # fmt: skip
        files = storage(address)
        while process.poll() is None and len(files.folders("shards")) < finished:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert snapshot_numbers(address) == []
    assert _build(path).published
    assert _files(address) == in_folder


def test_a_reader_of_a_cut_file_gets_all_of_it(
    endpoint: str, reached_at: Callable[[str], None]
) -> None:
    rng = np.random.default_rng(0)
    data = rng.bytes(300_000)
    with proxy(endpoint, {"cut": 0.3}, seed=2) as faulty:
        reached_at(faulty.address)
        files = storage("s3://data/cut")
        assert files.create("file", data)
        assert files.create("file", data)
        assert not files.create("file", data[::-1])
        assert [files.read("file") for _ in range(10)] == [data] * 10
        assert [e.name for _ in range(3) for e in files.entries()] == ["file"] * 3
        files.delete(["file"])
        assert not files.exists("file")
        check: Proxy = faulty
    assert check.faults["cut"] >= 4
