"""The optimizer and its schedule, and the optimizer's state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from schemas.training import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW; what has no two real dimensions (biases, norms, tokens) does not decay."""
    decay: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if parameter.squeeze().ndim > 1 else plain).append(parameter)
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    # Fused is several times faster on small models; a gradient scaler cannot clip with it.
    fused = config.precision != "16-mixed"
    return AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of step 1..steps: linear warm-up, then a half cosine that ends at 0 after the last."""
    warmup = round(config.warmup * steps)
    if step <= warmup:
        return config.lr * step / warmup
    done = (step - 1 - warmup) / (steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by `<what>/<name of parameter>`, e.g. `exp_avg/cls_token`."""
    return {
        f"{what}/{name}": value
        for name, parameter in model.named_parameters()
        for what, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave."""
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        what, _, name = key.partition("/")
        by_parameter.setdefault(name, {})[what] = value
    for name, parameter in model.named_parameters():
        state = by_parameter.get(name)
        if state is not None:
            optimizer.state[parameter] = {
                what: value.to(parameter.device, torch.float32) for what, value in state.items()
            }
