"""The three pretraining losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-6
"""Least sum of weights that is divided by: where all are 0, so is the loss."""


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
    counted = _weighted(masked, weight)
    return (error * counted).sum() / counted.sum().clamp(min=_TINY)


def contrast_loss(
    image: Tensor,
    region: Tensor,
    temperature: float,
    has_region: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE between projections of chips' images and regions [B, d], in float32.

    Chips without a region (bool [B]) are neither positives nor negatives; 0 if all are without.
    With a weight (float32 [B]), a chip counts so much as a positive, and in full as a negative.
    """
    image, region = F.normalize(image.float(), dim=-1), F.normalize(region.float(), dim=-1)
    with torch.autocast(image.device.type, enabled=False):
        logit = image @ region.t() / temperature
    # A large negative number, not -inf: rows of chips without a region must stay finite.
    both = has_region[:, None] & has_region
    logit = logit.masked_fill(~both, -1e9)
    to_region = -logit.log_softmax(1).diagonal()
    to_image = -logit.log_softmax(0).diagonal()
    loss = (to_region + to_image) / 2
    counted = _weighted(has_region, weight)
    return (torch.where(has_region, loss, 0.0) * counted).sum() / counted.sum().clamp(min=_TINY)


def consistency_loss(
    prediction: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Mean squared error [B, K, D] over the real ones (bool [B, K]) of masked nodes; 0 if none.

    weight: float32 [B], how much each chip counts. Default: 1.
    """
    error = (prediction.float() - target.float()).square().mean(-1)
    counted = _weighted(valid, weight)
    return (torch.where(valid, error, 0.0) * counted).sum() / counted.sum().clamp(min=_TINY)


def _weighted(flags: Tensor, weight: Tensor | None) -> Tensor:
    """Flags [B, ...] as float32 weights; with weights of 1 to the bit the same as without."""
    counted = flags.float()
    if weight is None:
        return counted
    return counted * weight.view(-1, *[1] * (flags.dim() - 1))
