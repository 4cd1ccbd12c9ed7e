"""Which chips of a split an epoch holds, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST = 4
"""A chip is in an epoch so often at most, however rare its classes are."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Chips of S shards that are learnt from."""

    start: NDArray[np.int64]
    """[S + 1], CSR offsets of a shard's chips."""
    chip: NDArray[np.int64]
    """Their places within their shards, rising."""
    share: NDArray[np.float64] | None = None
    """How often an epoch holds each on average; none: each once."""

    @property
    def total(self) -> int:
        """Chips of an epoch, those seen several times counted so often; of every epoch."""
        return len(self.chip) if self.share is None else round(float(self.share.sum()))

    def times(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """How often each chip is in an epoch: its share rounded up or down by systematic sampling,
        so that the sum is always `total` (Madow 1949)."""
        if self.share is None:
            return np.ones(len(self.chip), np.int64)
        ends = np.cumsum(self.share)
        ends *= self.total / ends[-1]
        ends[-1] = self.total
        steps = np.floor(np.concatenate([[0.0], ends]) + rng.uniform())
        return np.diff(steps).astype(np.int64)


def select(
    kept: Sequence[NDArray[np.bool_]],
    weight: Sequence[NDArray[np.float32]] | None,
    presence: Sequence[NDArray[np.bool_]] | None,
    balance: float,
) -> Selection:
    """The chips that are kept, and how often they are seen.

    kept: a shard's chips [n]. weight: how much each counts, if it is to be seen so often. presence:
    [n, class], which classes are on a chip, for `balance`.
    """
    chips = [np.flatnonzero(k) for k in kept]
    start = np.concatenate([[0], np.cumsum([len(c) for c in chips])]).astype(np.int64)
    chip = np.concatenate([*chips, np.zeros(0, np.int64)])
    share = np.ones(len(chip))
    if weight is not None:
        share *= np.concatenate([w[k] for w, k in zip(weight, kept, strict=True)])
    if presence is not None:
        found = np.concatenate([p[k] for p, k in zip(presence, kept, strict=True)])
        share *= repeat_factor(found, balance)
    plain = bool(np.all(share == 1))
    return Selection(start, chip, None if plain else np.minimum(share, MOST))


def repeat_factor(presence: NDArray[np.bool_], balance: float) -> NDArray[np.float64]:
    """How often each chip [n] is seen, by the classes [n, class] on it.

    Repeat factor sampling (Gupta, Dollar, Girshick 2019, LVIS, section 5): a class on a share f of
    the chips that is below `balance` asks for sqrt(balance / f); a chip follows its rarest class.
    """
    if not len(presence):
        return np.ones(0)
    f = np.maximum(presence.mean(axis=0), 1 / len(presence))
    factor = np.sqrt(np.maximum(balance / f, 1.0))
    most: NDArray[np.float64] = np.where(presence, factor, 1.0).max(axis=1, initial=1.0)
    return most
