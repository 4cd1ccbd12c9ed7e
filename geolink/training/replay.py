"""A step that was not finite is run again, to see what makes it so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from geolink.stream import Batch
from geolink.training.distributed import open_ranks
from geolink.training.draws import Part, kinds
from geolink.training.kept_step import read_step
from geolink.training.loop import Progress, prepare, seed_step, train_step
from geolink.training.optim import learning_rate
from geolink.training.parts import endless, take
from geolink.training.setup import Training, set_up
from schemas.errors import GeoLinkError
from schemas.grid import printed_chip
from schemas.training import TrainConfig


@dataclass(frozen=True)
class Replay:
    """What a step that was run again is like."""

    step: int
    weights: str
    """Which weights it was run with."""
    finite: bool
    losses: dict[str, float]
    terms: list[str]
    """Parts of the loss that are not finite, or whose gradient is not."""
    parameters: list[str]
    """Parameters whose gradient is not finite."""
    chips: list[str]
    """Chips that make it so also when run alone."""
    verdict: str
    """What it comes to, for people."""


def replay(path: Path, progress: Progress | None = None) -> Replay:
    """Run a step again whose batch was kept (`reporting.keep_step`); nothing is written.

    First with the weights of the last checkpoint before it (new ones if there is none); if it is
    finite with these, the steps between are done again, and then the step with the weights that it
    had. On a CPU they are the same to the bit. It is run on one device, without compilation.

    Raises GeoLinkError: no such file, not one of ours, a run folder or dataset that is gone.
    """
    record, batch = read_step(path)
    config = _config(record, path)
    step = int(record["step"])
    with open_ranks(config) as ranks:
        t = set_up(config, ranks, int(record["snapshot"]), before=step)
        first = t.step
        found = _examine(t, batch, step, f"those after step {first}, the last checkpoint before it")
        if not found.finite and step > first + 1:
            return found
        # On the CPU, where a batch can be taken apart; a step brings it to the device.
        batches = endless(t.stream, torch.device("cpu"))
        while t.step < step - 1:
            t.step += 1
            train_step(t, next(batches)[0], learning_rate(config, t.step, t.steps))
            if progress is not None:
                progress(t.step, step, {})
        batches.close()
        if step > first + 1:
            found = _examine(t, batch, step, f"those that it had: steps after {first} done again")
        return found


def _config(record: Mapping[str, Any], path: Path) -> TrainConfig:
    """The run's config, for one device; the run may have been moved with its folder."""
    changes = {
        "run": path.resolve().parent, "devices": 1, "strategy": "auto", "compile": False,
        "wandb": None,
    }  # fmt: skip
    try:
        return TrainConfig.model_validate({**record["config"], **changes})
    except ValidationError as error:
        raise GeoLinkError(f"{path} is of another version of GeoLink: {error.errors()[0]['msg']}") \
            from None  # fmt: skip


def _examine(t: Training, batch: Batch, step: int, weights: str) -> Replay:
    """Losses and gradients of a step, of the batch and of each of its chips alone; no update."""
    losses, terms, parameters = _probe(t, batch, step)
    broken = [name for name, p in t.model.named_parameters() if not bool(p.isfinite().all())]
    finite = not (terms or parameters)
    alone: list[str] = []
    if not finite and not broken:
        alone = [
            printed_chip(batch.chip_id[n]) for n in range(len(batch))
            if any(_probe(t, take(batch, n, n + 1), step)[1:])
        ]  # fmt: skip
    if finite:
        verdict = "finite: the weights, not these chips alone, made the step what it was"
    elif broken:
        verdict = f"the weights are not finite already ({broken[0]} and others): lower lr or clip"
    elif alone and len(alone) < len(batch):
        verdict = f"{len(alone)} of {len(batch)} chips make it so: look at them"
    elif alone:
        verdict = "every chip makes it so: the weights have run away, lower lr or clip"
    else:
        verdict = "no chip alone makes it so: only together do they"
    return Replay(step, weights, finite, losses, terms, parameters, alone, verdict)


def _probe(t: Training, batch: Batch, step: int) -> tuple[dict[str, float], list[str], list[str]]:
    """Losses by name; those that are not finite or have such a gradient; such parameters."""
    draw = Part(0, kinds(batch.graph)[None])
    seed_step(t.config.seed, step)
    inputs = prepare(batch, t, draw)
    with t.fabric.autocast():
        found = t.model(**inputs)
    trained = {name: p for name, p in t.model.named_parameters() if p.requires_grad}
    losses = {name: float(found[name].detach()) for name in ("total", *t.model.losses)}
    terms, wrong = [], []
    for name in losses:
        bad = _not_finite(found[name], trained)
        if not np.isfinite(losses[name]) or bad:
            terms.append(name)
        if name == "total":
            wrong = bad
    return losses, terms, wrong


def _not_finite(loss: Tensor, trained: Mapping[str, Tensor]) -> list[str]:
    """Names of parameters whose gradient of the loss is not finite."""
    if not loss.requires_grad:
        return []
    gradients = torch.autograd.grad(
        loss, list(trained.values()), retain_graph=True, allow_unused=True
    )
    return [
        name for name, g in zip(trained, gradients, strict=True)
        if g is not None and not bool(g.isfinite().all())
    ]  # fmt: skip
