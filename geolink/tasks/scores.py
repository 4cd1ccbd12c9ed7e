"""Scores of a classification, and bootstrap intervals over the chips that were scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

SCORES = ("accuracy", "balanced_accuracy", "macro_f1")

_CELLS = 1 << 24
"""Most array elements held at once while resampling."""


def confusion_matrix(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Counts [class, class]: true class by row, predicted class by column."""
    counts = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


def class_scores(confusion: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Recall, precision and F1 [..., class] of confusion matrices [..., class, class]; 0 where a
    class was never true, or never predicted."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    true, predicted = confusion.sum(-1), confusion.sum(-2)
    return {
        "recall": hit / np.maximum(true, 1),
        "precision": hit / np.maximum(predicted, 1),
        "f1": 2 * hit / np.maximum(true + predicted, 1),
    }


def scores(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """`SCORES` [..., 3] of confusion matrices [..., class, class].

    Balanced accuracy and macro F1 are means over the classes that occur among the true ones.
    """
    by_class = class_scores(confusion)
    occurs = confusion.sum(-1) > 0
    classes = np.maximum(occurs.sum(-1), 1)
    total = np.maximum(confusion.sum((-1, -2)), 1)
    accuracy = np.trace(confusion, axis1=-2, axis2=-1) / total
    recall = (by_class["recall"] * occurs).sum(-1) / classes
    f1 = (by_class["f1"] * occurs).sum(-1) / classes
    return np.stack([accuracy, recall, f1], -1)


def bootstrap(
    truth: NDArray[np.int64],
    predictions: Mapping[str, NDArray[np.int64]],
    classes: int,
    *,
    resamples: int,
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    """`SCORES` [resamples, 3] of every method on the same resamples of the chips, so that their
    differences are paired (percentile bootstrap, Efron & Tibshirani 1993, §13.3)."""
    parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in predictions}
    for chosen in _resample(len(truth), max(len(truth), classes**2), resamples, seed):
        rows = np.arange(len(chosen))[:, None] * classes**2
        for name, predicted in predictions.items():
            cell = (truth * classes + predicted)[chosen] + rows
            counts = np.bincount(cell.ravel(), minlength=len(chosen) * classes**2)
            parts[name].append(scores(counts.reshape(-1, classes, classes)))
    return {name: np.concatenate(part) for name, part in parts.items()}


def _resample(chips: int, row_cells: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Draws with replacement [.., chips], `resamples` in all, in blocks of bounded size."""
    generator = np.random.default_rng(seed)
    block = max(1, _CELLS // row_cells)
    for start in range(0, resamples, block):
        yield generator.integers(chips, size=(min(block, resamples - start), chips))


def interval(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 95 % interval [2 (low, high), score] of scores drawn by `bootstrap`."""
    bounds: NDArray[np.float64] = np.quantile(drawn, (0.025, 0.975), axis=0)
    return bounds
