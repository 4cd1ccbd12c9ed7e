"""What OSM teaches an image encoder: image-only MAE, the paper's model, geolink2, and it minus or
plus one idea at a time, on an embedded world whose map is incomplete and often wrong.

Everything is measured on places that no run has seen (the test split), with what is truly there
(`pipelines.world.hard`), not with the map that the models learn from. Probes are fitted on a few
labelled chips of the train split:

- knn, linear: which class covers most of a chip, from the mean patch token;
- patches: which class covers most of a patch, a linear layer on its token;
- errors: the same where the map that was learnt from is silent or wrong, in the train split, on
  chips that the probe was not fitted on: has a model learnt the map, or what it shows?

Intervals: 95 %, bootstrap over the shards (512 m blocks, each with its own flight) of the mean over
the seeds; beside them the lowest and highest seed. A run that is finished is one line of
`runs.jsonl` in the folder, so that the script can be stopped and goes on.

    python benchmarks/ablation.py --folder /tmp/ablation [--only main|minus|plus|all] [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import report
from numpy.typing import NDArray
from torch import Tensor, nn

from geolink.checkpoint import load_model
from geolink.device import normalise
from geolink.reader import Dataset, open_dataset, read_shard
from geolink.tasks.knn import feature_scale, knn_votes
from geolink.tasks.measures import scores_of
from geolink.training.loop import pretrain
from pipelines.build import build_dataset
from pipelines.world.hard import make_hard_world
from schemas.config import DatasetConfig
from schemas.training import TrainConfig

SIZES = {
    "embed_dim": 96, "depth": 4, "num_heads": 3, "osm_dim": 64, "decoder_dim": 64,
    "decoder_depth": 1,
}  # fmt: skip
# The paper's contrast weight of 0.01 is meant for 1.27 M pairs; here it has a few thousand.
PAIRS = {"contrast_weight": 1.0, "consistency_weight": 0.01}
MAIN: dict[str, dict[str, Any]] = {
    "image-only": {
        "variant": "geolink2", "contrast_weight": 0.0, "consistency_weight": 0.0,
        "geolink2": {"dense_weight": 0.0, "registers": 0},
    },
    "paper, contrast 0.01": {"variant": "paper", **PAIRS, "contrast_weight": 0.01},
    "paper": {"variant": "paper", **PAIRS},
    "geolink2": {"variant": "geolink2", **PAIRS, "geolink2": {"dense_weight": 0.0}},
}  # fmt: skip
MINUS: dict[str, dict[str, Any]] = {
    "relations": {"relations": False},
    "kind attention": {"kind_attention": False},
    "correspondence": {"correspondence": False},
    "centred positions": {"centred_positions": False},
    "registers": {"registers": 0},
}
PLUS: dict[str, dict[str, Any]] = {"classes of patches": {"dense_weight": 0.1}}
SCORES = ("knn", "linear", "patches", "errors")
CHIPS, PATCH_CHIPS, K = 500, 100, 10
"""Labelled chips that the probes of chips and of patches are fitted on; neighbours."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/geolink-ablation"))
    parser.add_argument("--only", choices=("main", "minus", "plus", "all"), default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = make_data(options.folder)
    base = MAIN["geolink2"]
    tables = {
        "main": MAIN,
        "minus": {f"geolink2 - {k}": changed(base, v) for k, v in MINUS.items()},
        "plus": {f"geolink2 + {k}": changed(base, v) for k, v in PLUS.items()},
    }
    asked = tables if options.only == "all" else {options.only: tables[options.only]}
    variants = {name: model for table in asked.values() for name, model in table.items()}
    chips = load_chips(data)
    for seed in range(options.seeds):
        for name, model in variants.items():
            run_once(options.folder, data, chips, name, model, seed, options.epochs)
    report(summary(options.folder))


def changed(model: Mapping[str, Any], switches: Mapping[str, Any]) -> dict[str, Any]:
    """A model's settings with other switches of geolink2."""
    return {**model, "geolink2": {**model["geolink2"], **switches}}


@dataclass(frozen=True)
class Data:
    """The dataset of the map, and the one of what is there, of the same chips."""

    map: Dataset
    truth: Dataset


@dataclass(frozen=True)
class Chips:
    """All chips in stored order: stored pixels, split, shard, and true and mapped classes."""

    image: NDArray[np.uint8]
    split: NDArray[np.str_]
    shard: NDArray[np.int64]
    region: NDArray[np.int64]
    """[N], true class with most area (from 0)."""
    patch: NDArray[np.int64]
    """[N, L], true class with most area of each patch."""
    mapped: NDArray[np.int64]
    """[N, L], the map's; -1: it says nothing of more than half of the patch."""


def make_data(folder: Path) -> Data:
    """The world and its two datasets; made once."""
    world = make_hard_world(folder / "world", seed=0, size_km=9.6, aerial_km=6.144)
    datasets = []
    for name, pbf in (("map", world.pbf), ("truth", world.truth_pbf)):
        config = DatasetConfig.model_validate({
            "name": name, "dataset": folder / name, "cache": folder / "cache",
            "region": {"bbox": world.bounds_lonlat}, "scenes": {"stac": str(world.catalog)},
            "osm": {"pbf": pbf}, "sensor": "aerial-rgb",
            "grid": {"gsd_m": 1, "size": 64, "patch": 8, "shard_side": 8},
            "splits": {"block_km": 0.512, "train": 0.7, "val": 0.1, "test": 0.2, "seed": 0},
        })  # fmt: skip
        build_dataset(config, workers=1)
        datasets.append(open_dataset(folder / name))
    return Data(*datasets)


def load_chips(data: Data) -> Chips:
    """Pixels and labels of both datasets, chip by chip the same place."""
    names = ("chip_id", "image", "label_region", "label_patch")
    mapped = [read_shard(data.map, row, names) for row in data.map.rows]
    truth = [read_shard(data.truth, row, names) for row in data.truth.rows]
    for one, two in zip(mapped, truth, strict=True):
        assert np.array_equal(one["chip_id"], two["chip_id"])
    count = [row.chips for row in data.map.rows]
    share = np.concatenate([s["label_patch"] for s in mapped])
    share = share.reshape(len(share), -1, share.shape[-1])
    patch = np.concatenate([s["label_patch"] for s in truth]).reshape(share.shape)
    return Chips(
        np.concatenate([s["image"] for s in mapped]),
        np.repeat([row.split for row in data.map.rows], count),
        np.repeat(np.arange(len(count)), count),
        np.concatenate([s["label_region"] for s in truth]).argmax(1),
        patch.argmax(-1),
        np.where(share.max(-1) > 127, share.argmax(-1), -1),
    )


def run_once(
    folder: Path, data: Data, chips: Chips, name: str, model: Mapping[str, Any], seed: int,
    epochs: int,
) -> None:  # fmt: skip
    """Pretrain and score, unless that is done already."""
    results = folder / "runs.jsonl"
    done = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    if any((r["name"], r["seed"], r["epochs"]) == (name, seed, epochs) for r in done):
        return
    run = folder / "runs" / f"{name.replace(' ', '_')}-{seed}-{epochs}"
    config = TrainConfig.model_validate({
        "dataset": folder / "map", "run": run, "seed": seed, "epochs": epochs, "batch_size": 64,
        "lr": 1.5e-3, "accelerator": "cpu", "log_every": 100,
        "augment": {"rotate": True, "jitter": 0.3}, "model": {**SIZES, **model},
    })  # fmt: skip
    begun, cpu = time.perf_counter(), time.process_time()
    result = pretrain(config)
    seconds = {"wall_s": time.perf_counter() - begun, "cpu_s": time.process_time() - cpu}
    confusions = probe(run, chips, seed)
    np.savez_compressed(run / "confusions.npz", **confusions)
    line = {
        "name": name, "seed": seed, "epochs": epochs, "steps": result.steps, **seconds,
        "run": str(run), "scores": {k: value(k, c.sum(0)) for k, c in confusions.items()},
    }  # fmt: skip
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def value(task: str, confusion: NDArray[np.int64]) -> Any:
    """Score in % of confusions [.., class, class]: balanced accuracy of chips, mIoU of patches."""
    if task in ("knn", "linear"):
        return 100 * scores_of(confusion, "class")[..., 1]
    hit = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    true = confusion.sum(-1)
    union = true + confusion.sum(-2) - hit
    return 100 * (hit / np.maximum(union, 1)).sum(-1) / np.maximum((true > 0).sum(-1), 1)


def probe(run: Path, chips: Chips, seed: int) -> dict[str, NDArray[np.int64]]:
    """Confusions [shard, class, class] of every task of a run's encoder."""
    tokens = patch_tokens(run, chips.image)
    features = tokens.mean(1)
    rng = np.random.default_rng((seed, 7))
    train, test = (np.flatnonzero(chips.split == s) for s in ("train", "test"))
    fit = rng.choice(train, CHIPS, replace=False)
    few = fit[:PATCH_CHIPS]
    rest = np.setdiff1d(train, few)
    classes = int(chips.patch.max()) + 1

    values = features.numpy()
    votes = knn_votes(
        values, fit, np.eye(classes, dtype=np.uint8)[chips.region[fit]], values[test],
        feature_scale(values, fit), k=K, temperature=0.07, device=torch.device("cpu"),
    )  # fmt: skip
    near = votes.argmax(1)
    line = linear_probe(features[fit], chips.region[fit], classes)
    chosen = linear_probe(tokens[few].flatten(0, 1), chips.patch[few].ravel(), classes)
    wrong = chips.mapped[rest] != chips.patch[rest]
    found = {
        "knn": (test, chips.region[test], near),
        "linear": (test, chips.region[test], line(features[test])),
        "patches": (
            np.repeat(test, tokens.shape[1]), chips.patch[test].ravel(),
            chosen(tokens[test].flatten(0, 1)),
        ),
        "errors": (
            np.repeat(rest, tokens.shape[1])[wrong.ravel()], chips.patch[rest][wrong],
            chosen(tokens[rest].flatten(0, 1))[wrong.ravel()],
        ),
    }  # fmt: skip
    confusions = {}
    for task, (chip, truth, predicted) in found.items():
        _, shard = np.unique(chips.shard[chip], return_inverse=True)
        cell = (shard * classes + truth) * classes + predicted
        size = (shard.max() + 1) * classes**2
        confusions[task] = np.bincount(cell, minlength=size).reshape(-1, classes, classes)
    return confusions


@torch.inference_mode()
def patch_tokens(run: Path, image: NDArray[np.uint8]) -> Tensor:
    """Normed patch tokens of all chips by a run's image encoder: float32 [N, L, D]."""
    model, meta = load_model(run)
    patches = (meta.config.model.image_size // meta.config.model.patch_size) ** 2
    scale = meta.band_scale(torch.device("cpu"))
    return torch.cat([
        model.encode_image(normalise(part, *scale, meta.nodata))[:, -patches:]
        for part in torch.split(torch.from_numpy(image), 256)
    ])  # fmt: skip


def linear_probe(features: Tensor, label: NDArray[np.int64], classes: int) -> Any:
    """Multinomial logistic regression on standardised features, L2 1e-3: what predicts by it."""
    std, mean = torch.std_mean(features, 0)
    std = std.clamp(min=1e-6)
    x, y = (features - mean) / std, torch.from_numpy(label)
    layer = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(x), y) + 1e-3 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)

    @torch.no_grad()
    def predict(features: Tensor) -> NDArray[np.int64]:
        predicted: NDArray[np.int64] = layer((features - mean) / std).argmax(1).numpy()
        return predicted

    return predict


