"""Images to look at: where an encoder is surest and right, and where it is surest and wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from geolink.tasks.contracts import Example, Imagery, Labels, Outcome, TaskData

EACH = 4
"""Best ones, and worst ones."""


def examples_of(outcome: Outcome, data: TaskData, split: str = "test") -> list[Example]:
    """The best images, then the worst, `EACH` at most; `score` is the probability of the truth.

    What a task has kept of its masks (`Masks.examples`) comes as it is.
    """
    if not isinstance(outcome, Labels):
        return list(outcome.examples)
    p = truth_probability(outcome)
    order = np.argsort(-p, kind="stable")
    half = min(EACH, len(order) // 2)
    chosen = np.concatenate([order[:half], order[len(order) - half :]])
    rows = np.sort(chosen)
    pictures: dict[int, NDArray[np.uint8]] = {}
    for batch in data.batches(split, rows, max(len(rows), 1)):
        images = batch.image.numpy()
        for n, row in enumerate(batch.rows.tolist()):
            pictures[row] = picture(images[n], data.imagery)
    return [Example(str(outcome.ids[n]), pictures[n], float(p[n])) for n in chosen.tolist()]


def truth_probability(outcome: Labels) -> NDArray[np.float64]:
    """[N], what an image's own class was given; of several yes or no the mean."""
    p = outcome.probability.astype(np.float64)
    if outcome.truth.ndim == 1:
        found: NDArray[np.float64] = p[np.arange(len(p)), outcome.truth]
    else:
        found = np.where(outcome.truth > 0, p, 1 - p).mean(1)
    return found


def said(outcome: Labels, example: Example, names: tuple[str, ...]) -> tuple[str, str]:
    """The classes of an example and the ones that were predicted."""
    n = int(np.flatnonzero(outcome.ids == example.id)[0])
    p, truth = outcome.probability[n], outcome.truth[n]
    if outcome.truth.ndim == 1:
        return names[int(truth)], names[int(p.argmax())]
    of = [np.flatnonzero(truth > 0).tolist(), np.flatnonzero(p >= 0.5).tolist()]
    true, guess = (", ".join(names[c] for c in some) or "none" for some in of)
    return true, guess


def picture(image: NDArray[Any], imagery: Imagery) -> NDArray[np.uint8]:
    """An image [band, y, x] as RGB [y, x, 3], stretched between its percentiles; of images without
    red, green and blue the first band, or three."""
    names = [name.lower() for name in imagery.bands]
    wanted = [names.index(n) for n in ("red", "green", "blue") if n in names]
    bands = wanted if len(wanted) == 3 else list(range(3)) if len(names) >= 3 else [0, 0, 0]
    values = image[bands].astype(np.float32).transpose(1, 2, 0)
    there = ~(image == imagery.nodata).all(0)
    if not there.any():
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(values[there], (1, 99))
    stretched = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    return np.asarray(np.rint(255 * stretched), np.uint8)
