"""What a run tells of itself: its log, its page, a step that went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from geolink.device import normalise
from geolink.page.run import write_run_page
from geolink.reader import open_dataset
from geolink.stream import read_chips
from geolink.training.flops import Speed, peak_flops, step_flops
from geolink.training.kept_step import write_step
from geolink.training.log import Log, NoLog
from geolink.training.mix import make_stream, open_datasets
from geolink.training.parts import endless
from geolink.training.setup import Training
from schemas.errors import GeoLinkError

_BETWEEN_PAGES_S = 60.0


def open_log(t: Training) -> Log | NoLog:
    """The log of the run, from where it stands; the first rank writes it."""
    counted = speed(t)
    if not t.ranks.first:
        return NoLog()
    return Log(
        t.config, t.model.losses, step=t.step, rows=t.rows, speed=counted,
        keep_batch=lambda step, before: keep_step(t, step, before),
    )  # fmt: skip


def tell(t: Training, log: Log | NoLog, *, now: bool) -> None:
    """Write the page of the run, and say if it would be stopped too slowly; every minute or so
    unless it is to be `now`."""
    if not isinstance(log, Log) or (time.monotonic() < t.tell_at and not now):
        return
    with log.paused():
        # One checkpoint may be in flight when the signal comes, and a step is under way.
        needed = 2 * t.writer.seconds + log.step_s
        if needed > t.config.stop_within_s and not t.slow_to_stop:
            t.slow_to_stop = True
            log.message(
                t.step,
                f"to stop this run takes up to {needed:.3g} s, more than stop_within_s "
                f"{t.config.stop_within_s:g}: have the scheduler wait longer after SIGTERM, or "
                "steps since the last checkpoint are done again",
            )
        write_run_page(t.config.run, t.meta)
        t.tell_at = time.monotonic() + _BETWEEN_PAGES_S


@contextmanager
def failure_told(t: Training, log: Log | NoLog) -> Iterator[None]:
    """What ends the run stands in its log and on its page, too."""
    try:
        yield
    except GeoLinkError as error:
        # Where nothing can be written any more, the error itself says why.
        with suppress(GeoLinkError):
            log.message(t.step, f"failed: {error}", failed=True)
            if isinstance(log, Log):
                write_run_page(t.config.run, t.meta)
        raise


def speed(t: Training) -> Speed | None:
    """What a step computes, counted on some chips of the split; none where the device's peak is
    not known."""
    peak = peak_flops(t.fabric.device, t.config.precision)
    if peak is None:
        return None
    dataset = open_dataset(t.config.dataset, t.meta.snapshot)
    batch = next(read_chips(dataset, t.config.split, batch_size=16))
    images = normalise(batch.image.to(t.fabric.device), *t.pixels[0][:3])
    with t.fabric.autocast():
        flops = step_flops(t.model, images, batch.graph.to(t.fabric.device))
    return Speed(flops / len(batch), peak * t.fabric.world_size)


def keep_step(t: Training, step: int, before: Mapping[str, Any]) -> Path:
    """Write the batch of a step into the run's folder, to run it again (`replay.py`).

    It is read again, all ranks' parts of it: the stream stood `before` it, as it says.
    Returns the file's path. Raises GeoLinkError if it cannot be read or written.
    """
    config, snapshot = t.config, t.meta.snapshot
    stream = make_stream(config, open_datasets(config, snapshot), 0, 1)
    stream.load_state_dict(before)
    with closing(endless(stream, torch.device("cpu"))) as batches:
        batch, _ = next(batches)
    path = config.run / f"nonfinite-{step:06d}.safetensors"
    write_step(path, config, snapshot, step, batch)
    return path
