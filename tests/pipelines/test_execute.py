"""Tasks on real processes: faults, deaths, lost schedulers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from pipelines import execute
from pipelines.execute import Failure, run_tasks
from schemas.errors import GeoLinkError, NetworkFault


class Job(NamedTuple):
    """What a task does: its number, and a folder in which it counts its attempts."""

    number: int
    folder: Path
    fails: int = 0
    how: str = "network"


def work(job: Job) -> int:
    """Fail so many times, then give the number."""
    attempt = len(list(job.folder.glob(f"{job.number}-*")))
    (job.folder / f"{job.number}-{attempt}").touch()
    if attempt < job.fails:
        if job.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if job.how == "network":
            raise NetworkFault("no connection")
        raise ValueError("bad data")
    return job.number


def attempts(job: Job) -> int:
    return len(list(job.folder.glob(f"{job.number}-*")))


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "RETRY_WAITS_S", (0.05, 0.1, 0.2))


@pytest.mark.parametrize("workers", [1, 2])
def test_only_network_faults_are_tried_again(tmp_path: Path, workers: int) -> None:
    jobs = [Job(n, tmp_path) for n in range(6)]
    jobs[1] = Job(1, tmp_path, fails=2, how="network")
    jobs[2] = Job(2, tmp_path, fails=99, how="network")
    jobs[3] = Job(3, tmp_path, fails=1, how="data")
    found = {job.number: outcome for job, outcome, _ in run_tasks(work, jobs, workers=workers)}
    assert found == {
        0: 0, 1: 1, 4: 4, 5: 5,
        2: Failure("no connection", passing=True),
        3: Failure("ValueError: bad data"),
    }  # fmt: skip
    assert [attempts(job) for job in jobs] == [1, 3, 4, 1, 1, 1]


def test_a_network_that_is_down_is_given_up(tmp_path: Path) -> None:
    jobs = [Job(n, tmp_path, fails=99) for n in range(100)]
    found = run_tasks(work, jobs)
    for _ in range(8):
        next(found)
    with pytest.raises(NetworkFault, match="last 8 shards were all lost to the network: no conn"):
        next(found)


def test_a_worker_that_dies_costs_one_task_a_try_and_no_other_anything(tmp_path: Path) -> None:
    jobs = [Job(n, tmp_path) for n in range(8)]
    jobs[2] = Job(2, tmp_path, fails=1, how="die")
    jobs[5] = Job(5, tmp_path, fails=99, how="die")
    found = {job.number: outcome for job, outcome, _ in run_tasks(work, jobs, workers=2)}
    killer = found.pop(5)
    assert isinstance(killer, Failure)
    assert "every worker that took it died" in killer.reason
    assert found == {n: n for n in range(8) if n != 5}
    assert attempts(jobs[2]) == 2
    assert attempts(jobs[5]) == execute.DEATHS
    # A result that lay finished on a worker when it died is made again: four of them die here.
    assert max(attempts(job) for job in jobs if not job.fails) <= 1 + execute.DEATHS + 1


def test_few_tasks_are_taken_ahead_of_those_that_are_done(tmp_path: Path) -> None:
    taken = []

    def tasks() -> Iterator[Job]:
        for n in range(40):
            taken.append(n)
            yield Job(n, tmp_path)

    ahead = []
    for done, _ in enumerate(run_tasks(work, tasks(), workers=2), start=1):
        time.sleep(0.01)  # a coordinator slower than its workers
        ahead.append(len(taken) - done)
    assert len(ahead) == 40
    assert max(ahead) <= 2


def test_a_scheduler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "_REACH_S", 0.3)
    with pytest.raises(
        GeoLinkError, match=r"cannot reach a Dask scheduler at tcp://127\.0\.0\.1:9"
    ):
        list(run_tasks(work, [], scheduler="tcp://127.0.0.1:9"))
    with pytest.raises(GeoLinkError, match="cannot reach a Dask scheduler at nonsense"):
        list(run_tasks(work, [], scheduler="nonsense"))


def test_a_running_scheduler_is_used_and_its_loss_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "_WORKERS_WAIT_S", 0.5)
    file = tmp_path / "scheduler.json"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1",
         "--port", "0", "--no-dashboard", "--scheduler-file", str(file)],
        stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    worker = None
    try:
        while not file.exists() or not file.read_text():
            time.sleep(0.05)
        address = json.loads(file.read_text())["address"]
        with pytest.raises(GeoLinkError, match="has no workers"):
            list(run_tasks(work, [], scheduler=address))
        worker = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1",
             "--no-dashboard", "--no-nanny"],
            stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        monkeypatch.setattr(execute, "_WORKERS_WAIT_S", 30)
        jobs = [Job(n, tmp_path) for n in range(5)]
        found = sorted(outcome for _, outcome, _ in run_tasks(work, jobs, scheduler=address))
        assert found == [0, 1, 2, 3, 4]
        going = run_tasks(work, [Job(n, tmp_path) for n in range(9)], scheduler=address)
        next(going)
        scheduler.kill()
        with pytest.raises(GeoLinkError, match="lost the Dask scheduler"):
            list(going)
    finally:
        for process in (scheduler, worker):
            if process is not None:
                process.kill()
                process.wait()
