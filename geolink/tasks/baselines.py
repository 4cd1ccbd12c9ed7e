"""What an encoder is compared with: statistics of pixels and objects, new weights, the majority."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from geolink.graph import GraphBatch
from geolink.tasks.adapt import band_values, preparer
from geolink.tasks.calibration import BINS
from geolink.tasks.contracts import (
    IGNORE,
    Encoder,
    Fitted,
    Labels,
    Masks,
    Outcome,
    Task,
    TaskData,
)
from geolink.tasks.encoders import RANDOM, open_encoder
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig

PIXELS = 16
"""Side that raw pixels are reduced to where images are larger."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def default_baselines(task: Task, config: TaskConfig, data: TaskData) -> tuple[str, ...]:
    """What suits the task, the inputs and the data, if the config does not say."""
    if config.baselines is not None:
        return config.baselines
    less = ["image-only", "osm-only"] if config.inputs == "image+osm" else []
    if data.kind not in ("class", "multilabel"):
        less = less[:1]  # heads on feature maps need an image
    fair = data.has_graphs and data.osm_class_names and not data.labels_are_osm
    return (*less, *(name for name in task.baselines if name != "osm" or fair))


def open_baseline(
    name: str, config: TaskConfig, data: TaskData, device: torch.device, seed: int
) -> Encoder:
    """The encoder of a baseline other than `majority`. Raises GeoLinkError as `open_encoder`."""
    if name == "pixels":
        return _fixed(name, pixel_features, data, device)
    if name == "bands":
        return _fixed(name, band_features, data, device)
    if name == "osm":
        return osm_encoder(data)
    what, inputs = config.checkpoint, config.inputs
    if name == "imagenet":
        what, inputs = config.imagenet, "image"
    elif name == "random":
        what = RANDOM + str(config.checkpoint).removeprefix(RANDOM)
    elif name in ("image-only", "osm-only"):
        inputs = "image" if name == "image-only" else "osm"
    return open_encoder(
        what, inputs, data, device=device, size=config.size, normalise=config.normalise, seed=seed
    )


def _fixed(
    name: str, features: Callable[[Tensor], Tensor], data: TaskData, device: torch.device
) -> Encoder:
    """A function of pixels that are scaled by the training images' mean and deviation."""
    index = list(range(len(data.imagery.bands)))
    mean, std = (v.tolist() for v in band_values(data, index))
    side = max(data.imagery.size)
    prepare = preparer(index, mean, std, data.imagery.nodata, side, device)
    width = int(features(torch.zeros(1, len(index), side, side)).shape[1])
    return Encoder(
        name=name,
        key=f"{name} {mean} {std}",
        inputs="image",
        prepare=prepare,
        embed=lambda images, _: features(images),
        width=width,
        size=side,
    )


def pixel_features(images: Tensor) -> Tensor:
    """Raw pixels [B, bands, y, x], averaged down to at most `PIXELS` x `PIXELS` a band."""
    height, width = (min(PIXELS, length) for length in images.shape[-2:])
    return F.adaptive_avg_pool2d(images, (height, width)).flatten(1)


def band_features(images: Tensor) -> Tensor:
    """Mean, deviation and quantiles of each band of images [B, bands, y, x]."""
    pixels = images.flatten(2)
    rank = [round(level * (pixels.shape[2] - 1)) for level in QUANTILES]
    # numpy selects the ranks without sorting, several times faster than torch on a CPU.
    levels = np.partition(pixels.cpu().numpy(), rank, axis=2)[:, :, rank]
    quantiles = torch.from_numpy(levels).to(images.device)
    parts = [pixels.mean(2, keepdim=True), pixels.std(2, keepdim=True), quantiles]
    return torch.cat(parts, 2).flatten(1)


def osm_encoder(data: TaskData) -> Encoder:
    """What the map says without any model: area, length and count of objects of each class."""
    if not data.has_graphs:
        raise GeoLinkError(f"baseline osm needs OSM objects, which {data.name} has none of")
    if not data.osm_class_names:
        raise GeoLinkError(f"baseline osm needs classes of objects, which {data.name} does not say")
    classes = len(data.osm_class_names) + 1

    def embed(images: Tensor, graph: GraphBatch | None) -> Tensor:
        assert graph is not None
        return osm_features(graph, classes)

    return Encoder(
        name="osm", key=f"osm {classes}", inputs="osm", prepare=lambda images: images,
        embed=embed, width=3 * classes,
    )  # fmt: skip


def osm_features(graph: GraphBatch, classes: int) -> Tensor:
    """[B, 3 * classes]: log(1 + m2 of polygons), log(1 + m of lines), log(1 + points) by class, the
    first class being none."""
    cell = (graph.chip * 3 + graph.kind()) * classes + graph.osm_class.long().clamp(max=classes - 1)
    amount = torch.where(graph.kind() == 0, 1.0, graph.size) * graph.living()
    total = torch.zeros(graph.chips * 3 * classes, device=graph.chip.device)
    return total.index_add(0, cell, amount).log1p().reshape(graph.chips, 3 * classes)


def fit_majority(data: TaskData, rows: NDArray[Any]) -> Fitted:
    """How frequent each class is among the images whose labels are used, whatever the image."""
    classes = len(data.classes)
    share = _frequency(data, rows, classes)

    def predict(other: TaskData, split: str) -> Outcome:
        part = other.part(split)
        if part.label is not None:
            return Labels(part.ids, part.label, np.tile(share, (len(part), 1)))
        counts = np.zeros((len(part), classes, classes), np.int64)
        guess = int(share.argmax())
        for batch in other.batches(split):
            assert batch.mask is not None
            counts[batch.rows, :, guess] = mask_counts(batch.mask, classes)
        seen, right = counts.sum(), counts[:, guess, guess].sum()
        bins = np.zeros((BINS, 3))
        bins[min(int(share[guess] * BINS), BINS - 1)] = seen, seen * share[guess], right
        return Masks(part.ids, counts, bins)

    return Fitted(predict, {"class": data.classes[int(share.argmax())]})


def _frequency(data: TaskData, rows: NDArray[Any], classes: int) -> NDArray[Any]:
    label = data.part("train").label
    if label is None:
        total = np.zeros(classes)
        for batch in data.batches("train", rows):
            assert batch.mask is not None
            total += mask_counts(batch.mask, classes).sum(0)
        return np.asarray(total / max(total.sum(), 1), np.float32)
    if label.ndim == 2:
        share = label[rows].mean(0)
    else:
        share = np.bincount(label[rows], minlength=classes) / len(rows)
    return np.asarray(share, np.float32)


def mask_counts(mask: Tensor, classes: int) -> NDArray[Any]:
    """Pixels of each class [B, class] of masks uint8 [B, y, x], those to ignore left out."""
    flat = mask.flatten(1).long()
    row = torch.arange(len(flat))[:, None] * (IGNORE + 1)
    counts = torch.bincount((flat + row).flatten(), minlength=len(flat) * (IGNORE + 1))
    found: NDArray[Any] = counts.reshape(len(flat), -1)[:, :classes].numpy()
    return found
