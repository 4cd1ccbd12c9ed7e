"""Tensor operations the models share: packed segments, positions, patches, ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from schemas.errors import GeoLinkError


def segment_softmax(
    logit: Tensor, segment: Tensor, segments: int, kept: Tensor | None = None
) -> Tensor:
    """Softmax of float [E] within the segments given by int64 [E]; segments may be empty.

    Elements that are not kept (bool [E]) get 0 and count for nothing.
    """
    if kept is not None:
        logit = logit.masked_fill(~kept, torch.finfo(logit.dtype).min)
    largest = logit.new_full((segments,), -torch.inf)
    largest = largest.scatter_reduce(0, segment, logit.detach(), "amax")
    exp = (logit - largest[segment]).exp()
    if kept is None:
        total = exp.new_zeros(segments).index_add(0, segment, exp)
        return exp / total.index_select(0, segment)
    exp = exp * kept
    total = exp.new_zeros(segments).index_add(0, segment, exp).clamp(min=1e-30)
    return exp / total.index_select(0, segment)


def weighted_rows(table: Tensor, index: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
    """Sum of weighted rows per CSR segment: [R, C], int64 [E], int64 [S + 1], [E] -> [S, C].

    One gather and reduction without the [E, C] intermediate.
    """
    return F.embedding_bag(
        index, table, offset, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def uniform(
    shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Draws from [0, 1), float32."""
    # Without a size known in advance, compiled code can draw from the global generator only.
    if generator is None:
        return torch.rand(shape, device=device)
    return torch.rand(shape, device=device, generator=generator)


def run_offsets(sorted_index: Tensor, runs: int) -> Tensor:
    """CSR offsets [runs + 1] of a sorted int64 index [E] of 0..runs-1."""
    starts = torch.arange(runs + 1, device=sorted_index.device)
    return torch.searchsorted(sorted_index, starts)


def rank_within(group: Tensor, priority: Tensor, groups: int) -> Tensor:
    """Rank [M] (0 first) of each element among those of its group, by rising float32 priority."""
    # One sort by both: the bits of floats sort as the floats do, of negative ones the other way.
    bits = priority.float().contiguous().view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = torch.argsort((group << 32) + bits, stable=True)
    sorted_group = group[order]
    start = run_offsets(sorted_group, groups)[sorted_group]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - start
    return rank


def sincos(position: Tensor, dim: int) -> Tensor:
    """Sin-cos embedding of 2-D positions [..., 2] (x, y in patches) -> [..., dim].

    First half x, second half y; each half the sines, then the cosines, of dim / 4 frequencies
    (Vaswani et al. 2017; MAE's order). Raises GeoLinkError if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise GeoLinkError(
            f"a width of {dim} cannot hold 2-D sin-cos positions: use a multiple of 4"
        )
    step = torch.arange(dim // 4, dtype=position.dtype, device=position.device) / (dim // 4)
    angle = position[..., None] * 10_000.0**-step
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def grid_sincos(grid: int, dim: int) -> Tensor:
    """Sin-cos embedding of a class token (zeros) and grid x grid patches: [1, 1 + grid², dim]."""
    index = torch.arange(grid, dtype=torch.float64)
    y, x = torch.meshgrid(index, index, indexing="ij")
    patches = sincos(torch.stack([x, y], -1).flatten(0, 1), dim).float()
    return torch.cat([torch.zeros(1, dim), patches])[None]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, patches, patch_size * patch_size * C], row-major, channels last."""
    batch, bands, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    images = images.reshape(batch, bands, rows, patch_size, columns, patch_size)
    values = patch_size * patch_size * bands
    return images.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, values)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of each sequence: [B, L, C], int64 [B, K] -> [B, K, C]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def rows(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]`; where there are no values at all (a batch without any node), zeros."""
    if len(values):
        return values[index]
    # The empty sum keeps the gradient's graph whole, so that no parameter is left without one.
    return values.sum(0, dtype=values.dtype).expand(*index.shape, *values.shape[1:])
