"""Builds killed at seeded random moments, and what is left of them."""

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.build import build_dataset
from schemas.config import DatasetConfig
from schemas.dataset import snapshot_numbers
from schemas.load import load_config

ROOT = Path(__file__).resolve().parents[1]
_EARLIEST_S, _LATEST_S = 0.5, 12.0


@dataclass
class Killed:
    """What was killed."""

    coordinators: int = 0
    workers: int = 0
    too_late: int = 0
    """Builds that were done before."""
    datasets: int = 0

    @property
    def kills(self) -> int:
        """Processes killed."""
        return self.coordinators + self.workers


def dataset_files(dataset: Path, *parts: str) -> dict[str, bytes]:
    """Every file of a dataset (or of some of its folders) but the catalog, which holds times."""
    return {
        str(f.relative_to(dataset)): f.read_bytes()
        for part in parts or ("",)
        for f in sorted((dataset / part).rglob("*"))
        if f.is_file() and not f.name.startswith("catalog.duckdb")
    }


def kill_somewhere(
    config: Path, rng: random.Random, killed: Killed, command: str = "build"
) -> None:
    """Start a build on two workers; kill it, or one of its workers, after some seconds.

    A build that lost a worker is left to end, and must end well. Workers must not outlive their
    coordinator.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "geolink.cli", command, "--workers", "2", str(config)], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        process.communicate(timeout=rng.uniform(_EARLIEST_S, _LATEST_S))
        killed.too_late += 1
        return
    except subprocess.TimeoutExpired:
        family = psutil.Process(process.pid).children(recursive=True)
    workers = [p for p in family if "spawn_main" in " ".join(p.cmdline())]
    if workers and rng.random() < 0.5:
        rng.choice(workers).send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
        killed.workers += 1
        return
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "workers outlive their coordinator"
    killed.coordinators += 1


def kill_many(config: Callable[[str], Path], kills: int, seed: int) -> Killed:
    """Kill builds of datasets until each is published; every one has the same bytes in the end.

    config: writes a config of the same dataset in a folder of its own.
    """
    rng, killed = random.Random(seed), Killed()
    whole = build_dataset(load_config(config("whole"), DatasetConfig))
    expected = dataset_files(Path(str(whole.dataset)))
    while killed.kills < kills:
        path = config(f"killed{killed.datasets}")
        killed.datasets += 1
        dataset = path.with_suffix("")
        while killed.kills < kills and not snapshot_numbers(dataset):
            kill_somewhere(path, rng, killed)
        build_dataset(load_config(path, DatasetConfig))
        # Nothing is left over: neither half shards nor shards that no snapshot names.
        assert dataset_files(dataset) == expected
    return killed
