"""The pretraining loop, for one device. Read `pretrain`, then `train_step`."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geolink.checkpoint import checkpoints
from geolink.device import normalise
from geolink.graph import GraphBatch
from geolink.stream import Batch, ShardStream
from geolink.training.augment import augment
from geolink.training.log import Log
from geolink.training.optim import learning_rate
from geolink.training.pin import RunPin
from geolink.training.setup import Training, save, set_up
from geolink.training.signals import stop_on_signals
from schemas.training import TrainConfig

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called with steps done, steps in all and a line of figures (`geolink.training.log`)."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    run: Path
    checkpoint: Path
    """The last one."""
    step: int
    """Steps done."""
    steps: int
    """Steps of the whole run."""
    finished: bool
    message: str
    """How it ended, for people."""
    notes: tuple[str, ...]
    """What happened on the way: where it went on, checkpoints that were left out."""
    loss: float
    """Mean loss of the last log line."""
    samples_per_s: float
    """Chips per second over this call, checkpoints included; 0 if nothing was left to do."""


def pretrain(config: TrainConfig, *, progress: Progress | None = None) -> RunResult:
    """Pretrain a model, or go on with a run that was stopped, exactly where it stood.

    What a step draws at random is a function of (seed, step) alone, so that a run that was stopped
    and one that was not are the same; on a CPU to the bit.

    Args:
        config: what to do. A run folder that holds a run of the same config goes on.
        progress: see `Progress`.

    Returns: how it ended: done, or stopped by Ctrl-C or SIGTERM after writing a checkpoint.

    Raises GeoLinkError: config and dataset do not fit, no such device, a run folder of another
    config, a loss that is not finite (with step and chips), a full disk.
    """
    t = set_up(config)
    if t.step == t.steps:
        return _result(t, "this run is finished already; give another run folder to begin anew", 0)
    first, started = t.step, time.perf_counter()
    pin = RunPin(config.dataset, t.meta.snapshot, config.run)
    scaled = config.precision == "16-mixed"
    with (
        closing(Log(config.run, step=t.step, rows=t.rows, scaled=scaled)) as log,
        closing(endless(t.stream)) as batches,
        stop_on_signals() as stop,
    ):
        t.notes += [pin.note] if pin.note else []
        for note in t.notes:
            log.message(t.step, note)
        stopped_by = None
        while t.step < t.steps and stopped_by is None:
            begun = time.perf_counter()
            batch = next(batches)
            waited_s = time.perf_counter() - begun
            t.step += 1
            lr = learning_rate(config, t.step, t.steps)
            losses, grad_norm = train_step(t, batch, lr)
            log.step(t.step, losses, grad_norm, batch.chip_id, waited_s)

            if t.step % config.log_every == 0 or t.step == t.steps:
                figures = log.line(t.step, (t.step - 1) // len(t.stream), lr)
                t.loss = figures["loss"]
                pin.renew()
                if progress is not None:
                    progress(t.step, t.steps, figures)
            # Looked at once: a signal that comes later is for the next step.
            stopped_by = stop.name
            if t.step % config.checkpoint_every == 0 or t.step == t.steps or stopped_by:
                log.fetch()
                t.rows = log.rows
                save(t)
        text = f"{t.step} of {t.steps} steps are done"
        if t.step == t.steps:
            pin.remove()
        else:
            text = f"stopped by {stopped_by}: {text}, all are kept; run again to go on"
        log.message(t.step, text)
    chips = (t.step - first) * config.batch_size
    return _result(t, text, chips / (time.perf_counter() - started))


def train_step(t: Training, batch: Batch, lr: float) -> tuple[dict[str, Tensor], Tensor]:
    """One step: losses and gradient norm, on the device. Nothing here waits for the device."""
    seed_step(t.config.seed, t.step)
    for group in t.optimizer.param_groups:
        group["lr"] = lr
    images, graph = prepare(batch, t)
    # Not `fabric.setup(model)`: that forward rounds pixels and positions to the low precision
    # before the model sees them; autocast rounds the matrix products only.
    with t.fabric.autocast():
        losses = t.model(images, graph, weight=batch.weight.to(t.fabric.device, non_blocking=True))
    t.fabric.backward(losses["total"])
    grad_norm = t.fabric.clip_gradients(
        t.model, t.optimizer, max_norm=t.config.clip, error_if_nonfinite=False
    )
    t.optimizer.step()
    t.optimizer.zero_grad()
    return losses, grad_norm


def prepare(batch: Batch, t: Training) -> tuple[Tensor, GraphBatch]:
    """A batch on the device: normalised float32 images [B, bands, y, x] and graph, augmented."""
    image = batch.image.to(t.fabric.device, non_blocking=True)
    graph = batch.graph.to(t.fabric.device, non_blocking=True)
    images = normalise(image, *t.band_scale, t.meta.nodata)
    images, graph, _ = augment(images, graph, t.config.augment, patches=t.patches)
    return images, graph


def seed_step(seed: int, step: int) -> None:
    """Seed everything that a step draws: masks, augmentation, dropout."""
    mixed = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))


def endless(stream: ShardStream) -> Generator[Batch]:
    """Batches of one epoch after the other, from where the stream stands."""
    while True:
        yield from stream
        stream.set_epoch(stream.epoch + 1)


def _result(t: Training, message: str, samples_per_s: float) -> RunResult:
    return RunResult(
        t.config.run, checkpoints(t.config.run)[-1], t.step, t.steps, t.step == t.steps, message,
        tuple(t.notes), t.loss, samples_per_s,
    )  # fmt: skip
