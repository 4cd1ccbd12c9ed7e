"""Features of chips for tasks on frozen features: the encoder's, and the baselines'."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from geolink.checkpoint import CheckpointMeta
from geolink.models.build import PretrainModel, make_model

PIXELS = 16
"""Side that raw pixels are reduced to where chips are larger."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_BATCH = 256

Extractor = Callable[[Tensor], Tensor]
"""Normalised chips float32 [B, bands, y, x] -> features float32 [B, D]."""


def extractors(
    model: PretrainModel, meta: CheckpointMeta, baselines: tuple[str, ...], seed: int
) -> dict[str, Extractor]:
    """The encoder and the baselines by name; the model is on its device, in evaluation mode."""
    found: dict[str, Extractor] = {"encoder": encoder_features(model)}
    for name in baselines:
        if name == "random":
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                random = make_model(meta.config.model)
            found[name] = encoder_features(random.to(next(model.parameters()).device).eval())
        else:
            found[name] = pixel_features if name == "pixels" else band_features
    return found


def encoder_features(model: PretrainModel) -> Extractor:
    """Mean of the normed patch tokens."""

    @torch.inference_mode()
    def extract(images: Tensor) -> Tensor:
        return torch.cat([model.embed_image(part).float() for part in torch.split(images, _BATCH)])

    return extract


def pixel_features(images: Tensor) -> Tensor:
    """Raw pixels, averaged down to at most `PIXELS` x `PIXELS` a band."""
    height, width = (min(PIXELS, length) for length in images.shape[-2:])
    return F.adaptive_avg_pool2d(images, (height, width)).flatten(1)


def band_features(images: Tensor) -> Tensor:
    """Mean, deviation and quantiles of each band."""
    pixels = images.flatten(2)
    rank = [round(level * (pixels.shape[2] - 1)) for level in QUANTILES]
    # numpy selects the ranks without sorting, several times faster than torch on a CPU.
    levels = np.partition(pixels.cpu().numpy(), rank, axis=2)[:, :, rank]
    quantiles = torch.from_numpy(levels).to(images.device)
    parts = [pixels.mean(2, keepdim=True), pixels.std(2, keepdim=True), quantiles]
    return torch.cat(parts, 2).flatten(1)
