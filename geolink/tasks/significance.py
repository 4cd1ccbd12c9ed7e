"""Intervals over the images that were scored, and tests of one model against another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from geolink.tasks.contracts import Kind, Labels, Outcome
from geolink.tasks.measures import average_precision, multilabel_scores, scores_of

_CELLS = 1 << 24
"""Most array elements held at once while resampling."""

Resample = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Draws [R, N] -> scores [R, S]."""


def score(outcome: Outcome, kind: Kind) -> NDArray[np.float64]:
    """`MEASURES[kind]` [S] of predictions."""
    images = len(outcome.ids)
    found: NDArray[np.float64] = resampled(outcome, kind)(np.arange(images)[None])[0]
    return found


def bootstrap(
    outcomes: Sequence[Outcome], kind: Kind, *, resamples: int, seed: int
) -> NDArray[np.float64]:
    """`MEASURES[kind]` [resamples, S], mean over the outcomes, of draws of images with replacement.

    The draws are the same for all outcomes of equally many images and the same seed, so that
    differences are paired (percentile bootstrap, Efron & Tibshirani 1993, §13.3).
    """
    images = len(outcomes[0].ids)
    each = [resampled(outcome, kind) for outcome in outcomes]
    cells = max(images, _cells(outcomes[0], kind))
    return np.concatenate([
        np.mean([scored(drawn) for scored in each], axis=0)
        for drawn in draws(images, cells, resamples, seed)
    ])  # fmt: skip


def draws(images: int, cells: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Draws with replacement [.., images], `resamples` in all, in blocks of bounded size."""
    generator = np.random.default_rng(seed)
    block = max(1, _CELLS // cells)
    for start in range(0, resamples, block):
        yield generator.integers(images, size=(min(block, resamples - start), images))


def interval(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 95 % interval [2 (low, high), S] of scores drawn by `bootstrap`."""
    bounds: NDArray[np.float64] = np.quantile(drawn, (0.025, 0.975), axis=0)
    return bounds


def paired_test(
    ours: Sequence[Outcome], theirs: Sequence[Outcome], kind: Kind, *, permutations: int, seed: int
) -> NDArray[np.float64]:
    """Two-sided p [S] of the difference of two models' scores, mean over outcomes (seeds).

    Approximate randomisation (Noreen 1989; Yeh 2000): were the models alike, their predictions for
    an image could be swapped; p is the share of random swaps with a difference as large, the one
    that was seen counted in.
    """
    pairs = [_Swapped(a, b, kind) for a, b in zip(ours, theirs, strict=True)]
    images, generator = len(ours[0].ids), np.random.default_rng(seed)
    plain = np.zeros((1, images), bool)
    seen = np.abs(np.mean([pair(plain) for pair in pairs], axis=0)[0])
    as_large = np.zeros(len(seen))
    block = max(1, _CELLS // max(images, _cells(ours[0], kind)))
    for start in range(0, permutations, block):
        swap = generator.random((min(block, permutations - start), images)) < 0.5
        found = np.abs(np.mean([pair(swap) for pair in pairs], axis=0))
        as_large += (found >= seen - 1e-12).sum(0)
    return np.asarray((1 + as_large) / (1 + permutations))


class _Swapped:
    """Differences of two models' scores [R, S] where predictions of images are swapped [R, N]."""

    def __init__(self, a: Outcome, b: Outcome, kind: Kind) -> None:
        # Both one after another: image n of the second is n + N, so a swap is another draw.
        self._images = len(a.ids)
        self._scored = resampled(_joined(a, b), kind)

    def __call__(self, swap: NDArray[np.bool_]) -> NDArray[np.float64]:
        own = np.arange(self._images) + np.where(swap, self._images, 0)
        other = np.arange(self._images) + np.where(swap, 0, self._images)
        return self._scored(own) - self._scored(other)


def _joined(a: Outcome, b: Outcome) -> Outcome:
    if isinstance(a, Labels) and isinstance(b, Labels):
        return Labels(
            np.concatenate([a.ids, b.ids]), np.concatenate([a.truth, b.truth]),
            np.concatenate([a.probability, b.probability]),
        )  # fmt: skip
    assert not isinstance(a, Labels)
    assert not isinstance(b, Labels)
    return type(a)(
        np.concatenate([a.ids, b.ids]), np.concatenate([a.counts, b.counts]), a.confidence
    )


def _cells(outcome: Outcome, kind: Kind) -> int:
    """Array elements that a draw takes."""
    if isinstance(outcome, Labels):
        classes = outcome.probability.shape[1]
        return classes**2 if kind == "class" else len(outcome.ids) * 4
    return int(outcome.counts[0].size)


def resampled(outcome: Outcome, kind: Kind) -> Resample:
    """The function that scores draws of an outcome's images."""
    if not isinstance(outcome, Labels):
        flat = outcome.counts.reshape(len(outcome.counts), -1).astype(np.float64)
        classes = outcome.counts.shape[-1]

        def of_masks(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
            times = _times(drawn, len(flat))
            return scores_of((times @ flat).reshape(-1, classes, classes), kind)

        return of_masks
    truth, p = outcome.truth, outcome.probability
    if kind == "multilabel":
        return lambda drawn: _of_many(truth > 0, p, _times(drawn, len(p)))
    classes = p.shape[1]
    cell = truth * classes + p.argmax(1)

    def of_classes(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
        rows = np.arange(len(drawn))[:, None] * classes**2
        counts = np.bincount((cell[drawn] + rows).ravel(), minlength=len(drawn) * classes**2)
        return scores_of(counts.reshape(-1, classes, classes), kind)

    return of_classes


def _times(drawn: NDArray[np.int64], images: int) -> NDArray[np.float64]:
    """How often each image [R, images] is in each draw."""
    rows = np.arange(len(drawn))[:, None] * images
    counts = np.bincount((drawn + rows).ravel(), minlength=len(drawn) * images)
    return counts.reshape(-1, images).astype(np.float64)


def _of_many(
    truth: NDArray[np.bool_], p: NDArray[np.float32], times: NDArray[np.float64]
) -> NDArray[np.float64]:
    yes = p >= 0.5
    both = [np.asarray(part, np.float64) for part in (truth & yes, truth & ~yes, ~truth & yes)]
    hit, missed, wrong = (times @ part for part in both)
    f1 = multilabel_scores(hit, missed, wrong)
    return np.concatenate([f1, average_precision(truth, p, times)[:, None]], 1)
