"""The pretraining loop. Read `pretrain`, then `train`, then `train_step`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geolink.checkpoint import checkpoints
from geolink.device import normalise
from geolink.models.ranks import one_batch
from geolink.stream import Batch
from geolink.training.augment import augment
from geolink.training.average import update_average
from geolink.training.distributed import gathering, launched, open_ranks, whole
from geolink.training.draws import Part
from geolink.training.launch import launch
from geolink.training.look import look, look_due
from geolink.training.optim import learning_rate, set_rate
from geolink.training.parts import chip_context, chip_pairs, endless, moved, split
from geolink.training.pin import RunPin
from geolink.training.placement import place_gsd_m
from geolink.training.reporting import failure_told, open_log, tell
from geolink.training.setup import Training, hold_run, newly_skipped, save, set_up
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
    stopped_by: str | None
    """`SIGINT` or `SIGTERM`, if one of them stopped it."""
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
    and one that was not are the same; on a CPU to the bit. On several devices it is the same run
    but for rounding and for dropout.

    Args:
        config: what to do. A run folder that holds a run of the same config goes on.
        progress: see `Progress`.

    Returns: how it ended: done, or stopped by Ctrl-C or SIGTERM after writing a checkpoint.

    Raises GeoLinkError: config and dataset do not fit, no such device, a run folder of another
    config, a loss that is not finite (with step and chips), a full disk.
    """
    if config.devices > 1 and launched() is None:
        return launch(config, progress)
    with open_ranks(config) as ranks, hold_run(config, ranks) as began_with:
        t = set_up(config, ranks, began_with)
        if t.step < t.steps:
            return train(t, progress)
        return _result(t, "this run is finished already; give another run folder to begin anew", 0)


