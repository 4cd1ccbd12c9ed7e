"""Begins a process for each of the devices of a run, and waits for them.

The processes are told who they are as torchrun would (torch.distributed.run), and end with this
one. Each has a pipe to it, for what is to be printed here: progress, the result, what went wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from geolink.training.signals import stop_on_signals
from schemas.errors import GeoLinkError
from schemas.training import TrainConfig

if TYPE_CHECKING:
    from geolink.training.loop import Progress, RunResult

_RANK = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
from geolink.training.launch import run_rank
run_rank()
"""
"""Before it heeds signals, Ctrl-C ends it without a traceback, as SIGTERM does."""

_GRACE_S = 15.0
"""How long the others may take to end once one has failed."""


def launch(config: TrainConfig, progress: Progress | None = None) -> RunResult:
    """`pretrain` in a process for each of `config.devices`, on this machine.

    Ctrl-C and SIGTERM are passed on; all processes stop after the same step. Where they end before
    their first, this one ends as it would alone.

    Raises GeoLinkError: what `pretrain` raises in any of them; a process that was killed.
    """
    from pydantic import TypeAdapter

    from geolink.training.loop import RunResult

    ranks = [_begin(config, n, port) for port in [_free_port()] for n in range(config.devices)]
    name = None
    try:
        with stop_on_signals() as stop:
            results = _listen(ranks, progress, lambda: stop.name)
    except _EndedBySignalError as ended:
        results, name = {}, ended.name
    finally:
        for process, pipe in ranks:
            process.kill()
            process.wait()
            pipe.close()
    if name is not None:
        signal.raise_signal(signal.Signals[name])
    return TypeAdapter(RunResult).validate_python(results)


class _EndedBySignalError(Exception):
    """The processes were told to end before they could heed it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


_Rank = tuple["subprocess.Popen[bytes]", IO[bytes]]


def _begin(config: TrainConfig, rank: int, port: int) -> _Rank:
    read, write = os.pipe()
    threads = max((os.cpu_count() or 1) // config.devices, 1)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.devices),
        "LOCAL_WORLD_SIZE": str(config.devices), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "geolink",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", _RANK, config.model_dump_json(), str(write)],
        # Its standard input ends when this process does. A session of its own: Ctrl-C reaches it
        # through this process only, and once.
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[write], env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(write)
    return process, os.fdopen(read, "rb")


def _listen(
    ranks: list[_Rank], progress: Progress | None, stop: Callable[[], str | None]
) -> dict[str, Any]:
    """Pass on what the ranks say until all have ended; what rank 0 returned.

    Raises GeoLinkError if one of them failed.
    """
    failures: list[tuple[int, dict[str, Any]]] = []
    result, passed_on, deadline = None, False, None
    with selectors.DefaultSelector() as selector:
        for rank, (_, pipe) in enumerate(ranks):
            selector.register(pipe, selectors.EVENT_READ, rank)
        while selector.get_map() and (deadline is None or time.monotonic() < deadline):
            if stop() and not passed_on:
                passed_on = True
                for process, _ in ranks:
                    process.send_signal(getattr(signal, stop() or ""))
            for key, _ in selector.select(0.2):
                line = ranks[key.data][1].readline()
                if not line:
                    selector.unregister(key.fileobj)
                    if ranks[key.data][0].wait() and deadline is None:
                        deadline = time.monotonic() + _GRACE_S
                    continue
                said = json.loads(line)
                if "progress" in said and progress is not None:
                    progress(*said["progress"])
                elif "result" in said:
                    result = said["result"]
                elif "error" in said or "crash" in said:
                    failures.append((key.data, said))
    if result is not None and not failures:
        return dict(result)
    name = stop()
    if name is not None and _ended_by(signal.Signals[name], ranks, failures):
        raise _EndedBySignalError(name)
    raise _failure(ranks, failures)


def _ended_by(
    number: signal.Signals, ranks: list[_Rank], failures: list[tuple[int, dict[str, Any]]]
) -> bool:
    """Whether the signal itself ended a process; no mistake was found."""
    if any("error" in said and not said["other"] for _, said in failures):
        return False
    return any(process.poll() == -number for process, _ in ranks)


def _failure(ranks: list[_Rank], failures: list[tuple[int, dict[str, Any]]]) -> GeoLinkError:
    """What is told of a run that failed: the mistake, else the process that was killed, else the
    first that broke; the others break because it does."""
    for _, said in failures:
        if "error" in said and not said["other"]:
            return GeoLinkError(said["error"])
    again = "run again to go on from the last checkpoint"
    for rank, (process, _) in enumerate(ranks):
        if process.returncode is not None and process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            return GeoLinkError(
                f"process {rank} of {len(ranks)} was ended by {name} (memory may have run out); "
                + again
            )
    for rank, said in failures:
        if "crash" in said:
            sys.stderr.write(said["crash"])
            return GeoLinkError(f"process {rank} of {len(ranks)} broke: {said['why']}; {again}")
    told = failures[0][1]["error"] if failures else "a process ended without a word"
    return GeoLinkError(f"{told}; {again}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_rank() -> None:
    """What one of the processes does, with its config and its pipe as arguments."""
    status = _pretrain()
    # At once: libraries of devices may hang when they are taken down after a failure.
    sys.stderr.flush()
    os._exit(status)


def _pretrain() -> int:
    from geolink.training.distributed import OtherRankFailed
    from geolink.training.loop import pretrain

    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = TrainConfig.model_validate_json(sys.argv[1])
    first = os.environ["RANK"] == "0"
    with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8") as pipe:

        def say(**what: Any) -> None:
            pipe.write(json.dumps(what, default=str) + "\n")
            pipe.flush()

        try:
            result = pretrain(config, progress=lambda *p: say(progress=p) if first else None)
        except GeoLinkError as error:
            say(error=str(error), other=isinstance(error, OtherRankFailed))
            return 2
        except BaseException as error:  # noqa: BLE001 - told by the process that waits
            first_line = next(iter(str(error).splitlines()), "")
            say(crash=traceback.format_exc(), why=f"{type(error).__name__}: {first_line}")
            return 1
        if first:
            say(result=dataclasses.asdict(result))
    return 0


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
