"""The pretraining losses.

Each is a mean over the whole batch: where several ranks share it (`geolink.models.ranks`), a rank
returns the share of its chips times the number of ranks, so that the mean of what the ranks return,
and of its gradients, is that of one device with all the chips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from geolink.models.ranks import gather, rank, sum_over_ranks, world_size

_TINY = 1e-6
"""Least sum of weights that is divided by: where all are 0, so is the loss."""

EARTH_RADIUS_M = 6_371_008.8
"""Mean radius of the Earth (IUGG)."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """By what two of B chips are found to be too alike to be told apart by the contrast."""

    xyz: Tensor
    """float64 [B, 3], unit vectors of the chips' centres."""
    tags: Tensor
    """int64 [B], signature of a chip's set of tags; 0: it has none."""
    min_distance_m: float = 0.0
    """Chips whose centres are closer are no negatives of one another; in metres on the sphere."""
    same_tags: bool = False
    """Chips of the same set of tags are no negatives of one another."""


def reconstruction_loss(
    prediction: Tensor, patches: Tensor, masked: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Mean squared error on masked patches, pixels normalised per patch (He et al. 2022, §3).

    Args:
        prediction: [B, L, N], N values of a patch (pixels and bands).
        patches: [B, L, N], the image's.
        masked: bool [B, L].
        weight: float32 [B], how much each chip counts. Default: 1.
    """
    patches = patches.float()
    variance, mean = torch.var_mean(patches, -1, keepdim=True)
    target = (patches - mean) / (variance + 1e-6).sqrt()
    error = (prediction.float() - target).square().mean(-1)
    return weighted_mean(error, _weighted(masked, weight))


def contrast_loss(
    image: Tensor,
    region: Tensor,
    temperature: float,
    has_region: Tensor,
    weight: Tensor | None = None,
    *,
    pairs: Pairs | None = None,
) -> Tensor:
    """Symmetric InfoNCE between projections of chips' images and regions [B, d], in float32.

    Chips without a region (bool [B]) are neither positives nor negatives; 0 if all are without.
    With a weight (float32 [B]), a chip counts so much as a positive, and in full as a negative.
    Negatives are the chips of all ranks; with `pairs`, but those of `not_negative`.
    """
    image, region = F.normalize(image.float(), dim=-1), F.normalize(region.float(), dim=-1)
    counted = _weighted(has_region, weight)
    images, regions, some = gather(image), gather(region), gather(has_region.float()) > 0
    with torch.autocast(image.device.type, enabled=False):
        to_regions = image @ regions.t() / temperature
        to_images = to_regions if images is image else images @ region.t() / temperature
    out = ~(has_region[:, None] & some)
    if pairs is not None:
        out = out | not_negative(pairs)
    # A large negative number, not -inf: rows of chips without a region must stay finite.
    to_regions = to_regions.masked_fill(out, -1e9).log_softmax(1)
    to_images = to_images.masked_fill(out.t(), -1e9).log_softmax(0)
    first = rank() * len(image)
    loss = (-to_regions.diagonal(first) - to_images.diagonal(-first)) / 2
    return weighted_mean(torch.where(has_region, loss, 0.0), counted)


def not_negative(pairs: Pairs) -> Tensor:
    """Which chips are no negatives of this rank's b chips: bool [b, chips of all ranks].

    A chip itself is not among them.
    """
    xyz, tags = gather(pairs.xyz), gather(pairs.tags)
    near = torch.zeros(len(pairs.xyz), len(xyz), dtype=torch.bool, device=xyz.device)
    if pairs.min_distance_m > 0:
        # The chord, since a cosine near 1 tells small angles apart badly.
        chord = 2 * math.sin(min(pairs.min_distance_m / EARTH_RADIUS_M, math.pi) / 2)
        near = torch.cdist(pairs.xyz, xyz, compute_mode="donot_use_mm_for_euclid_dist") < chord
    if pairs.same_tags:
        near = near | ((pairs.tags[:, None] == tags) & (tags != 0))
    itself = torch.arange(len(pairs.xyz), device=xyz.device) + rank() * len(pairs.xyz)
    return near & (itself[:, None] != torch.arange(len(xyz), device=xyz.device))


def unit_vectors(lonlat: Tensor) -> Tensor:
    """Points on the unit sphere float64 [.., 3] of lonlat [.., 2] in degrees."""
    lon, lat = torch.deg2rad(lonlat.double()).unbind(-1)
    return torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], -1)


def consistency_loss(
    prediction: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Mean squared error [B, K, D] over the real ones (bool [B, K]) of masked nodes; 0 if none.

    weight: float32 [B], how much each chip counts. Default: 1.
    """
    error = (prediction.float() - target.float()).square().mean(-1)
    return weighted_mean(torch.where(valid, error, 0.0), _weighted(valid, weight))


def weighted_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of values with the weights `counted` of the same shape; see the module on ranks."""
    total = sum_over_ranks(counted.sum().detach())
    return (values * counted).sum() * world_size() / total.clamp(min=_TINY)


def _weighted(flags: Tensor, weight: Tensor | None) -> Tensor:
    """Flags [B, ...] as float32 weights; with weights of 1 to the bit the same as without."""
    counted = flags.float()
    if weight is None:
        return counted
    return counted * weight.view(-1, *[1] * (flags.dim() - 1))
