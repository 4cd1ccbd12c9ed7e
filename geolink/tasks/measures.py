"""Scores of predictions, from counts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from geolink.tasks.contracts import Kind

MEASURES: dict[Kind, tuple[str, ...]] = {
    "class": ("accuracy", "balanced_accuracy", "macro_f1"),
    "multilabel": ("macro_f1", "micro_f1", "mean_average_precision"),
    "mask": ("mean_iou", "accuracy", "macro_f1"),
    "change": ("iou_change", "f1_change", "accuracy"),
}
"""Scores by kind of label; by the first one models are compared and hyper-parameters chosen."""


def confusion_matrix(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Counts [class, class]: true class by row, predicted class by column."""
    counts = np.bincount(truth * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


def class_scores(confusion: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Recall, precision, F1 and intersection over union [..., class] of confusion matrices
    [..., class, class]; 0 where a class was never true, or never predicted."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    true, predicted = confusion.sum(-1), confusion.sum(-2)
    return {
        "recall": hit / np.maximum(true, 1),
        "precision": hit / np.maximum(predicted, 1),
        "f1": 2 * hit / np.maximum(true + predicted, 1),
        "iou": hit / np.maximum(true + predicted - hit, 1),
    }


def scores_of(confusion: NDArray[Any], kind: Kind) -> NDArray[np.float64]:
    """`MEASURES[kind]` [..., 3] of confusion matrices [..., class, class].

    Means over classes are over those that occur among the true ones; of `change` the second class
    is what changed.
    """
    by_class = class_scores(confusion)
    occurs = confusion.sum(-1) > 0
    classes = np.maximum(occurs.sum(-1), 1)
    accuracy = np.trace(confusion, axis1=-2, axis2=-1) / np.maximum(confusion.sum((-1, -2)), 1)

    def mean(name: str) -> NDArray[np.float64]:
        found: NDArray[np.float64] = (by_class[name] * occurs).sum(-1) / classes
        return found

    if kind == "change":
        return np.stack([by_class["iou"][..., 1], by_class["f1"][..., 1], accuracy], -1)
    if kind == "mask":
        return np.stack([mean("iou"), accuracy, mean("f1")], -1)
    return np.stack([accuracy, mean("recall"), mean("f1")], -1)


def multilabel_scores(
    hit: NDArray[np.float64], missed: NDArray[np.float64], wrong: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Macro and micro F1 [..., 2] of counts [..., class]; macro over the classes that occur."""
    f1 = 2 * hit / np.maximum(2 * hit + missed + wrong, 1)
    occurs = hit + missed > 0
    macro = (f1 * occurs).sum(-1) / np.maximum(occurs.sum(-1), 1)
    total = [part.sum(-1) for part in (hit, missed, wrong)]
    micro = 2 * total[0] / np.maximum(2 * total[0] + total[1] + total[2], 1)
    return np.stack([macro, micro], -1)


def average_precision(
    truth: NDArray[np.bool_], probability: NDArray[np.float32], times: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean over the classes that occur of the average precision [R], where image n counts
    `times[r, n]` times: sum of precision times the rise of recall, images of equal probability
    taken together."""
    total, occurs = np.zeros(len(times)), np.zeros(len(times))
    for c in range(truth.shape[1]):
        order = np.argsort(-probability[:, c], kind="stable")
        p, weight = probability[order, c], times[:, order]
        hit = weight * truth[order, c]
        ends = np.searchsorted(-p, -p, side="right") - 1
        precision = (np.cumsum(hit, 1) / np.maximum(np.cumsum(weight, 1), 1e-9))[:, ends]
        there = hit.sum(1)
        total += np.where(there > 0, (hit * precision).sum(1) / np.maximum(there, 1e-9), 0.0)
        occurs += there > 0
    mean: NDArray[np.float64] = total / np.maximum(occurs, 1)
    return mean
