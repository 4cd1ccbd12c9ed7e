"""The whole system offline: an embedded world is built, learnt from, evaluated and shown."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from flows.page import write_page
from geolink.reader import open_dataset
from geolink.tasks.evaluate import evaluate
from geolink.training.loop import pretrain
from pipelines.build import BuildResult, build_dataset
from pipelines.world import World, make_world
from schemas.config import DatasetConfig
from schemas.evaluation import TaskConfig
from schemas.load import load_config
from schemas.training import TrainConfig

Say = Callable[[str], None]


def run_demo(
    folder: Path,
    *,
    osm_pbf: Path | None = None,
    seed: int = 0,
    size_km: float = 20.0,
    seeds: int = 3,
    epochs: int | None = None,
    workers: int = 2,
    say: Say = print,
) -> Path:
    """Run world -> build -> pretrain -> evaluate -> page in `folder`; returns the page's path.

    Every step leaves its config beside its result and is taken up where it stopped when the demo
    is run again. `osm_pbf` renders scenes over a real extract instead of the made-up town.

    Raises GeoLinkError if the extract is unusable or the folder cannot be written.
    """
    clock = _Clock(say)
    with clock.step("world: OSM extract, scenes and STAC catalogs from a seed"):
        world = make_world(folder / "world", seed=seed, size_km=size_km, osm_pbf=osm_pbf)
    configs = write_configs(folder, world, seed=seed, seeds=seeds, epochs=epochs)
    builds: dict[str, BuildResult] = {}
    for name in ("satellite", "aerial"):
        with clock.step(f"build: {name} dataset, chips with their OSM"):
            config = load_config(configs[name], DatasetConfig)
            builds[name] = build_dataset(config, workers=workers)
            _say_build(say, builds[name])
    scores: list[dict[str, Any]] = []
    runs: list[Path] = []
    for n in range(seeds):
        training = load_config(configs[f"train-{n}"], TrainConfig)
        with clock.step(f"pretrain: seed {training.seed} ({n + 1} of {seeds})"):
            run = pretrain(training)
            if not run.finished:
                raise KeyboardInterrupt(run.message)
            say(f"      {run.samples_per_s:,.0f} chips/s, loss {run.loss:.3f}")
            runs.append(training.run)
        with clock.step(f"evaluate: kNN on held-out chips, seed {training.seed}"):
            scores.append(evaluate(load_config(configs[f"evaluate-{n}"], TaskConfig)))
            _say_scores(say, scores[-1])
    with clock.step("page"):
        datasets = {name: open_dataset(folder / name) for name in builds}
        place = f"the extract {osm_pbf.name}, scenes rendered" if osm_pbf else "a made-up town"
        page = write_page(
            folder / "index.html", place, datasets, builds, runs, scores, clock.seconds
        )
        (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return page


def write_configs(
    folder: Path, world: World, *, seed: int, seeds: int, epochs: int | None
) -> dict[str, Path]:
    """Write the configs of the demo as a user would; returns their paths by name."""
    osm = {"pbf": os.path.relpath(world.pbf, folder)}

    def dataset(name: str, bounds: Any, catalog: Path, **rest: Any) -> dict[str, Any]:
        return {
            "name": f"demo {name}", "dataset": name, "region": {"bbox": list(bounds)},
            "scenes": {"stac": os.path.relpath(catalog, folder)}, "osm": osm, "cache": "cache",
            **rest,
        }  # fmt: skip

    configs: dict[str, dict[str, Any]] = {
        "satellite": dataset(
            "satellite", world.bounds_lonlat, world.s2_catalog,
            sensor="sentinel-2-l2a",
            grid={"gsd_m": 10, "size": 64, "patch": 8, "shard_side": 4},
            splits={"block_km": 2.5, "train": 0.7, "val": 0.1, "test": 0.2, "seed": seed},
        ),
        "aerial": dataset(
            "aerial", world.aerial_bounds_lonlat, world.aerial_catalog,
            sensor="aerial-rgb",
            grid={"gsd_m": 1, "size": 64, "patch": 8, "shard_side": 8},
            splits={"block_km": 0.5, "train": 0.7, "val": 0.1, "test": 0.2, "seed": seed},
        ),
    }  # fmt: skip
    for n in range(seeds):
        configs[f"train-{n}"] = {
            "dataset": "aerial", "run": f"runs/seed-{seed + n}", "seed": seed + n,
            "epochs": epochs or 10, "batch_size": 64, "lr": 2e-3,
            # Small, for minutes on two cores. The paper's contrast weight of 0.01 is meant for
            # 1.27 M pairs: on a few thousand chips 0.3 teaches the encoder more about classes.
            "model": {
                "embed_dim": 96, "depth": 3, "num_heads": 3, "osm_dim": 64,
                "decoder_dim": 64, "decoder_depth": 1, "contrast_weight": 0.3,
            },
        }  # fmt: skip
        configs[f"evaluate-{n}"] = {
            "checkpoint": f"runs/seed-{seed + n}", "data": "aerial", "seed": seed + n,
            "held_out": ["val", "test"], "output": f"runs/seed-{seed + n}/knn",
        }  # fmt: skip
    paths = {}
    for name, config in configs.items():
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return paths


class _Clock:
    """Says what begins and how long it took, and keeps the seconds of every step."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.seconds: dict[str, float] = {}
        self._step: tuple[str, float] | None = None

    def step(self, name: str) -> "_Clock":
        self._step = (name, time.monotonic())
        self.say(f"==> {name}")
        return self

    def __enter__(self) -> "_Clock":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._step is not None
        name, started = self._step
        self.seconds[name] = time.monotonic() - started
        self.say(f"      {self.seconds[name]:.1f} s")


def _say_build(say: Say, result: BuildResult) -> None:
    chips, objects = sum(r.chips for r in result.rows), sum(r.objects for r in result.rows)
    say(
        f"      {result.built} shards built, {result.unchanged} unchanged: {chips:,} chips, "
        f"{objects:,} objects, snapshot {result.snapshot}"
    )


def _say_scores(say: Say, result: dict[str, Any]) -> None:
    for name, score in result["scores"].items():
        low, high = score["interval"]["accuracy"]
        say(f"      {name:<16} {score['score']['accuracy']:6.1%}  ({low:.1%} to {high:.1%})")
