"""The optimizer and its schedule, and the optimizer's state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from geolink.training.distributed import placed
from schemas.training import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over `parameter_groups`."""
    # Fused is several times faster on small models; a gradient scaler cannot clip with it.
    fused = config.precision != "16-mixed"
    groups = parameter_groups(model, config)
    return AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trained parameters by how they decay and by their rate (`rate_factor`).

    What has no two real dimensions (biases, norms, tokens) does not decay.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = rate_factor(name, config.model.depth, config.layer_decay)
            decays = sum(length > 1 for length in parameter.shape) > 1
            groups.setdefault((factor, decays), []).append(parameter)
    return [
        {"params": p, "rate_factor": factor, "weight_decay": config.weight_decay if decays else 0.0}
        for (factor, decays), p in groups.items()
        if p
    ]


_FIRST = ("patch_embed.", "cls_token", "reg_token", "pos_embed")
"""Of timm's image encoder; the paper's variant has some of them beside its encoder."""


def rate_factor(name: str, depth: int, layer_decay: float) -> float:
    """Factor of a parameter's rate (Clark et al. 2020; Bao et al. 2022, appendix H).

    `layer_decay` ** (depth + 1 - layer): layer 0 is the patch embedding with class token and
    positions, 1..depth are the image encoder's blocks, all the rest is depth + 1.
    """
    layer = depth + 1
    if name.removeprefix("img_encoder.").startswith(_FIRST):
        layer = 0
    elif name.startswith("img_encoder.blocks."):
        layer = int(name.split(".")[2]) + 1
    return float(layer_decay ** (depth + 1 - layer))


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """The rate of the next step, each group's times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of step 1..steps: linear warm-up, then by `config.schedule`; 0 would come after the
    last.

    `cosine`: a half cosine. `wsd`: constant, then a line over the last `cooldown` of the steps
    (Hu et al. 2024; Hägele et al. 2024).
    """
    warmup = round(config.warmup * steps)
    if step <= warmup:
        return config.lr * step / warmup
    if config.schedule == "wsd":
        falling = max(round(config.cooldown * steps), 1)
        return config.lr * min(1.0, (steps + 1 - step) / falling)
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
                what: placed(value, parameter) for what, value in state.items()
            }
