"""What `geolink2` learns from objects beside the contrast of whole chips.

Which patches an object meets is taken from the graph that came through the augmentation, so it
fits the pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geolink.graph import GraphBatch
from geolink.models.losses import weighted_mean
from schemas.layout import Kind


def correspondence(graph: GraphBatch, slot: Tensor, valid: Tensor, patches: int) -> Tensor:
    """Share of each patch in each object that has a slot: float32 [B, K, patches].

    slot, valid: int64, bool [B, K] (`geolink.models.masking.node_slots`). Polygons: share of the
    patch's area; lines: share of the object's length.
    """
    cells = slot.numel()
    place = torch.full((graph.nodes + 1,), -1, device=slot.device)
    filled = torch.where(valid, slot, graph.nodes).flatten()
    place = place.scatter(0, filled, torch.arange(cells, device=slot.device))
    place = torch.repeat_interleave(
        place[:-1], graph.patch_offset.diff(), output_size=graph.patch.shape[0]
    )
    # What has no slot goes to one more cell at the end, which is cut off.
    cell = torch.where(place >= 0, place * patches + graph.patch, cells * patches)
    flat = graph.patch_weight.new_zeros(cells * patches + 1)
    return flat.index_add(0, cell, graph.patch_weight)[:-1].view(*slot.shape, patches)


def cover(graph: GraphBatch, patches: int, classes: int) -> Tensor:
    """How much of each patch each class covers: float32 [B, patches, classes] in [0, 1].

    Polygons count by area; a line or point that meets a patch counts in full, since its width is
    not known. Classes may overlap: a house stands in its residential area. Objects of class 0
    (none) count for nothing.
    """
    count, total = graph.patch_offset.diff(), graph.patch.shape[0]
    node = torch.repeat_interleave(
        torch.arange(graph.nodes, device=graph.patch.device), count, output_size=total
    )
    polygon = graph.kind()[node] == int(Kind.POLYGON)
    share = torch.where(polygon, graph.patch_weight, (graph.patch_weight > 0).float())
    row = graph.chip[node] * patches + graph.patch
    cell = row * (classes + 1) + graph.osm_class[node].long()
    flat = share.new_zeros(graph.chips * patches * (classes + 1)).index_add(0, cell, share)
    return flat.view(graph.chips, patches, classes + 1)[..., 1:].clamp(max=1.0)


def dense_loss(logit: Tensor, covered: Tensor, weight: Tensor | None) -> Tensor:
    """Binary cross-entropy [B, V, C] of each class's cover, summed over the classes.

    Patches of which OSM says nothing are left out: nothing mapped does not mean nothing there.
    """
    loss = F.binary_cross_entropy_with_logits(
        logit.float(), covered.float(), reduction="none"
    ).sum(-1)  # fmt: skip
    stated = covered.sum(-1).clamp(max=1.0).float()
    return weighted_mean(loss, stated if weight is None else stated * weight[:, None])
