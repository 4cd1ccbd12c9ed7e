"""k nearest neighbours on shard labels: which class covers most of a chip?

Features of the frozen encoder against a random-weight encoder, raw pixels, band statistics and
the most common class. Every method gets the same treatment: each feature standardised by the
fitted chips, vectors scaled to length 1, neighbours by cosine similarity s weighted exp(s / t).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from geolink.checkpoint import CheckpointMeta, load_model
from geolink.device import normalise, pick_device
from geolink.reader import Dataset, open_dataset, read_shard
from geolink.tasks.features import Extractor, extractors
from geolink.tasks.scores import (
    SCORES,
    bootstrap,
    class_scores,
    confusion_matrix,
    interval,
    scores,
)
from schemas.errors import GeoLinkError
from schemas.evaluation import EvaluateConfig

_SIMILARITIES = 1 << 24
"""Most similarities held at once."""

_INTERVAL = {
    "accuracy": "interval", "balanced_accuracy": "balanced_interval",
    "macro_f1": "macro_f1_interval",
}  # fmt: skip
_DIFFERENCE = {
    "accuracy": "difference", "balanced_accuracy": "balanced_difference",
    "macro_f1": "macro_f1_difference",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class LabelledChips:
    """Chips that have a label, and what was left out."""

    features: dict[str, Tensor]
    """By method: float32 [N, D]."""
    label: NDArray[np.int64]
    """Taxonomy class minus 1 [N]: index into the taxonomy's names."""
    left_out: dict[str, int]
    center_lonlat: NDArray[np.float64]
    """[N, 2], degrees."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a checkpoint; the result is plain data for JSON, written to `config.output` if given.

    Raises GeoLinkError: no such checkpoint or dataset, one that does not fit the other, splits
    without labelled chips or on both sides, fewer fitted chips than k.
    """
    if both := set(config.fit) & set(config.held_out):
        raise GeoLinkError(f"split {both.pop()!r} is in both fit and held_out; keep them apart")
    model, meta = load_model(config.checkpoint)
    dataset = open_dataset(config.dataset, config.snapshot)
    check_fits(meta, dataset)
    device = pick_device("auto")
    methods = extractors(model.to(device), meta, config.baselines, config.seed)
    fit = collect(dataset, config.fit, methods, meta, config.min_share, device)
    held_out = collect(dataset, config.held_out, methods, meta, config.min_share, device)
    _check_chips(config, fit, held_out)

    names = dataset.info.taxonomy.names
    found = np.union1d(fit.label, held_out.label)
    truth, fitted = np.searchsorted(found, held_out.label), np.searchsorted(found, fit.label)
    predictions = {
        method: knn_predict(
            *standardise(fit.features[method], held_out.features[method]),
            fitted, len(found), k=config.k, temperature=config.temperature,
        )
        for method in methods
    }  # fmt: skip
    predictions["majority"] = np.full_like(truth, np.bincount(fitted).argmax())

    result = {
        "task": config.task,
        "checkpoint": str(config.checkpoint),
        "step": meta.step,
        "dataset": dataset.info.name,
        "snapshot": dataset.snapshot,
        "fit_splits": list(config.fit),
        "held_out_splits": list(config.held_out),
        "fit": len(fitted),
        "held_out": len(truth),
        "left_out": {"fit": fit.left_out, "held_out": held_out.left_out},
        "classes": len(found),
        "class_names": [names[c] for c in found.tolist()],
        "class_chips": {
            "fit": np.bincount(fitted, minlength=len(found)).tolist(),
            "held_out": np.bincount(truth, minlength=len(found)).tolist(),
        },
        "k": config.k,
        "temperature": config.temperature,
        "min_share": config.min_share,
        "bootstrap": config.bootstrap,
        "seed": config.seed,
        "scores": compare(
            truth, predictions, len(found), resamples=config.bootstrap, seed=config.seed
        ),
    }
    write_result(result, config.output)
    return result


def evaluate_seeds(config: EvaluateConfig, checkpoints: Sequence[Path]) -> dict[str, Any]:
    """`evaluate` each checkpoint of one model trained with several seeds, and their spread.

    Random weights and resamples are of another seed for each, from `config.seed` on.

    Returns `runs` (a result each) and `scores`: by method, every score and difference with its
    mean, deviation (n - 1; 0 for one run), lowest and highest over the runs. Written to
    `config.output` if given. Raises GeoLinkError as `evaluate`, or if there is no checkpoint.
    """
    if not checkpoints:
        raise GeoLinkError("there is no checkpoint to evaluate")
    runs = [
        evaluate(config.model_copy(update={"checkpoint": p, "output": None, "seed": seed}))
        for seed, p in enumerate(checkpoints, config.seed)
    ]
    result = {"runs": runs, "scores": _spread([run["scores"] for run in runs])}
    write_result(result, config.output)
    return result


def check_fits(meta: CheckpointMeta, dataset: Dataset) -> None:
    """Raises GeoLinkError if a checkpoint's encoder cannot take a dataset's chips."""
    bands = tuple(band.name for band in dataset.info.sensor.bands)
    if bands != meta.bands:
        raise GeoLinkError(
            f"the checkpoint was trained on bands {', '.join(meta.bands)}, the dataset "
            f"{dataset.path} has {', '.join(bands)}"
        )
    if dataset.info.grid.size != meta.config.model.image_size:
        raise GeoLinkError(
            f"the checkpoint takes chips of {meta.config.model.image_size} pixels, the dataset "
            f"{dataset.path} has {dataset.info.grid.size}"
        )


