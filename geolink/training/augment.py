"""Augmentation of whole batches on their device; image and graph get the same parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from geolink.graph import GraphBatch
from geolink.training.draws import WHOLE, Part
from geolink.training.placement import Placement, draw_placement, place_graph, place_images
from schemas.training import Augment


def augment(
    images: Tensor,
    graph: GraphBatch,
    options: Augment,
    *,
    patches: int,
    generator: torch.Generator | None = None,
    part: Part = WHOLE,
) -> tuple[Tensor, GraphBatch, Placement]:
    """Crop, turn and flip chips, and change each band's brightness and contrast.

    Args:
        images: float [B, bands, y, x], normalised.
        graph: the chips' OSM graphs.
        options: what is done.
        patches: patches along a side of a chip.
        generator: of what is drawn, on the images' device; default: the global one.
        part: which part of a batch this is, whose draws it gets; default: all of it.

    Returns: images and graph, new ones (the inputs are left as they are), and the parameters, for
        what else is known of the chips (`place_pixels`, `place_patches`, `place_gsd_m`).
    """
    placement = draw_placement(len(images), options, patches, images.device, generator, part)
    images, graph = place_images(images, placement), place_graph(graph, placement)
    if options.jitter:
        images = jitter(images, options.jitter, generator, part)
    return images, graph, placement


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
