"""Does OpenStreetMap help? Image-only MAE, the paper's model and geolink2, pretrained for the same
steps on an embedded world whose map is incomplete and often wrong, and evaluated by every task with
every input, with many labels and with a tenth of them.

All is scored with `geolink evaluate`'s own machinery by what is truly there, on blocks that no
pretraining and no task has seen (`_evidence_data.py`). What is finished stays in the folder, so
that the script can be stopped and goes on. At the end it prints JSON, draws `docs/evidence.png` and
writes the figures into `docs/evidence.md`.

    python benchmarks/evidence.py --folder evidence [--workers 2] [--minutes 90] [--seeds 3]
    python benchmarks/evidence.py --smoke     (a tiny world, two tasks)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from _common import report
from _evidence_data import Data, Size, blocks, make_data, map_masks
from _evidence_report import Result, summarise, write_docs

from geolink.tasks.evaluate import evaluate
from geolink.training.loop import pretrain
from schemas.evaluation import TaskConfig
from schemas.training import TrainConfig

PAIRS = {"contrast_weight": 1.0, "consistency_weight": 0.01}
"""The paper's contrast weight of 0.01 is meant for 1.27 M pairs; here it has a few thousand."""
MODELS: dict[str, dict[str, Any]] = {
    "image-only": {
        "variant": "geolink2", "contrast_weight": 0.0, "consistency_weight": 0.0,
        "geolink2": {"dense_weight": 0.0, "registers": 0},
    },
    "paper": {"variant": "paper", **PAIRS},
    "geolink2": {"variant": "geolink2", **PAIRS},
}  # fmt: skip
INPUTS = ("image", "image+osm", "osm")
TASKS = ("knn", "linear", "zones", "finetune", "segmentation")
FROZEN = ("knn", "linear")
SHARES = (0.1, 1.0)
"""Of the labels."""
ON_FEATURES = "baselines"
"""In the place of inputs: what zones are told by without training an encoder, by a linear probe."""
BASELINES = ("random", "bands", "osm", "majority")


@dataclass(frozen=True)
class Plan:
    """How large everything is."""

    folder: Path
    world: Size
    sizes: dict[str, int]
    """Of the models."""
    labels: int
    """Chips of the train split that have labels; 1.0 of `SHARES`."""
    epochs: int
    """Of pretraining."""
    task_epochs: tuple[int, int]
    """Of tasks that train by steps, with the shares of `SHARES`."""
    mask_epochs: tuple[int, int]
    """Of segmentation."""
    seeds: int
    models: tuple[str, ...] = tuple(MODELS)
    tasks: tuple[str, ...] = TASKS
    resamples: int = 2000


@dataclass(frozen=True)
class Job:
    """An evaluation, or (without a task) a pretraining."""

    model: str
    seed: int
    task: str = ""
    inputs: str = ""
    shares: tuple[float, ...] = SHARES

    @property
    def name(self) -> str:
        """Of its folder."""
        share = "" if len(self.shares) > 1 else f"-{100 * self.shares[0]:g}"
        return f"{self.model}-{self.seed}" + (self.task and f"/{self.task}-{self.inputs}{share}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/geolink-evidence"))
    parser.add_argument("--docs", type=Path, help="folder of evidence.md; smoke: a new one")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=90.0, help="no part is begun later; run again to go on"
    )
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    docs = Path(__file__).parents[1] / "docs"
    if options.smoke:
        with tempfile.TemporaryDirectory() as scratch:
            report(run(small(Path(scratch)), options.workers, 90.0, options.docs or Path(scratch)))
        return
    plan = Plan(
        options.folder.resolve(), Size(world_km=9.6, aerial_km=6.144),
        {"embed_dim": 96, "depth": 4, "num_heads": 3, "osm_dim": 64, "decoder_dim": 64,
         "decoder_depth": 1},
        labels=1200, epochs=12, task_epochs=(15, 5), mask_epochs=(8, 4), seeds=options.seeds,
    )  # fmt: skip
    report(run(plan, options.workers, options.minutes, options.docs or docs))


def small(folder: Path) -> Plan:
    """Everything tiny, for a test of the script."""
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3, "osm_dim": 16, "fusion_dim": 16,
             "decoder_dim": 16, "decoder_depth": 1}  # fmt: skip
    return Plan(
        folder, Size(world_km=2.4, aerial_km=1.024), sizes, labels=100, epochs=1,
        task_epochs=(1, 1), mask_epochs=(1, 1), seeds=1, models=("image-only", "geolink2"),
        tasks=("knn", "segmentation"), resamples=50,
    )  # fmt: skip


def run(plan: Plan, workers: int, minutes: float, docs: Path) -> dict[str, Any]:
    """Do what is not done yet, as far as time suffices, and tell what there is."""
    until = time.monotonic() + 60 * minutes
    plan.folder.mkdir(parents=True, exist_ok=True)
    data = make_data(plan.folder, plan.world, plan.labels)
    runs = [Job(model, seed) for seed in range(plan.seeds) for model in plan.models]
    jobs = evaluations(plan)
    do_all(pretrain_once, plan, data, runs, workers, until)
    do_all(evaluate_once, plan, data, jobs, workers, until)
    finished = [job for job in jobs if marker_of(plan, job).exists()]
    result = summarise(
        [Result(j.model, j.seed, j.task, j.inputs, j.shares, results_of(plan, j))
         for j in finished],
        {j.name: json.loads(marker_of(plan, j).read_text()) for j in (*runs, *finished)},
        blocks(data), map_masks(data) if "segmentation" in plan.tasks else None, SHARES,
        plan.seeds, plan.resamples,
    )  # fmt: skip
    result["evaluations"] = {"done": len(finished), "left": len(jobs) - len(finished)}
    write_docs(result, docs)
    return result


