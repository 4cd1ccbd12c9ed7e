"""Running shard tasks: one after the other, or on Dask, one task a shard."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def run_tasks(
    function: Callable[[T], R],
    tasks: Iterable[T],
    *,
    workers: int = 1,
    scheduler: str | None = None,
) -> Iterator[tuple[T, R | Exception, float]]:
    """Yield each task with its result, or the exception it raised, and its seconds, when done.

    workers: processes of a local cluster; 1 runs in this process. scheduler: address of a running
    Dask scheduler instead. At most a few tasks per worker are in flight, so that memory does not
    grow with their number. A worker that dies costs its task a retry elsewhere.
    """
    if scheduler is None and workers == 1:
        for task in tasks:
            yield task, *_attempt(function, task)
        return
    from distributed import Client, LocalCluster, as_completed

    local = None
    if scheduler is None:
        local = LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=40
        )
    with Client(local or scheduler) as client:
        try:
            slots = 3 * max(1, len(client.scheduler_info()["workers"]))
            pending = iter(tasks)
            running = as_completed()
            task_of = {}
            for task in pending:
                future = client.submit(_attempt, function, task, pure=False, retries=2)
                task_of[future.key] = task
                running.add(future)
                if len(task_of) == slots:
                    break
            for future in running:
                task = task_of.pop(future.key)
                if future.status == "error":
                    yield task, future.exception(), 0.0
                else:
                    yield task, *future.result()
                for following in pending:
                    new = client.submit(_attempt, function, following, pure=False, retries=2)
                    task_of[new.key] = following
                    running.add(new)
                    break
        finally:
            if local is not None:
                local.close()


def _attempt(function: Callable[[T], R], task: T) -> tuple[R | Exception, float]:
    """The result, or the exception as a value: one bad shard must not stop the others."""
    started = time.perf_counter()
    outcome: R | Exception
    try:
        outcome = function(task)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported with its shard
        outcome = error
    return outcome, time.perf_counter() - started
