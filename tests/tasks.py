"""Small checkpoints and labelled images for tests of tasks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geolink.checkpoint import MODEL, CheckpointMeta, host_copy, model_tensors, save_checkpoint
from geolink.models.build import make_model
from schemas.training import ModelConfig, TrainConfig

TINY = ModelConfig(
    image_size=32, patch_size=8, bands=3, embed_dim=16, depth=2, num_heads=2, tag_dim=16,
    osm_dim=8, fusion_dim=8, fusion_heads=2, projection_dim=4, decoder_dim=8, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip
CLASSES = ("water", "wood", "town")


def make_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A run folder with a checkpoint of new weights, for images of 8 bits."""
    model = TINY.model_copy(update=changes)
    torch.manual_seed(seed)
    meta = CheckpointMeta(
        geolink="0", revision=None, step=1, steps=1, dataset="fabricated", snapshot=1,
        tag_encoder="wordllama", bands=("red", "green", "blue"), nodata=0, mean=(127.0,) * 3,
        std=(73.0,) * 3, config=TrainConfig(dataset=folder, run=folder, model=model, seed=seed),
    )  # fmt: skip
    save_checkpoint(folder, {MODEL: host_copy(model_tensors(make_model(model)))}, meta, {})
    return folder


def stripes(count: int, seed: int, size: int = 32) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [N, 3, size, size] of stripes whose width and direction tell their class, and it."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % len(CLASSES)
    y, x = np.mgrid[:size, :size]
    wave = np.stack([np.sin(x * 0.4), np.sin(y * 0.8), np.sin(x * 1.6)])[label]
    noise = rng.normal(0, 30, (count, 3, size, size))
    return (128 + 60 * wave[:, None] + noise).clip(1, 255).astype(np.uint8), label


def make_npz(path: Path, count: int = 90, seed: int = 0, **arrays: Any) -> Path:
    """A .npz file of stripes."""
    image, label = stripes(count, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{"image": image, "label": label, "classes": np.array(CLASSES), **arrays})
    return path
