"""Augmentation of whole batches on their device; image and graph get the same parameters."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from geolink.graph import GraphBatch
from geolink.training.draws import WHOLE, Part
from schemas.training import Augment


def augment(
    images: Tensor,
    graph: GraphBatch,
    options: Augment,
    *,
    patches: int,
    generator: torch.Generator | None = None,
    part: Part = WHOLE,
) -> tuple[Tensor, GraphBatch]:
    """Flip half of the chips left to right and change each band's brightness and contrast.

    Args:
        images: float [B, bands, y, x], normalised.
        graph: the chips' OSM graphs.
        options: what is done.
        patches: patches along a side of a chip.
        generator: of what is drawn, on the images' device; default: the global one.
        part: which part of a batch this is, whose draws it gets; default: all of it.

    Returns: images and graph, new ones; the inputs are left as they are. A flipped object's
        patches are the mirrored ones, each with its weight, in the order of the originals.
    """
    if options.flip:
        draw = part.rand((len(images),), images.device, generator)
        images, graph = mirror(images, graph, draw < 0.5, patches)
    if options.jitter:
        images = jitter(images, options.jitter, generator, part)
    return images, graph


def mirror(
    images: Tensor, graph: GraphBatch, chosen: Tensor, patches: int
) -> tuple[Tensor, GraphBatch]:
    """Mirror the chosen chips (bool [B]) left to right: pixels, anchors (x -> 1 - x), patches."""
    images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
    node = chosen[graph.chip]
    x, y = graph.anchor.unbind(-1)
    anchor = torch.stack([torch.where(node[:, None], 1 - x, x), y], -1)
    # The size of the output is given because it is known; left out, a GPU would be waited for.
    entry = torch.repeat_interleave(
        node, graph.patch_offset.diff(), output_size=graph.patch.shape[0]
    )
    column = graph.patch % patches
    patch = torch.where(entry, graph.patch - column + (patches - 1 - column), graph.patch)
    return images, replace(graph, anchor=anchor, patch=patch)


def jitter(
    images: Tensor,
    amount: float,
    generator: torch.Generator | None = None,
    part: Part = WHOLE,
) -> Tensor:
    """Scale each band of each chip by a draw from 1 ± amount (contrast), then add one from
    ± amount (brightness, in deviations of the band).

    Normalised float [B, bands, y, x] -> the same shape.
    """
    draw = part.rand((2, *images.shape[:2], 1, 1), images.device, generator, chips=1)
    contrast, brightness = (draw * 2 - 1) * amount
    return torch.addcmul(brightness, images, 1 + contrast)
