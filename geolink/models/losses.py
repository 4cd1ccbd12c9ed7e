"""The three pretraining losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(prediction: Tensor, patches: Tensor, masked: Tensor) -> Tensor:
    """Mean squared error on masked patches, pixels normalised per patch (He et al. 2022, §3).

    Args:
        prediction: [B, L, N], N values of a patch (pixels and bands).
        patches: [B, L, N], the image's.
        masked: bool [B, L].
    """
    patches = patches.float()
    variance, mean = torch.var_mean(patches, -1, keepdim=True)
    target = (patches - mean) / (variance + 1e-6).sqrt()
    error = (prediction.float() - target).square().mean(-1)
    return (error * masked).sum() / masked.sum().clamp(min=1)


def contrast_loss(image: Tensor, region: Tensor, temperature: float, has_region: Tensor) -> Tensor:
    """Symmetric InfoNCE between projections of chips' images and regions [B, d], in float32.

    Chips without a region (bool [B]) are neither positives nor negatives; 0 if all are without.
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
    return torch.where(has_region, loss, 0.0).sum() / has_region.sum().clamp(min=1)


def consistency_loss(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean squared error [B, K, D] over the real ones (bool [B, K]) of masked nodes; 0 if none."""
    error = (prediction.float() - target.float()).square().mean(-1)
    return torch.where(valid, error, 0.0).sum() / valid.sum().clamp(min=1)
