"""Training by steps, for tasks: rates by layer, an early stop on validation, the best weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from geolink.graph import GraphBatch
from geolink.tasks.contracts import Encoder, TaskBatch
from geolink.tasks.held import Held
from geolink.training.optim import rate_factor, set_rate
from geolink.training.placement import draw_placement, place_graph, place_images, place_pixels
from schemas.errors import GeoLinkError
from schemas.evaluation import TrainingOptions
from schemas.training import Augment


@dataclass(frozen=True, eq=False)
class Trained:
    """How a training went; the module holds its best weights."""

    score: float
    """Best on validation."""
    epoch: int
    """When that was, the first is 1."""
    curve: list[dict[str, float]]
    """By epoch: `epoch`, `loss`, `score`."""


def train(
    module: nn.Module,
    groups: list[dict[str, Any]],
    held: Held,
    loss: Callable[[TaskBatch], Tensor],
    validate: Callable[[], float],
    options: TrainingOptions,
    *,
    lr: float,
    seed: int,
) -> Trained:
    """Train until validation has not become better for `options.patience` epochs, once it is
    above 0.

    AdamW; the rate rises in a line over the warm-up and falls as a half cosine over all epochs.

    Args:
        module: all that is trained; takes its best weights at the end.
        groups: of `parameter_groups`.
        held: the images that are learnt from.
        loss: mean loss of a batch of them, with gradient.
        validate: the score on validation, the higher the better; the module is in evaluation mode.
        options: of the config.
        lr: rate of what has factor 1.
        seed: of the order of images.

    Raises GeoLinkError if a loss is not finite.
    """
    optimizer = AdamW(groups, lr=lr)
    trained = [p for group in groups for p in group["params"]]
    steps_each = -(-len(held) // options.batch_size)
    total, step = options.epochs * steps_each, 0
    best, at, kept = -math.inf, 0, None
    curve: list[dict[str, float]] = []
    for epoch in range(1, options.epochs + 1):
        module.train()
        losses = []
        for batch in shuffled(held, options.batch_size, seed, epoch):
            step += 1
            set_rate(optimizer, lr * _course(step, total, options.warmup))
            value = loss(batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            losses.append(value.detach())
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise GeoLinkError(
                f"the loss is not finite any more in epoch {epoch} with rate {lr:g}: use a smaller "
                "lr"
            )
        module.eval()
        found = validate()
        curve.append({"epoch": epoch, "loss": mean, "score": found})
        if found > best:
            best, at, kept = found, epoch, _state(module, trained)
        # The IoU of a rare class is 0 until it is said for the first time: no reason to stop.
        elif best > 0 and epoch - at >= options.patience:
            break
    if kept is not None:
        module.load_state_dict(kept, strict=False)
    module.eval()
    return Trained(best, at, curve)


def shuffled(held: Held, batch_size: int, seed: int, epoch: int) -> Iterator[TaskBatch]:
    """The images once each, in an order of seed and epoch."""
    order = np.random.default_rng((seed, epoch)).permutation(len(held))
    for low in range(0, len(order), batch_size):
        yield held.take(order[low : low + batch_size])


def parameter_groups(
    encoder: Encoder, head: nn.Module, options: TrainingOptions
) -> list[dict[str, Any]]:
    """Parameters by rate and decay: of the head at full rate, of the encoder's blocks by
    `layer_decay` the lower the less; frozen ones are left out.

    What has no two real dimensions (biases, norms, tokens) does not decay.
    """
    factors = {} if options.freeze else layer_factors(encoder, options.layer_decay)
    named: list[tuple[Tensor, float]] = [(p, 1.0) for p in head.parameters() if p.requires_grad]
    named += list(factors.values())
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for parameter, factor in named:
        decays = sum(length > 1 for length in parameter.shape) > 1
        groups.setdefault((factor, decays), []).append(parameter)
    return [
        {"params": p, "rate_factor": factor, "weight_decay": options.weight_decay * decays}
        for (factor, decays), p in groups.items()
    ]


def layer_factors(encoder: Encoder, layer_decay: float) -> dict[str, tuple[Tensor, float]]:
    """Trained parameters of an encoder with the factors of their rates, by name."""
    assert encoder.module is not None
    named = dict(encoder.module.named_parameters())
    ours = any(name.startswith("img_encoder.") for name in named)
    depth = encoder.levels[-1] + 1
    # A timm encoder alone is what stands under `img_encoder.` in ours.
    return {
        name: (p, rate_factor(name if ours else f"img_encoder.{name}", depth, layer_decay))
        for name, p in named.items()
        if p.requires_grad
    }


@dataclass(frozen=True, eq=False)
class Given:
    """What a model takes of B images, on the device."""

    images: Tensor
    """[B, bands, y, x], prepared."""
    graph: GraphBatch | None = None
    second: Tensor | None = None
    """As `images`, the later of two dates."""


def given(encoder: Encoder, batch: TaskBatch, device: torch.device) -> Given:
    """A batch as an encoder takes it: both dates prepared, and graphs if it looks at them."""
    return Given(
        encoder.prepare(batch.image.to(device)),
        None if batch.graph is None or encoder.inputs == "image" else batch.graph.to(device),
        None if batch.second is None else encoder.prepare(batch.second.to(device)),
    )


def turned(
    x: Given, mask: Tensor | None, *, patches: int, generator: torch.Generator
) -> tuple[Given, Tensor | None]:
    """Images of both dates with their graphs and masks [B, y, x], each flipped and turned by
    quarters by the same draw; only flipped where masks are no squares."""
    square = mask is None or mask.shape[-1] == mask.shape[-2]
    placement = draw_placement(
        len(x.images), Augment(crop=None, flip=True, rotate=square, jitter=0.0), patches,
        x.images.device, generator,
    )  # fmt: skip
    placed = Given(
        place_images(x.images, placement),
        None if x.graph is None else place_graph(x.graph, placement),
        None if x.second is None else place_images(x.second, placement),
    )
    return placed, None if mask is None else place_pixels(mask, placement)


def best_of(
    rates: Iterable[float], run: Callable[[float], tuple[Trained, Any]]
) -> tuple[Any, float, Trained, list[Mapping[str, Any]]]:
    """Train with each rate; what the one with the best validation score gave, and all trials."""
    trials: list[Mapping[str, Any]] = []
    best: tuple[Any, float, Trained] | None = None
    for lr in rates:
        trained, made = run(lr)
        trials.append({"lr": lr, "epoch": trained.epoch, "score": trained.score})
        if best is None or trained.score > best[2].score:
            best = made, lr, trained
    assert best is not None
    return *best, trials


def _course(step: int, total: int, warmup: float) -> float:
    """Factor of the rate at step 1..total."""
    rising = warmup * total
    if step <= rising:
        return step / rising
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - rising) / max(total - rising, 1)))


def _state(module: nn.Module, trained: list[Tensor]) -> dict[str, Tensor]:
    """Copies of the trained parameters and of the buffers that training changes."""
    ids = {id(p) for p in trained} | {id(b) for b in module.buffers()}
    return {
        name: copy.deepcopy(value.detach())
        for name, value in module.state_dict(keep_vars=True).items()
        if id(value) in ids
    }
