"""The exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from geolink.training.distributed import local


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def begin_average(model: nn.Module) -> dict[str, Tensor]:
    """The average of a model that has done no step: its weights."""
    return {name: p.clone() for name, p in trained(model).items()}


@torch.no_grad()
def update_average(average: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * weights, after a step."""
    weights = trained(model)
    torch._foreach_lerp_(
        [local(average[name]) for name in weights], [local(p) for p in weights.values()], 1 - decay
    )