def summary(folder: Path) -> dict[str, Any]:
    """Every variant's scores with their intervals."""
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    return {f"{n}, {e} epochs": one(lines, n, e) for n, e in
            dict.fromkeys((r["name"], r["epochs"]) for r in lines)}  # fmt: skip


def one(lines: Sequence[Mapping[str, Any]], name: str, epochs: int) -> dict[str, Any]:
    runs = [r for r in lines if (r["name"], r["epochs"]) == (name, epochs)]
    out: dict[str, Any] = {"seeds": len(runs), "steps": runs[0]["steps"],
        "cpu_s": round(min(r["cpu_s"] for r in runs), 1)}  # fmt: skip
    for task in SCORES:
        drawn = draws(runs, task)
        seeds = [r["scores"][task] for r in runs]
        out[task] = {
            "mean": round(float(np.mean(seeds)), 2),
            "interval": np.quantile(drawn, (0.025, 0.975)).round(2).tolist(),
            "seeds": [round(min(seeds), 2), round(max(seeds), 2)],
        }
    return out


def draws(
    runs: Sequence[Mapping[str, Any]], task: str, resamples: int = 1000
) -> NDArray[np.float64]:
    """Mean over the seeds of the score on resamples of the shards: [resamples]."""
    total = np.zeros(resamples)
    for run in runs:
        confusion = np.load(Path(run["run"]) / "confusions.npz")[task]
        rng = np.random.default_rng(0)
        count = rng.multinomial(
            len(confusion), np.full(len(confusion), 1 / len(confusion)), resamples
        )
        total += value(task, np.einsum("rs,sij->rij", count, confusion))
    return total / len(runs)


if __name__ == "__main__":
    main()
