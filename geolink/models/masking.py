"""Which patches and nodes are hidden, and the dense layout of chosen nodes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geolink.graph import GraphBatch
from geolink.models.ops import rank_within


def mask_patches(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Choose patches by noise [B, L]: the `L * (1 - ratio)` with the least stay visible.

    Returns their index [B, K] in order of noise, the inverse permutation [B, L] (patch ->
    position in that order), and the mask, bool [B, L], True where hidden.
    """
    length = noise.shape[1]
    order = noise.argsort(1)
    restore = order.argsort(1)
    kept = int(length * (1 - ratio))
    return order[:, :kept], restore, restore >= kept


def mask_nodes(graph: GraphBatch, noise: Tensor, ratio: float) -> Tensor:
    """Choose `ratio` of each chip's nodes (rounded to the nearest) by noise [M]: bool [M].

    noise: float32 in [0, 1). Dead nodes are neither counted nor chosen.
    """
    alive = graph.living()
    nodes = torch.zeros(graph.chips, device=noise.device)
    nodes = nodes.index_add(0, graph.chip, alive.float())
    count = (nodes * ratio).round()[graph.chip]
    return rank_within(graph.chip, noise + (~alive).float(), graph.chips) < count


def most_masked(graph: GraphBatch, ratio: float) -> int | None:
    """At least as many as `mask_nodes` chooses of any chip; none: not known on the host.

    A multiple of 8, as fused attention wants its keys.
    """
    return None if graph.most is None else math.ceil(graph.most * ratio / 8) * 8


def node_slots(
    graph: GraphBatch, selected: Tensor, noise: Tensor, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """Lay selected nodes (bool [M]) out as dense rows, one a chip; dead ones are left out.

    Returns node indices int64 [B, K] and bool [B, K], True for slots that hold a node. K is
    `capacity`, of a chip with more those with the least noise (float32 [M] in [0, 1)); without
    capacity as many as any chip has nodes (`GraphBatch.most`; where even that is not known the
    largest count, for which the host waits).
    """
    selected = selected if graph.alive is None else selected & graph.alive
    rank = rank_within(graph.chip, noise + (~selected).float(), graph.chips)
    if capacity is None:
        capacity = graph.most
    if capacity is None:
        capacity = int(torch.where(selected, rank + 1, 0).amax()) if graph.nodes else 0
    capacity = max(capacity, 1)
    fits = selected & (rank < capacity)
    # Nodes that have no slot go to one more at the end, which is cut off.
    slot = torch.where(fits, graph.chip * capacity + rank, graph.chips * capacity)
    index = torch.zeros(graph.chips * capacity + 1, dtype=torch.int64, device=slot.device)
    valid = torch.zeros_like(index, dtype=torch.bool)
    index[slot] = torch.arange(graph.nodes, device=slot.device)
    valid[slot] = True
    shape = (graph.chips, capacity)
    return index[:-1].view(shape), valid[:-1].view(shape)
