"""Running shard tasks: one after the other, or on Dask, one task a shard.

As many tasks are out as there are threads to run them, so that memory does not grow with their
number, a slow coordinator holds the workers back, and a worker that dies takes no other tasks with
it than those it ran.
"""

import heapq
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from schemas.errors import GeoLinkError, NetworkFault

T = TypeVar("T")
R = TypeVar("R")

_log = logging.getLogger(__name__)

RETRY_WAITS_S = (5.0, 20.0, 80.0)
"""Before a task is run again that a network fault has stopped; other faults would come again."""
DEATHS = 3
"""Workers that may die over one task of a local cluster, before it counts as failed."""
_DOWN_AFTER = 8
"""Tasks lost to the network one after the other (at least), until the network counts as down."""
_REACH_S, _WORKERS_WAIT_S = 30.0, 60.0
"""How long a scheduler may take to answer, and until it has a worker."""
_LOOK_S = 5.0
"""How often it is asked how many workers there are."""
_STARTS = 3
"""Times a local cluster is started, if a worker dies while it starts."""


@dataclass(frozen=True)
class Failure:
    """Why a task gave no result."""

    reason: str
    passing: bool = False
    """A fault of the network: the same task can succeed later."""


def run_tasks(
    function: Callable[[T], R],
    tasks: Iterable[T],
    *,
    workers: int = 1,
    scheduler: str | None = None,
) -> Iterator[tuple[T, R | Failure, float]]:
    """Yield each task with its result, or why it has none, and its seconds, when done.

    workers: processes of a local cluster; 1 runs in this process. scheduler: address of a running
    Dask scheduler instead. A task that raises is not run again, except after a network fault, with
    growing waits. A task whose worker dies is run again by another one, at most `DEATHS` times in
    all (on a scheduler of one's own: what its `allowed-failures` says).

    Raises GeoLinkError if the scheduler cannot be reached, has no workers, or is lost; NetworkFault
    if task after task is lost to the network.
    """
    queue = _Queue(tasks)
    lost = 0
    with _runner(function, workers, scheduler) as run:
        for task, attempt, outcome, seconds in run(queue):
            passing = isinstance(outcome, Failure) and outcome.passing
            if passing and attempt < len(RETRY_WAITS_S):
                queue.again(task, attempt)
                continue
            lost = lost + 1 if passing else 0
            yield task, outcome, seconds
            if isinstance(outcome, Failure) and lost >= _DOWN_AFTER:
                raise NetworkFault(
                    f"the last {lost} shards were all lost to the network: {outcome.reason}"
                )


_Done = tuple[T, int, R | Failure, float]
"""Task, its attempt (from 0), result, seconds."""


class _Queue(Generic[T]):
    """Tasks to run, with those that are to be run again when their time has come."""

    def __init__(self, tasks: Iterable[T]) -> None:
        self._fresh = iter(tasks)
        self._again: list[tuple[float, int, int, T]] = []
        self._count = 0

    def again(self, task: T, attempt: int) -> None:
        """Have a task run again, later."""
        self._count += 1
        due = time.monotonic() + RETRY_WAITS_S[attempt]
        heapq.heappush(self._again, (due, self._count, attempt + 1, task))

    def next(self) -> tuple[T, int] | None:
        """A task to run now and its attempt; None: there is none, now."""
        if self._again and self._again[0][0] <= time.monotonic():
            _, _, attempt, task = heapq.heappop(self._again)
            return task, attempt
        for task in self._fresh:
            return task, 0
        return None

    @property
    def wait_s(self) -> float | None:
        """Seconds until a task is due again; None: none is."""
        return max(0.0, self._again[0][0] - time.monotonic()) if self._again else None


@contextmanager
def _runner(
    function: Callable[[T], R], workers: int, scheduler: str | None
) -> Iterator[Callable[[_Queue[T]], Iterator[_Done[T, R]]]]:
    if scheduler is None and workers == 1:
        yield lambda queue: _run_here(function, queue)
        return
    with _client(workers, scheduler) as client:
        yield lambda queue: _run_on_dask(client, function, queue)


