"""Many kills: builds, refreshes beside readers and gc. `make soak`."""

import random
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geolink.reader import open_dataset
from geolink.stream import ShardStream
from pipelines.build import build_dataset
from pipelines.gc import collect_garbage
from schemas.config import DatasetConfig
from schemas.dataset import read_snapshot
from schemas.load import load_config
from schemas.pins import remove_pin, write_pin
from tests.integration.conftest import WriteConfig, cache, satellite_config, town
from tests.kills import Killed, dataset_files, kill_many, kill_somewhere

__all__ = ["cache", "satellite_config", "town"]

pytestmark = pytest.mark.soak


def test_fifty_kills_of_builds_change_no_byte(satellite_config: WriteConfig) -> None:
    killed = kill_many(satellite_config, kills=50, seed=50)
    print(killed)
    assert killed.coordinators >= 15
    assert killed.workers >= 10


class _Reader(threading.Thread):
    """Reads a pinned snapshot again and again; keeps what it saw and what went wrong."""

    def __init__(self, dataset: Path, number: int) -> None:
        super().__init__(daemon=True)
        self.dataset = open_dataset(dataset, number)
        self.stop, self.epochs = threading.Event(), 0
        self.seen: set[Any] = set()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                stream = ShardStream(self.dataset, split=None, batch_size=16, seed=0)
                sums = [int(np.asarray(b.image, np.uint64).sum()) for b in stream]
                self.seen.add(tuple(sums))
                self.epochs += 1
        except Exception as error:  # noqa: BLE001 - the test reports it
            self.error = error


def test_kills_of_refreshes_disturb_no_reader_and_leave_what_gc_removes(
    satellite_config: WriteConfig,
) -> None:
    rng, killed = random.Random(7), Killed()
    path = satellite_config("refreshed")
    dataset = path.with_suffix("")
    build_dataset(load_config(path, DatasetConfig))
    write_pin(dataset, "reader", 1)
    reader = _Reader(dataset, 1)
    reader.start()
    rounds = 0
    while killed.kills < 20:
        rounds += 1
        valid = 0.5 + 0.02 * rounds
        path = satellite_config("refreshed", min_valid=valid)
        for _ in range(rng.randrange(1, 4)):
            kill_somewhere(path, rng, killed, "refresh")
        if rounds % 2:
            build_dataset(load_config(path, DatasetConfig), change=True)
        collect_garbage(dataset, keep=1, grace=timedelta(0))
    build_dataset(load_config(path, DatasetConfig), change=True)
    reader.stop.set()
    reader.join(120)
    assert reader.error is None
    assert reader.epochs >= 10
    assert len(reader.seen) == 1
    print(killed, f"{reader.epochs} epochs read meanwhile")
    remove_pin(dataset, "reader")
    collect_garbage(dataset, keep=1, grace=timedelta(0))
    scratch = satellite_config("scratch", min_valid=valid)
    build_dataset(load_config(scratch, DatasetConfig))
    new = scratch.with_suffix("")
    assert dataset_files(dataset, "shards", "tags") == dataset_files(new, "shards", "tags")
    assert read_snapshot(dataset).rows == read_snapshot(new).rows
