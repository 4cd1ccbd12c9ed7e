"""Builds killed at random moments, again and again, end in the dataset that was never disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import duckdb
import pytest

from pipelines.build import build_dataset
from pipelines.gc import collect_garbage
from schemas.config import DatasetConfig
from schemas.load import load_config
from tests.integration.conftest import WriteConfig, cache, satellite_config, town

__all__ = ["cache", "satellite_config", "town"]

DATASETS, KILLS = 10, 5


def _files(dataset: Path) -> dict[str, bytes]:
    """Every file of a dataset but the catalog, which holds times."""
    return {
        str(f.relative_to(dataset)): f.read_bytes()
        for f in sorted(dataset.rglob("*"))
        if f.is_file() and not f.name.startswith("catalog.duckdb")
    }


def _descendants(pid: int) -> list[int]:
    """Processes started by a process, and by those."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = [int(c) for c in (task / "children").read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *_descendants(child)]
    return found


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    except OSError:
        return False


def _build(config: Path, workers: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "geolink.cli", "build", str(config), f"--workers={workers}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _kill_somewhere(config: Path, chance: random.Random, workers: int, longest_s: float) -> str:
    """Start a build, kill its coordinator or one of its processes, and say what was killed."""
    build = _build(config, workers)
    time.sleep(chance.uniform(0.3, longest_s))
    below = _descendants(build.pid)
    victim = build.pid if not below or chance.random() < 0.5 else chance.choice(below)
    if build.poll() is not None:
        return "finished before"
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return "finished before"
    if victim != build.pid:
        # The build may bear it and go on to its end.
        assert build.wait(timeout=300) in (0, 1, 2)
        return "worker"
    build.wait()
    deadline = time.monotonic() + 90
    while left := [p for p in below if _alive(p)]:
        assert time.monotonic() < deadline, f"processes outlived their coordinator: {left}"
        time.sleep(0.2)
    return "coordinator"


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(DATASETS))
def test_kills_at_random_moments_leave_the_dataset_that_was_never_killed(
    satellite_config: WriteConfig, seed: int
) -> None:
    _run(satellite_config, seed, KILLS)


def test_two_kills_leave_the_dataset_that_was_never_killed(
    satellite_config: WriteConfig,
) -> None:
    _run(satellite_config, 1000, 2)


def _run(satellite_config: WriteConfig, seed: int, kills: int) -> None:
    chance = random.Random(seed)
    started = time.monotonic()
    reference = build_dataset(load_config(satellite_config("reference"), DatasetConfig))
    # A command takes some seconds to start, and a cluster some more.
    longest_s = time.monotonic() - started + 4.0
    config = satellite_config("killed")
    killed = []
    while len([k for k in killed if k != "finished before"]) < kills:
        killed.append(_kill_somewhere(config, chance, chance.choice((1, 2)), longest_s))
        if len(killed) > 4 * kills:
            break
    final = build_dataset(load_config(config, DatasetConfig))
    print(f"seed {seed}: {', '.join(killed)}")  # noqa: T201
    assert not final.failed
    # What a killed build leaves is whole shards and files that gc knows.
    collect_garbage(final.dataset, keep=1, grace=timedelta(0))
    assert _files(final.dataset) == _files(reference.dataset)
    with duckdb.connect(str(final.dataset / "catalog.duckdb"), read_only=True) as con:
        states = [state for (state,) in con.execute("SELECT state FROM builds").fetchall()]
    assert states
    assert set(states) <= {"published", "unchanged", "partial"}
