"""How far a model's confidence can be believed (Guo et al. 2017)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from geolink.tasks.contracts import Labels, Outcome

BINS = 15


def confidence_bins(
    confidence: NDArray[np.floating[Any]], right: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """[`BINS`, 3]: count, sum of confidences, count of those that were right, by confidence in
    equal steps from 0 to 1."""
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return np.stack([
        np.bincount(place, minlength=BINS).astype(np.float64),
        np.bincount(place, confidence, minlength=BINS),
        np.bincount(place, right, minlength=BINS),
    ], 1)  # fmt: skip


def outcome_bins(outcome: Outcome) -> NDArray[np.float64]:
    """`confidence_bins` of predictions: of the class that is predicted; of every yes or no where an
    image may have several classes."""
    if not isinstance(outcome, Labels):
        return outcome.confidence
    p = outcome.probability.astype(np.float64)
    if outcome.truth.ndim == 1:
        return confidence_bins(p.max(1), p.argmax(1) == outcome.truth)
    yes = p >= 0.5
    return confidence_bins(np.where(yes, p, 1 - p).ravel(), (yes == (outcome.truth > 0)).ravel())


def calibration(bins: NDArray[np.float64]) -> dict[str, Any]:
    """Expected calibration error, and by bin its count, mean confidence and share that was right
    (none where a bin is empty)."""
    count, confidence, right = bins.T
    total = max(count.sum(), 1.0)
    filled = count > 0
    safe = np.maximum(count, 1.0)
    return {
        "ece": float(np.abs(right - confidence).sum() / total),
        "count": count.astype(np.int64).tolist(),
        "confidence": [float(c / n) if f else None for c, n, f in zip(confidence, safe, filled)],
        "right": [float(r / n) if f else None for r, n, f in zip(right, safe, filled)],
    }