def collect(
    dataset: Dataset,
    splits: Sequence[str],
    methods: Mapping[str, Extractor],
    meta: CheckpointMeta,
    min_share: float,
    device: torch.device,
) -> LabelledChips:
    """Features and labels of the splits' chips, shard by shard.

    A chip's label is the class with most area (the first of equals). Chips without any labelled
    pixel, and those whose class covers less than `min_share`, are left out and counted.
    """
    features: dict[str, list[Tensor]] = {name: [] for name in methods}
    labels: list[NDArray[np.int64]] = []
    lonlat: list[NDArray[np.float64]] = []
    left_out = {"no_label": 0, "below_min_share": 0}
    scale = meta.band_scale(device)
    for row in dataset.rows:
        if row.split not in splits:
            continue
        shard = read_shard(dataset, row)
        share = shard["label_region"]
        largest = share.max(1)
        kept = (largest > 0) & (largest >= min_share)
        left_out["no_label"] += int((largest <= 0).sum())
        left_out["below_min_share"] += int(((largest > 0) & ~kept).sum())
        if not kept.any():
            continue
        pixels = torch.from_numpy(shard["image"][kept]).to(device)
        images = normalise(pixels, *scale, meta.nodata)
        for name, extract in methods.items():
            features[name].append(extract(images).cpu())
        labels.append(share[kept].argmax(1))
        lonlat.append(shard["center_lonlat"][kept])
    return LabelledChips(
        {name: torch.cat(part) if part else torch.zeros(0, 1) for name, part in features.items()},
        np.concatenate(labels) if labels else np.zeros(0, np.int64),
        left_out,
        np.concatenate([np.zeros((0, 2)), *lonlat]),
    )


def standardise(fit: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, D], [Q, D] with mean 0 and deviation 1 over `fit`, then of length 1."""
    deviation, mean = torch.std_mean(fit, 0, correction=0)
    scale = torch.where(deviation > 1e-6 * mean.abs() + 1e-12, deviation, torch.inf)
    return F.normalize((fit - mean) / scale, dim=1), F.normalize((query - mean) / scale, dim=1)


def knn_predict(
    fit: Tensor,
    query: Tensor,
    label: NDArray[np.int64],
    classes: int,
    *,
    k: int,
    temperature: float,
) -> NDArray[np.int64]:
    """The class [Q] of each query by a vote of its k nearest, weighted exp(similarity / t).

    `fit` float [N, D] and `query` [Q, D] have length 1; `label` [N] is 0..classes-1.
    """
    labels = torch.from_numpy(label)
    predicted = []
    for part in torch.split(query, max(1, _SIMILARITIES // max(len(fit), 1))):
        similarity, nearest = (part @ fit.t()).topk(k, dim=1)
        # Less the largest, which changes no vote and keeps exp from overflowing.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[nearest], weight)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted).numpy()


def compare(
    truth: NDArray[np.int64],
    predictions: Mapping[str, NDArray[np.int64]],
    classes: int,
    *,
    resamples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Scores of every method: each with its 95 % interval `[low, high]`, for all but `encoder`
    the paired difference `[value, low, high]` of the encoder's to it, and figures by class."""
    drawn = bootstrap(truth, predictions, classes, resamples=resamples, seed=seed)
    confusion = {m: confusion_matrix(truth, p, classes) for m, p in predictions.items()}
    value = {m: scores(c) for m, c in confusion.items()}
    result: dict[str, dict[str, Any]] = {}
    for m in predictions:
        low, high = interval(drawn[m])
        result[m] = {}
        for i, name in enumerate(SCORES):
            result[m][name] = float(value[m][i])
            result[m][_INTERVAL[name]] = [float(low[i]), float(high[i])]
        if m != "encoder":
            gain = value["encoder"] - value[m]
            low, high = interval(drawn["encoder"] - drawn[m])
            for i, name in enumerate(SCORES):
                result[m][_DIFFERENCE[name]] = [float(gain[i]), float(low[i]), float(high[i])]
        result[m] |= {name: part.tolist() for name, part in class_scores(confusion[m]).items()}
        result[m]["confusion"] = confusion[m].tolist()
    return result


def write_result(result: Mapping[str, Any], path: Path | None) -> None:
    """Write a result as JSON, if there is a path. Raises GeoLinkError if it cannot be written."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise GeoLinkError(f"cannot write {path}: {error}") from error


def _check_chips(config: EvaluateConfig, fit: LabelledChips, held_out: LabelledChips) -> None:
    for name, splits, chips in (
        ("fit", config.fit, fit), ("held_out", config.held_out, held_out),
    ):  # fmt: skip
        if not len(chips.label):
            counts = ", ".join(f"{n} {reason}" for reason, n in chips.left_out.items())
            raise GeoLinkError(
                f"{name}: no chip of split {' or '.join(splits)} in {config.dataset} has a label "
                f"({counts}); choose other splits or a lower min_share"
            )
    if config.k > len(fit.label):
        raise GeoLinkError(
            f"k is {config.k}, but only {len(fit.label)} chips of {' and '.join(config.fit)} "
            "have a label; use a smaller k"
        )


def _spread(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Over runs: mean, deviation, lowest and highest of every method's scores and differences."""
    spread: dict[str, dict[str, dict[str, float]]] = {}
    for method in runs[0]:
        spread[method] = {}
        for name in (*SCORES, *_DIFFERENCE.values()):
            if name in runs[0][method]:
                values = np.array([np.atleast_1d(run[method][name])[0] for run in runs])
                spread[method][name] = {
                    "mean": float(values.mean()),
                    "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
                    "low": float(values.min()),
                    "high": float(values.max()),
                }
    return spread