def evaluations(plan: Plan) -> list[Job]:
    """Of every model and seed by every task, with every input that both have; a job for each share
    where a task trains by steps. What is dear and tells least comes last, seeds stay together."""
    first, last = [], []
    if "zones" in plan.tasks:
        first += [Job("image-only", s, "zones", ON_FEATURES) for s in range(plan.seeds)]
    for task in plan.tasks:
        for shares in [SHARES] if task in FROZEN else [(share,) for share in reversed(SHARES)]:
            for inputs in INPUTS:
                if inputs == "osm" and task == "segmentation":
                    continue
                for model in plan.models:
                    some = [Job(model, s, task, inputs, shares) for s in range(plan.seeds)]
                    untrained = model == "image-only" and inputs != "image"
                    if untrained and task not in (*FROZEN, "zones"):
                        continue
                    dear = task not in FROZEN and (
                        untrained or (task == "finetune" and inputs != "image")
                    )
                    (last if dear else first).extend(some)
    return first + last


def do_all(
    stage: Callable[[Plan, Data, Job], None], plan: Plan, data: Data, jobs: Sequence[Job],
    workers: int, until: float,
) -> None:  # fmt: skip
    """Those jobs that are not done yet, each on one core; none is begun after `until`."""
    left = [job for job in jobs if not marker_of(plan, job).exists()]
    if workers == 1 or len(left) < 2:
        torch.set_num_threads(1)
        for job in left:
            if time.monotonic() < until:
                stage(plan, data, job)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        running: set[Future[None]] = set()
        for job in left:
            if len(running) == workers:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
            if time.monotonic() < until:
                running.add(pool.submit(stage, plan, data, job))
        for future in running:
            future.result()


def run_of(plan: Plan, job: Job) -> Path:
    return plan.folder / "runs" / f"{job.model}-{job.seed}"


def results_of(plan: Plan, job: Job) -> Path:
    return plan.folder / "results" / job.name


def marker_of(plan: Plan, job: Job) -> Path:
    """What says that a job is done, and what it cost."""
    folder = run_of(plan, job) if not job.task else results_of(plan, job)
    return folder.with_name(folder.name + ".json")


def pretrain_once(plan: Plan, data: Data, job: Job) -> None:
    """One model with one seed. A run that was stopped begins anew, so that its seconds count."""
    folder = run_of(plan, job)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "dataset": str(data.map), "run": str(folder), "seed": job.seed, "epochs": plan.epochs,
        "batch_size": 64, "lr": 1.5e-3, "accelerator": "cpu", "log_every": 100,
        "augment": {"rotate": True, "jitter": 0.3}, "model": {**plan.sizes, **MODELS[job.model]},
    }  # fmt: skip
    # As `geolink pretrain` takes it.
    folder.with_name(folder.name + ".yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    config = TrainConfig.model_validate(values)
    done(plan, job, lambda: {"steps": pretrain(config).steps})


def evaluate_once(plan: Plan, data: Data, job: Job) -> None:
    """One evaluation."""
    masks = job.task == "segmentation"
    values: dict[str, Any] = {
        "task": job.task, "checkpoint": run_of(plan, job), "inputs": job.inputs, "seed": job.seed,
        "data": data.labelled, "cache": plan.folder / "features", "output": results_of(plan, job),
        "shares": [data.mask_share * s if masks else s for s in job.shares],
        "labels": "pixel" if masks else data.labels["zone" if job.task == "zones" else "cover"],
        "accelerator": "cpu", "bootstrap": 100, "baselines": [],
    }  # fmt: skip
    if job.task in FROZEN and (job.model, job.inputs) == ("image-only", "image"):
        values["baselines"] = list(BASELINES)
    if job.inputs == ON_FEATURES:
        values |= {"task": "linear", "inputs": "image", "baselines": list(BASELINES)}
    elif job.task not in FROZEN:
        epochs = (plan.mask_epochs if masks else plan.task_epochs)[SHARES.index(job.shares[0])]
        values["training"] = {"epochs": epochs, "batch_size": 32, "head": "linear"}
    done(
        plan, job, lambda: {"labels": evaluate(TaskConfig(**values))["scores"]["encoder"]["labels"]}
    )


def done(plan: Plan, job: Job, work: Callable[[], dict[str, Any]]) -> None:
    """Do it, and note what it cost."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    cost = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    line = json.dumps({k: round(v, 1) for k, v in cost.items()} | found)
    partial = marker_of(plan, job).with_suffix(".partial")
    partial.write_text(line + "\n")
    partial.replace(marker_of(plan, job))
    print(time.strftime("%H:%M:%S"), job.name, line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