def train(t: Training, progress: Progress | None) -> RunResult:
    """The steps that are left; all ranks do the same, the first one writes and tells."""
    config, first, started = t.config, t.step, time.perf_counter()
    pin = RunPin(t.snapshots, config.run, held=t.ranks.first)
    with (
        closing(t.writer),
        closing(open_log(t)) as log,
        failure_told(t, log),
        closing(endless(t.stream, where(t))) as batches,
        stop_on_signals() as stop,
    ):
        t.notes += [pin.note] if pin.note else []
        for note in t.notes:
            log.message(t.step, note)
        stopped_by = None
        while t.step < t.steps and stopped_by is None:
            before, begun = t.stream_state, time.perf_counter()
            batch, t.stream_state = next(batches)
            waited_s = time.perf_counter() - begun
            t.step += 1
            lr = learning_rate(config, t.step, t.steps)
            losses, grad_norm = train_step(t, batch, lr)
            log.step(t.step, losses, grad_norm, t.ranks.rows(batch.chip_id), waited_s, before)
            t.writer.check()

            if t.step % config.log_every == 0 or t.step == t.steps:
                figures = log.line(t.step, (t.step - 1) // len(t.stream), lr)
                t.loss = figures["loss"]
                for text in newly_skipped(t):
                    t.notes.append(text)
                    log.message(t.step, text)
                pin.renew()
                if progress is not None:
                    progress(t.step, t.steps, figures)
            # Looked at once: a signal that comes later is for the next step.
            stopped_by = t.ranks.stop(stop.name)
            looked = look_due(t) and not stopped_by
            if looked:
                look(t, log, stop)
                stopped_by = t.ranks.stop(stop.name)
            at_end = t.step == t.steps or stopped_by
            if t.step % config.checkpoint_every == 0 or looked or at_end:
                log.fetch()
                t.rows = log.rows
                save(t)
                tell(t, log, now=looked)
        t.writer.wait()
        text = f"{t.step} of {t.steps} steps are done"
        if t.step == t.steps:
            pin.remove()
        else:
            text = (
                f"stopped by {stopped_by}: {text}, all are kept{stop.since()}; run again to go on"
            )
        log.message(t.step, text, ended=True)
        tell(t, log, now=True)
    chips = (t.step - first) * config.batch_size
    t.ranks.tell("all is written")
    return _result(t, text, chips / (time.perf_counter() - started), stopped_by)


def train_step(t: Training, batch: Batch, lr: float) -> tuple[dict[str, Tensor], Tensor]:
    """One step: losses and gradient norm, on the device. Nothing here waits for the device."""
    config = t.config
    set_rate(t.optimizer, lr)
    parts = split(batch, config.accumulate)
    shares, draws = share_out(t, parts)
    losses: dict[str, Tensor] = {}
    with one_batch():
        for n, (part, share, draw) in enumerate(zip(parts, shares, draws, strict=True)):
            seed_step(config.seed, t.step)
            inputs = prepare(part, t, draw)
            if draw.number:
                seed_step(config.seed, t.step, draw.number)
            # Not `fabric.setup(model)`: that forward rounds pixels and positions to the low
            # precision before the model sees them; autocast rounds the matrix products only.
            with gathering(t.forward, n + 1 == len(parts)):
                with t.fabric.autocast():
                    found = t.forward(**inputs)
                t.fabric.backward(found["total"] * share if len(parts) > 1 else found["total"])
            for name in ("total", *t.model.losses):
                losses[name] = losses.get(name, 0.0) + found[name].detach() * share
    grad_norm = t.fabric.clip_gradients(
        t.model, t.optimizer, max_norm=config.clip, error_if_nonfinite=False
    )
    t.optimizer.step()
    t.optimizer.zero_grad()
    if t.average is not None and config.ema is not None:
        update_average(t.average, t.model, config.ema)
    mean = t.ranks.mean(torch.stack([value.float() for value in losses.values()]))
    return dict(zip(losses, mean.unbind(), strict=True)), whole({"norm": grad_norm})["norm"]


def share_out(t: Training, parts: Sequence[Batch]) -> tuple[list[float], list[Part]]:
    """By how much each part's mean counts in the batch's, and which part of its draws it gets."""
    ranks = t.ranks
    nodes = ranks.rows(np.stack([np.diff(part.graph.kind_ptr) for part in parts]))
    first = ranks.number * len(parts)
    draws = [Part(first + n, nodes) for n in range(len(parts))]
    if len(parts) == 1:
        return [1.0], draws
    weights = np.array([[float(part.weight.sum()) for part in parts]])
    weights = ranks.rows(weights).sum(0)
    total = weights.sum()
    shares = weights / total if total else np.full(len(parts), 1 / len(parts))
    return shares.tolist(), draws


def where(t: Training) -> torch.device:
    """Where batches are brought ahead of their step: they are taken apart on the CPU."""
    return t.fabric.device if t.config.accumulate == 1 else torch.device("cpu")


def prepare(batch: Batch, t: Training, draw: Part) -> dict[str, Any]:
    """What the model takes, on the device: images normalised and augmented, with their graph."""
    device = t.fabric.device
    batch = moved(batch, lambda tensor: tensor.to(device, non_blocking=True))
    pixels = t.pixels[batch.source]
    images = normalise(batch.image, *pixels[:3])
    images, graph, placement = augment(
        images, batch.graph, t.config.augment, patches=t.patches, part=draw
    )
    context = chip_context(batch, pixels.wavelength_um)
    patches = (t.config.model.image_size // t.config.model.patch_size) ** 2
    return {
        "images": images, "graph": graph, "weight": batch.weight,
        "pairs": chip_pairs(batch, t.config.negatives),
        "context": replace(context, gsd_m=place_gsd_m(batch.gsd_m, placement)),
        "mask_noise": draw.rand((len(images), patches), device),
        "node_noise": draw.node_rand(graph, device),
    }  # fmt: skip


def seed_step(*numbers: int) -> None:
    """Seed everything that a step draws by seed, step and part: masks, augmentation, dropout."""
    mixed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))


def _result(
    t: Training, message: str, samples_per_s: float, stopped_by: str | None = None
) -> RunResult:
    return RunResult(
        t.config.run, checkpoints(t.config.run)[-1], t.step, t.steps, t.step == t.steps,
        stopped_by, message, tuple(t.notes), t.loss, samples_per_s,
    )  # fmt: skip
