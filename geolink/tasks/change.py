"""Change detection: what changed between two dates, by one encoder that sees both."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geolink.tasks.adapt import band_values
from geolink.tasks.contracts import Encoder, Fit, Fitted, TaskBatch, TaskData
from geolink.tasks.dense import fit_dense, predict_masks
from geolink.tasks.measures import MEASURES, class_scores
from geolink.tasks.train import Given

THRESHOLDS = np.arange(1, 101) / 20
"""Differences that are tried, in deviations of a band: 0.05 to 5."""

_BATCH = 16
"""Pairs at once, in float32."""


def fit_change(fit: Fit) -> Fitted:
    """A head on what differs between the maps of two dates. Raises GeoLinkError as `fit_dense`."""
    return fit_dense(fit, map_differences)


def map_differences(encoder: Encoder, x: Given) -> list[Tensor]:
    """Absolute differences [B, widths[i], grid, grid] of the maps of two dates, by one encoder with
    the same weights for both (siamese difference, Daudt et al. 2018): their order does not
    matter."""
    assert encoder.maps is not None
    assert x.second is not None
    earlier, later = encoder.maps(x.images, x.graph), encoder.maps(x.second, x.graph)
    return [(a - b).abs() for a, b in zip(earlier, later, strict=True)]


def fit_difference(data: TaskData) -> Fitted:
    """Change where pixels differ by no less than a threshold, which validation chooses."""
    _, std = band_values(data, range(len(data.imagery.bands)))
    scale = torch.from_numpy(std.clip(min=1e-9).astype(np.float32))[:, None, None]

    def step(batch: TaskBatch) -> NDArray[np.int64]:
        """How many of `THRESHOLDS` each pixel [B, y, x] reaches."""
        difference = pixel_difference(batch, scale, data.imagery.nodata)
        return np.searchsorted(THRESHOLDS, difference, side="right")

    # Validation pixels by their class and how many thresholds they reach.
    counts = np.zeros((2, len(THRESHOLDS) + 1), np.int64)
    for batch in data.batches("val", batch_size=_BATCH):
        assert batch.mask is not None
        cell = batch.mask.numpy().astype(np.int64) * counts.shape[1] + step(batch)
        counts += np.bincount(cell.ravel(), minlength=counts.size).reshape(counts.shape)
    changed = counts[:, ::-1].cumsum(1)[:, ::-1][:, 1:].T
    confusion = np.stack([counts.sum(1) - changed, changed], -1)
    iou = class_scores(confusion)["iou"][:, 1]
    best = int(iou.argmax())
    # As sure as it was right on validation where it said the same.
    sure = class_scores(confusion[best])["precision"].astype(np.float32)

    def say(batch: TaskBatch) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        guess = (step(batch) > best).astype(np.uint8)
        return sure[guess], guess

    return Fitted(
        lambda other, split: predict_masks(say, other, split, _BATCH),
        {"threshold": float(THRESHOLDS[best]), "chosen_by": f"{MEASURES['change'][0]} on val"},
        [{"threshold": float(t), "score": float(s)} for t, s in zip(THRESHOLDS, iou, strict=True)],
    )


def pixel_difference(batch: TaskBatch, scale: Tensor, nodata: int) -> NDArray[np.float32]:
    """Mean over bands of the absolute difference of two dates [B, y, x], in units of `scale`
    [band, 1, 1]; 0 where a date has no data."""
    assert batch.second is not None
    dates = batch.image.float(), batch.second.float()
    empty = (dates[0] == nodata).all(1) | (dates[1] == nodata).all(1)
    difference = ((dates[0] - dates[1]).abs() / scale).mean(1)
    found: NDArray[np.float32] = difference.masked_fill(empty, 0).numpy()
    return found
