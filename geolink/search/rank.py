"""Chips ranked for a query, and how many of those that are looked for come first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geolink.models.base import PretrainModel
from geolink.search.index import Index
from geolink.search.query import Tags, project_tags
from schemas.errors import GeoLinkError

_BLOCK = 1 << 16
"""Chips scored at once."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Places, best first."""

    chips: NDArray[np.int64]
    """[K], of the index."""
    score: NDArray[np.float32]
    """[K], cosine."""
    method: str
    found: Mapping[str, Mapping[str, Any]]
    """By method, how well it finds held-out chips with the tags; empty where none are known."""
    held_out: int
    """Chips that this was measured on."""
    relevant: int
    """Of these, those that have the tags."""


def scores(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Products [N] of vectors [N, P], which may lie on disk, with a query [P]."""
    out = np.empty(len(vectors), np.float32)
    for low in range(0, len(vectors), _BLOCK):
        out[low : low + _BLOCK] = np.asarray(vectors[low : low + _BLOCK]) @ query
    return out


def best(score: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Places of the `count` highest scores, the highest first, of equals the first."""
    count = min(count, len(score))
    if count == 0:
        return np.zeros(0, np.int64)
    # All that equal the last one that is taken, so that the first of these can be told.
    least = np.partition(score, len(score) - count)[len(score) - count]
    some = np.flatnonzero(score >= least)
    return some[np.lexsort((some, -score[some]))][:count]


def search_tags(
    index: Index, model: PretrainModel, tags: Tags, *, count: int, split: str | None,
    fit: str = "train",
) -> Ranking:  # fmt: skip
    """Chips whose images look as if they had the tags.

    `regions`: the mean projection of the OSM of training chips that have them; `tag`: the
    projection of a chip of nothing but them, which also serves where no training chip has them.
    Baselines: `bands`, nearness to the mean band statistics of those training chips; `random`.
    Measured on chips that are not of split `fit`: nothing was taken from these but their images.

    Args:
        index, model, tags: as `make_index`, `open_aligned` and `find_tags` give.
        count: places that are ranked.
        split: only chips of this one are; none: all.
        fit: split whose objects are known.

    Raises GeoLinkError if no chip is of the split.
    """
    examples = np.flatnonzero(tags.has & (index.split == fit))
    by: dict[str, NDArray[np.float32]] = {"tag": scores(index.image, project_tags(model, tags))}
    if len(examples):
        by = {"regions": scores(index.image, _mean(index.region, examples)), **by}
        by["bands"] = _by_bands(index, examples, fit)
    held = np.flatnonzero(index.split != fit)
    found = {}
    if len(held) and tags.has[held].any():
        found = {name: measure(score[held], tags.has[held], count) for name, score in by.items()}
        found["random"] = chance(int(tags.has[held].sum()), len(held), count)
    method = next(iter(by))
    return _ranking(
        index, by[method], count, split, method, found, len(held), int(tags.has[held].sum())
    )


def search_like(index: Index, chip: int, *, count: int, split: str | None) -> Ranking:
    """Chips whose images project near that of another, which is left out. Raises as above."""
    score = scores(index.image, np.asarray(index.image[chip]))
    score[chip] = -np.inf
    return _ranking(index, score, count, split, "like", {}, 0, 0)


def _ranking(
    index: Index, score: NDArray[np.float32], count: int, split: str | None, method: str,
    found: Mapping[str, Mapping[str, Any]], held_out: int, relevant: int,
) -> Ranking:  # fmt: skip
    among = np.flatnonzero((index.split == split) if split else np.isfinite(score))
    among = among[np.isfinite(score[among])]
    if not len(among):
        raise GeoLinkError(f"{index.dataset.path} has no chip in split {split or 'any'} to rank")
    chips = among[best(score[among], count)]
    return Ranking(chips, score[chips], method, found, held_out, relevant)


def _mean(vectors: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean [P] of rows of vectors on disk."""
    total = np.zeros(vectors.shape[1])
    for low in range(0, len(rows), _BLOCK):
        total += np.asarray(vectors[rows[low : low + _BLOCK]], np.float64).sum(0)
    return (total / len(rows)).astype(np.float32)


def _by_bands(index: Index, examples: NDArray[np.int64], fit: str) -> NDArray[np.float32]:
    """Minus the distance to the mean of the examples, in deviations of the training chips."""
    known = np.flatnonzero(index.split == fit)
    mean = _mean(index.bands, known)
    square = np.zeros(index.bands.shape[1])
    for low in range(0, len(known), _BLOCK):
        part = np.asarray(index.bands[known[low : low + _BLOCK]], np.float64) - mean
        square += (part**2).sum(0)
    spread = np.sqrt(square / len(known)) + 1e-9
    middle = _mean(index.bands, examples)
    out = np.empty(len(index), np.float32)
    for low in range(0, len(index), _BLOCK):
        off = (np.asarray(index.bands[low : low + _BLOCK]) - middle) / spread
        out[low : low + _BLOCK] = -np.sqrt((off**2).sum(1))
    return out


def measure(
    score: NDArray[np.float32], relevant: NDArray[np.bool_], count: int
) -> dict[str, float]:
    """Recall and precision among the `count` best, and average precision over all."""
    order = np.lexsort((np.arange(len(score)), -score))
    hit = relevant[order]
    first = int(hit[:count].sum())
    precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
    return {
        "recall": first / int(relevant.sum()),
        "precision": first / min(count, len(hit)),
        "average_precision": float(precision[hit].mean()),
    }


def chance(relevant: int, total: int, count: int) -> dict[str, float]:
    """What a random order has on average."""
    return {
        "recall": min(count, total) / total,
        "precision": relevant / total,
        "average_precision": _chance_precision(relevant, total),
    }


def _chance_precision(relevant: int, total: int) -> float:
    """Mean over all orders: at the rank r of a relevant one, 1 / r is itself, and each of the
    others lies before it with probability (r - 1) / (total - 1)."""
    rank = np.arange(1, total + 1)
    others = (relevant - 1) / max(total - 1, 1)
    return float(((1 + (rank - 1) * others) / rank).mean())
