"""Linear probe: logistic regression on features of a frozen encoder.

Features are standardised by the images whose labels are used. One classifier is fitted for each
penalty by L-BFGS; the one that scores best on the validation split is kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from geolink.tasks.contracts import Fit, Fitted, Labels, Outcome, TaskData
from geolink.tasks.knn import feature_scale
from geolink.tasks.measures import MEASURES
from geolink.tasks.significance import score

_ROWS = 1 << 15
"""Most features that are on the device at once."""

Scale = tuple[NDArray[np.float32], NDArray[np.float32]]


def fit_linear(fit: Fit) -> Fitted:
    """The classifier with the penalty that validation chooses; of equals the largest."""
    part = fit.data.part("train")
    assert part.label is not None
    known = fit.features.features(fit.encoder, fit.data, "train")
    label, scale = part.label[fit.rows], feature_scale(known, fit.rows)
    kind, penalties = fit.data.kind, sorted(fit.config.linear.penalties, reverse=True)
    weights, trials = torch.zeros(fit.classes, known.shape[1] + 1), []
    best, kept = -np.inf, weights
    for penalty in penalties:
        # From the stronger to the weaker: each starts where the one before ended.
        weights = fit_weights(
            known, fit.rows, label, fit.classes, scale, penalty=penalty,
            steps=fit.config.linear.steps, device=fit.device, start=weights,
        )  # fmt: skip
        found = float(score(_outcome(weights, scale, fit, fit.data, "val"), kind)[0])
        trials.append({"penalty": penalty, "score": found})
        if found > best:
            best, kept, chosen = found, weights, penalty
    about: dict[str, Any] = {"penalty": chosen, "chosen_by": f"{MEASURES[kind][0]} on val"}
    return Fitted(lambda data, split: _outcome(kept, scale, fit, data, split), about, trials)


def _outcome(weights: Tensor, scale: Scale, fit: Fit, data: TaskData, split: str) -> Outcome:
    part = data.part(split)
    assert part.label is not None
    features = fit.features.features(fit.encoder, data, split)
    logits = [
        _logits(weights.to(fit.device), _part(features, np.arange(low, high), scale, fit.device))
        for low, high in _spans(len(features))
    ]
    joined = torch.cat(logits)
    p = joined.sigmoid() if part.label.ndim == 2 else joined.softmax(1)
    return Labels(part.ids, part.label, p.cpu().numpy())


def fit_weights(
    features: NDArray[np.float32],
    rows: NDArray[np.int64],
    label: NDArray[Any],
    classes: int,
    scale: Scale,
    *,
    penalty: float,
    steps: int,
    device: torch.device,
    start: Tensor | None = None,
) -> Tensor:
    """Weights [class, D + 1] (the last is the bias, which is not penalised) that minimise the mean
    cross-entropy plus penalty / 2 times the squares of the weights.

    Args:
        features: [N, D], may be a memory map: it is read in parts.
        rows: [K], those that are learnt from.
        label: int64 [K], or uint8 [K, class] (each class a yes or no of its own).
        classes: how many.
        scale: of `geolink.tasks.knn.feature_scale`.
        penalty: L2.
        steps: most of L-BFGS.
        device: where it is computed.
        start: weights to start from; default: zeros.
    """
    target = torch.from_numpy(label.astype(np.float32 if label.ndim == 2 else np.int64)).to(device)
    begin = torch.zeros(classes, features.shape[1] + 1) if start is None else start.clone()
    weights = begin.to(device).requires_grad_(True)
    spans = _spans(len(rows))
    whole = [_part(features, rows, scale, device)] if len(spans) == 1 else None
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=steps, tolerance_grad=1e-5, tolerance_change=1e-7, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = penalty / 2 * (weights[:, :-1] ** 2).sum()
        value.backward()  # type: ignore[no-untyped-call]
        for low, high in spans:
            part = whole[0] if whole else _part(features, rows[low:high], scale, device)
            some = _cross_entropy(_logits(weights, part), target[low:high]) / len(rows)
            some.backward()  # type: ignore[no-untyped-call]
            value = value + some.detach()
        return value.detach()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach().cpu()


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    if target.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return F.cross_entropy(logits, target, reduction="sum")


def _logits(weights: Tensor, part: Tensor) -> Tensor:
    return part @ weights[:, :-1].t() + weights[:, -1]


def _part(
    features: NDArray[np.float32], rows: NDArray[np.int64], scale: Scale, device: torch.device
) -> Tensor:
    return torch.from_numpy((features[rows] - scale[0]) / scale[1]).to(device)


def _spans(count: int) -> list[tuple[int, int]]:
    return [(low, min(low + _ROWS, count)) for low in range(0, count, _ROWS)]