def _run_here(function: Callable[[T], R], queue: _Queue[T]) -> Iterator[_Done[T, R]]:
    while True:
        following = queue.next()
        if following is not None:
            task, attempt = following
            yield task, attempt, *_attempt(function, task)
        elif queue.wait_s is not None:
            time.sleep(queue.wait_s)
        else:
            return


def _run_on_dask(
    client: Any, function: Callable[[T], R], queue: _Queue[T]
) -> Iterator[_Done[T, R]]:
    from distributed import wait

    running: dict[Any, tuple[T, int]] = {}
    slots, looked, worked = 0, 0.0, time.monotonic()
    while True:
        if time.monotonic() - looked > _LOOK_S:
            threads, looked = sum(client.nthreads().values()), time.monotonic()
            slots, worked = max(1, threads), looked if threads else worked
            if looked - worked > _WORKERS_WAIT_S:
                raise GeoLinkError(
                    "all workers are gone; what has been built is kept: run the same command again"
                )
        while len(running) < slots and (following := queue.next()) is not None:
            running[client.submit(_attempt, function, following[0], pure=False)] = following
        if not running:
            if queue.wait_s is None:
                return
            time.sleep(queue.wait_s)
            continue
        limit = _LOOK_S if queue.wait_s is None else min(_LOOK_S, queue.wait_s)
        try:
            done = wait(list(running), timeout=max(limit, 0.01), return_when="FIRST_COMPLETED").done
        except TimeoutError:
            continue
        for future in done:
            task, attempt = running.pop(future)
            yield task, attempt, *_collected(future)


def _collected(future: Any) -> tuple[Any, float]:
    from distributed import KilledWorker

    if future.status != "error":
        outcome: tuple[Any, float] = future.result()
        return outcome
    error = future.exception()
    if isinstance(error, KilledWorker):
        reason = (
            "every worker that took it died; if memory was short, give workers more of it "
            "(fewer of them on a machine, smaller shards)"
        )
        return Failure(reason), 0.0
    return Failure(f"{type(error).__name__}: {error}"), 0.0


@contextmanager
def _client(workers: int, scheduler: str | None) -> Iterator[Any]:
    """A client of a local cluster, or of a scheduler that runs."""
    from distributed import Client

    if scheduler is None:
        with _local_cluster(workers) as cluster, Client(cluster) as client:
            yield client
        return
    try:
        client = Client(scheduler, timeout=_REACH_S)
    except (OSError, ValueError) as error:
        raise GeoLinkError(
            f"cannot reach a Dask scheduler at {scheduler} ({error}); check the address, or leave "
            "out --scheduler"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_WORKERS_WAIT_S)
        except TimeoutError as error:
            raise GeoLinkError(
                f"the Dask scheduler at {scheduler} has no workers; start some with `dask worker`"
            ) from error
        try:
            yield client
        except (CancelledError, OSError) as error:
            raise GeoLinkError(
                f"lost the Dask scheduler at {scheduler}; what has been built is kept: run the "
                "same command again when it is back"
            ) from error


def _local_cluster(workers: int) -> Any:
    import dask
    from distributed import LocalCluster

    settings = {
        "distributed.scheduler.allowed-failures": DEATHS - 1,
        # What has been done is remembered with its task, on both sides: a thousand by default.
        "distributed.admin.low-level-log-length": 20,
    }
    for start in range(1, _STARTS + 1):
        try:
            with dask.config.set(settings):
                return LocalCluster(
                    n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=40
                )
        except RuntimeError as error:
            _log.warning("a worker died while it started (%d of %d)", start, _STARTS)
            reason = error
    raise GeoLinkError(
        f"{workers} workers cannot be started ({reason}); try fewer, or see whether memory is short"
    ) from reason


def _attempt(function: Callable[[T], R], task: T) -> tuple[R | Failure, float]:
    """The result, or why there is none as a value: one bad shard must not stop the others."""
    started = time.perf_counter()
    outcome: R | Failure
    try:
        outcome = function(task)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported with its shard
        _log.debug("a task failed", exc_info=True)
        known = isinstance(error, GeoLinkError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        outcome = Failure(reason, isinstance(error, NetworkFault))
    return outcome, time.perf_counter() - started
