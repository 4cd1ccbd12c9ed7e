"""One evaluation: data, splits that share nothing, few labels, encoder and baselines, scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geolink.checkpoint import code_version
from geolink.device import pick_device
from geolink.tasks.baselines import default_baselines, fit_majority, open_baseline
from geolink.tasks.change import fit_difference
from geolink.tasks.contracts import Encoder, Fit, Fitted, Leak, Outcome, ReadPixels, Task, TaskData
from geolink.tasks.encoders import open_encoder
from geolink.tasks.leaks import check_leaks
from geolink.tasks.registry import TASKS
from geolink.tasks.report import summarise, write_results
from geolink.tasks.sources import open_data
from geolink.tasks.sources.files import read_pixels
from geolink.tasks.store import FeatureStore
from geolink.tasks.subsets import few_labels
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig

Say = Callable[[str], None]

PLAIN: dict[str, Callable[[TaskData, NDArray[np.int64]], Fitted]] = {
    "majority": fit_majority,
    "difference": lambda data, _: fit_difference(data),
}
"""Baselines without an encoder."""


@dataclass(frozen=True, eq=False)
class Run:
    """One method, fitted with some labels and a seed, and its predictions for the test split."""

    method: str
    share: float
    seed: int
    labels: int
    fitted: Fitted
    outcome: Outcome
    about: Mapping[str, Any]
    """What is known of the encoder."""


def evaluate(
    config: TaskConfig, read: ReadPixels = read_pixels, say: Say = lambda _: None
) -> dict[str, Any]:
    """Evaluate a checkpoint by a task, beside its baselines; the result as plain values.

    Everything is fitted, and every hyper-parameter chosen, on data whose test split cannot be read.
    Written to `config.output` if given: `result.json`, `result.md`, `result.png`,
    `predictions.npz`, `index.html`.

    Args:
        config: what is evaluated.
        read: reads image files.
        say: is told what is done.

    Raises GeoLinkError: what is to be evaluated is not there or does not fit; splits share images.
    """
    task, device = TASKS[config.task], pick_device(config.accelerator)
    data = open_data(config, read)
    check_task(task, data)
    if data.kind != "change" and "difference" in (config.baselines or ()):
        raise GeoLinkError(
            f"baseline difference is for images of two dates, those of {data.name} are of one"
        )
    leaks = check_leaks(data)
    store = FeatureStore(config.cache, device, config.batch_size)
    methods = ("encoder", *default_baselines(task, config, data))
    runs: list[Run] = []
    for method in methods:
        runs += _runs(method, task, config, data, store, device, say)
    about = {
        "task": task.name, "about": task.about, "checkpoint": str(config.checkpoint),
        "step": runs[0].about.get("step"), "encoder": dict(runs[0].about),
        "inputs": config.inputs, "dataset": data.name, "data": dict(data.about),
        "classes": len(data.classes), "class_names": list(data.classes), "kind": data.kind,
        "images": {split: len(part) for split, part in data.splits.items()},
        "left_out": {split: dict(part.left_out) for split, part in data.splits.items()},
        "imagery": asdict(data.imagery), "leaks": leaks, "geolink": code_version()[0],
        "notes": [*data.notes, *_notes(runs[0], data, config)],
        "device": str(device), "config": config.model_dump(mode="json"),
    }  # fmt: skip
    # As a reader of the JSON file has it: lists for tuples.
    result: dict[str, Any] = json.loads(json.dumps(summarise(about, runs, data, config)))
    if config.output is not None:
        write_results(result, runs, data, config.output)
        best = next(r for r in runs if r.method == "encoder" and r.share == max(config.shares))
        if best.fitted.write is not None:
            best.fitted.write(config.output)
    return result


def _notes(encoder: Run, data: TaskData, config: TaskConfig) -> list[str]:
    """What a reader of the scores should know of the encoder."""
    about, notes = encoder.about, []
    learnt = about.get("pretrained_on", "")
    if about.get("dataset") == data.name and (learnt is None or learnt in config.held_out):
        notes.append(
            f"the checkpoint was pretrained on {learnt or 'all splits'} of {data.name}, without "
            "labels but with the images and objects that are scored here"
        )
    if about.get("variant") == "paper" and config.inputs != "image":
        notes.append(
            "the published OSM encoder norms over all objects of a batch, so features depend a "
            f"little on batch_size ({config.batch_size})"
        )
    return notes


def check_task(task: Task, data: TaskData) -> None:
    """Raises GeoLinkError if data have not what a task needs."""
    if data.kind not in task.kinds:
        raise GeoLinkError(
            f"task {task.name} needs labels of kind {' or '.join(task.kinds)}, those of "
            f"{data.name} are of kind {data.kind}"
        )
    if task.chooses and "val" not in data.splits:
        raise GeoLinkError(
            f"task {task.name} chooses on a validation split, and {data.name} has none left: it "
            "must not be in fit or held_out"
        )


def _runs(
    method: str, task: Task, config: TaskConfig, data: TaskData, store: FeatureStore,
    device: torch.device, say: Say,
) -> list[Run]:  # fmt: skip
    """A method with every share of the labels and every seed."""
    runs: list[Run] = []
    hidden = data.hide("test")
    part = data.part("train")
    encoder: Encoder | None = None
    for seed in range(config.seed, config.seed + config.seeds):
        if method not in PLAIN and (encoder is None or method == "random"):
            encoder = _open(method, config, hidden, device, seed)
        for share in config.shares:
            rows = few_labels(part.label, len(part), share, seed)
            same = _same(runs, share, rows) if not (task.seeded or method == "random") else None
            if same is not None:
                runs.append(replace(same, seed=seed))
                continue
            say(f"{method}: {len(rows):,} labels, seed {seed}")
            fitted = _fit(method, task, encoder, hidden, rows, config, seed, device, store)
            outcome = fitted.predict(data, "test")
            about = {} if encoder is None else encoder.about
            runs.append(Run(method, share, seed, len(rows), fitted, outcome, about))
    return runs


def _open(
    method: str, config: TaskConfig, data: TaskData, device: torch.device, seed: int
) -> Encoder:
    if method != "encoder":
        return open_baseline(method, config, data, device, seed)
    return open_encoder(
        config.checkpoint, config.inputs, data, device=device, size=config.size,
        normalise=config.normalise, seed=seed,
    )  # fmt: skip


def _same(runs: list[Run], share: float, rows: NDArray[np.int64]) -> Run | None:
    """A run that all labels make the same whatever the seed."""
    found = [run for run in runs if run.share == share and share == 1.0]
    return found[0] if found and found[0].labels == len(rows) else None


def _fit(
    method: str, task: Task, encoder: Encoder | None, hidden: TaskData, rows: NDArray[np.int64],
    config: TaskConfig, seed: int, device: torch.device, store: FeatureStore,
) -> Fitted:  # fmt: skip
    if "test" not in hidden.hidden:
        raise Leak("a task is fitted on data whose test split is not hidden")
    if encoder is None:
        return PLAIN[method](hidden, rows)
    return task.fit(Fit(encoder, hidden, rows, config, seed, device, store))


def evaluate_seeds(config: TaskConfig, checkpoints: list[Path]) -> dict[str, Any]:
    """`evaluate` each checkpoint of one model trained with several seeds, and their spread.

    Random weights and labels are of another seed for each, from `config.seed` on.
    Returns `runs` (a result each) and `scores`: by method and score its mean, deviation (n - 1; 0
    for one run), lowest and highest. Raises GeoLinkError as `evaluate`, or if there is no
    checkpoint.
    """
    if not checkpoints:
        raise GeoLinkError("there is no checkpoint to evaluate")
    results = [
        evaluate(config.model_copy(update={"checkpoint": path, "output": None, "seed": seed}))
        for seed, path in enumerate(checkpoints, config.seed)
    ]
    return {"runs": results, "scores": spread([result["scores"] for result in results])}


def spread(scores: list[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Over results: mean, deviation, lowest and highest of every method's scores."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method in scores[0]:
        found[method] = {}
        for name in scores[0][method]["score"]:
            values = np.array([each[method]["score"][name] for each in scores])
            found[method][name] = {
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
                "low": float(values.min()),
                "high": float(values.max()),
            }
    return found
