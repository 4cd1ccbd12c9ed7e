"""k nearest neighbours on features of frozen encoders.

Every method gets the same treatment: each feature standardised by the images whose labels are used,
vectors scaled to length 1, neighbours by cosine similarity s weighted exp(s / t).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from geolink.tasks.contracts import Fit, Fitted, Labels, Outcome, TaskData
from schemas.errors import GeoLinkError

_SIMILARITIES = 1 << 24
"""Most similarities held at once."""

_ROWS = 1 << 14
"""Most features of the fitted images that are held at once."""


def fit_knn(fit: Fit) -> Fitted:
    """Neighbours among the images whose labels are used; k and temperature as the config says.

    With a share of the labels that leaves fewer than k, all of them are asked (`chosen` says so).
    Raises GeoLinkError if the whole split has fewer images than neighbours.
    """
    options, part = fit.config.knn, fit.data.part("train")
    if options.k > len(part):
        raise GeoLinkError(
            f"k is {options.k}, but only {len(part)} images of train have a label; use a smaller k"
        )
    k = min(options.k, len(fit.rows))
    assert part.label is not None
    known = fit.features.features(fit.encoder, fit.data, "train")
    scale = feature_scale(known, fit.rows)
    truth = part.label[fit.rows]
    target = truth if truth.ndim == 2 else np.eye(fit.classes, dtype=np.uint8)[truth]

    def predict(data: TaskData, split: str) -> Outcome:
        query = fit.features.features(fit.encoder, data, split)
        asked = data.part(split)
        votes = knn_votes(
            known, fit.rows, target, query, scale, k=k, temperature=options.temperature,
            device=fit.device,
        )  # fmt: skip
        assert asked.label is not None
        return Labels(asked.ids, asked.label, votes)

    return Fitted(predict, {"k": k, "temperature": options.temperature})


def feature_scale(
    features: NDArray[np.float32], rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation [D] of the features [N, D] of some rows, in bounded memory; a feature that
    does not vary has deviation infinity, which makes it 0."""
    total = np.zeros(features.shape[1])
    for part in _split(rows):
        total += features[part].sum(0, dtype=np.float64)
    mean = total / len(rows)
    squares = np.zeros(features.shape[1])
    for part in _split(rows):
        squares += ((features[part] - mean) ** 2).sum(0)
    deviation = np.sqrt(squares / len(rows))
    deviation[deviation <= 1e-6 * np.abs(mean) + 1e-12] = np.inf
    return mean.astype(np.float32), deviation.astype(np.float32)


def unit(
    features: NDArray[np.float32], scale: tuple[NDArray[np.float32], NDArray[np.float32]]
) -> Tensor:
    """Features [N, D] standardised, then of length 1."""
    return F.normalize(torch.from_numpy((features - scale[0]) / scale[1]), dim=1)


def knn_votes(
    known: NDArray[np.float32],
    rows: NDArray[np.int64],
    target: NDArray[np.uint8],
    query: NDArray[np.float32],
    scale: tuple[NDArray[np.float32], NDArray[np.float32]],
    *,
    k: int,
    temperature: float,
    device: torch.device,
) -> NDArray[np.float32]:
    """Share of the votes [Q, class] of each query's k nearest, weighted exp(similarity / t).

    Both sides are read in parts and may be memory maps: memory does not grow with their number.

    Args:
        known: features [N, D].
        rows: [K], those of them that vote.
        target: [K, class], the classes of each, 0 or 1.
        query: features [Q, D].
        scale: of `feature_scale`.
        k, temperature: how many vote, and how much the nearer ones count more.
        device: where similarities are computed.
    """
    votes = np.empty((len(query), target.shape[1]), np.float32)
    classes = torch.from_numpy(target).to(device)
    most = max(min(len(rows), _ROWS), k * target.shape[1])
    side = max(1, min(len(query), _SIMILARITIES // most))
    for low in range(0, len(query), side):
        asked = unit(query[low : low + side], scale).to(device)
        best = torch.full((len(asked), 0), -torch.inf, device=device)
        place = torch.zeros((len(asked), 0), dtype=torch.int64, device=device)
        for first in range(0, len(rows), _ROWS):
            part = unit(known[rows[first : first + _ROWS]], scale).to(device)
            similarity, nearest = (asked @ part.t()).topk(min(k, len(part)), dim=1)
            best, place = torch.cat([best, similarity], 1), torch.cat([place, nearest + first], 1)
            best, kept = best.topk(min(k, best.shape[1]), dim=1)
            place = place.gather(1, kept)
        # Less the largest, which changes no vote and keeps exp from overflowing.
        weight = ((best - best[:, :1]) / temperature).exp()
        voted = torch.einsum("qk,qkc->qc", weight, classes[place].float())
        votes[low : low + side] = (voted / weight.sum(1, keepdim=True)).cpu().numpy()
    return votes


def _split(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return np.array_split(rows, max(1, -(-len(rows) // _ROWS)))
