"""What a model does across the processes of a run, so that they are one large batch to it.

A *rank* is one of several processes that share every batch evenly. Everything here does nothing
outside `one_batch` (a model that one rank looks at alone must not wait for the others), without a
process group, or in one of a single rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_shared = False


@contextmanager
def one_batch() -> Iterator[None]:
    """Within it every rank does the same, each with its part of one batch."""
    global _shared
    _shared, before = True, _shared
    try:
        yield
    finally:
        _shared = before


def world_size() -> int:
    """Ranks that share a batch."""
    if not (_shared and dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Which of them this process is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(values: Tensor) -> Tensor:
    """Rows [b, ..] of all ranks [b * ranks, ..], in order of rank; b is the same on all of them.

    Gradients go back to the rank that the rows came from, summed over all ranks.
    """
    if world_size() == 1:
        return values
    gathered: Tensor = _Gather.apply(values)
    return gathered


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over the ranks; its gradient is summed over them, too."""
    if world_size() == 1:
        return values
    total: Tensor = _Sum.apply(values)
    return total


def mean_over_ranks(values: Tensor, kept: Tensor | None = None) -> Tensor:
    """Mean of all elements of all ranks' tensors [n, C], whose n may differ; of the rows that are
    kept (bool [n]), if that is said.
    """
    if kept is not None:
        values = values * kept[:, None]
        count = kept.sum(dtype=values.dtype) * values.shape[1]
    elif world_size() == 1:
        return values.mean()
    else:
        count = values.new_full((), values.numel())
    if world_size() == 1:
        return values.sum() / count.clamp(min=1)
    total, count = sum_over_ranks(torch.stack([values.sum(), count])).unbind()
    return total / count.clamp(min=1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        gathered = values.new_empty((world_size() * len(values), *values.shape[1:]))
        dist.all_gather_into_tensor(gathered, values.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # The sum everywhere, not a scatter of it: every backend has it, and the rows are narrow.
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient
