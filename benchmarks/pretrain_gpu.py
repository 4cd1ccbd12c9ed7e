"""Pretraining speed on one GPU: ViT-B and ViT-L at 224 px in bfloat16, from shards on disk.

The whole engine runs (`geolink pretrain`): reading, crop and turns on the device, the model
compiled, AdamW, log lines. Shards are generated: 256 chips of 3x224x224 uint8 each, about 53
objects a chip. Of the log, what comes after the first two lines is kept, which hold compilation.

For each model: samples/s (median of the lines), model FLOPs utilisation, share of the time spent
waiting for data, peak memory, and hours for 1.27 million chips x 60 epochs. Goals on one H100: less
than 6 hours, at least 45 %, less than 2 %.

    python benchmarks/pretrain_gpu.py [--steps 120] [--shards 48] [--eager]
    python benchmarks/pretrain_gpu.py --smoke     (any machine: two steps of a tiny model)

Needs no network and nobody to watch: each model runs in a process of its own, with half the batch
where memory does not suffice; what fails is told in its place. Prints JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import report

from geolink.training.log import read_log
from geolink.training.loop import pretrain
from pipelines.snapshot import publish
from pipelines.store import prepare_dataset
from schemas.grid import Block
from schemas.training import Augment, ModelConfig, TrainConfig
from tests.shards import make_grid, make_info, random_arrays, store_row, write_vocabulary

CHIPS, OBJECTS = 256, 53
PAPER_CHIPS = 1_270_000 * 60
BATCH = {"base": 1024, "large": 1024}
GOALS = {"hours_for_paper": 6.0, "mfu": 0.45, "data_wait": 0.02}
PAPER = {
    "image_size": 224, "patch_size": 16, "tag_dim": 512, "osm_dim": 128, "fusion_dim": 256,
    "fusion_heads": 16, "decoder_dim": 512, "decoder_depth": 2, "decoder_heads": 16,
    "max_masked_nodes": 10,
}  # fmt: skip


def make_data(folder: Path, shards: int, chips: int) -> None:
    """Write and publish the shards."""
    grid = make_grid(size=224, patch=16, shard_side=16)
    prepare_dataset(folder, make_info(grid))
    rows = []
    for n in range(shards):
        block = Block(32632, 10 + n, 100)
        arrays = random_arrays(n, chips=chips, objects=OBJECTS, grid=grid, block=block)
        coarse = np.random.default_rng(n).integers(1, 255, (chips, 3, 56, 56), np.uint8)
        arrays["image"] = coarse.repeat(4, 2).repeat(4, 3)
        rows.append(store_row(folder, block, arrays))
    publish(folder, rows, write_vocabulary(folder, 512), make_info(grid))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One run of the engine; its figures."""
    size: dict[str, Any] = {"vit": job["vit"], **PAPER}
    if job["smoke"]:
        size |= {"vit": "tiny", "decoder_dim": 64, "decoder_heads": 4}
    chips = job["shards"] * job["chips"]
    every = 1 if job["smoke"] else 10
    batch = job["batch"]
    config = TrainConfig(
        dataset=job["dataset"], run=job["run"], model=ModelConfig(**size),
        augment=Augment(crop=(0.4, 0.9), rotate=True), batch_size=batch,
        epochs=max(1, -(-job["steps"] * batch // chips)), compile=job["compile"],
        readers=max(1, min(8, (os.cpu_count() or 2) // 2)), log_every=every,
        checkpoint_every=1_000_000, precision="32-true" if job["smoke"] else "bf16-mixed",
        accelerator="cpu" if job["smoke"] else "cuda",
    )  # fmt: skip
    begun = time.perf_counter()
    result = pretrain(config)
    lines = [line for line in read_log(config.run) if "samples_per_s" in line]
    kept = lines[2:] if len(lines) > 4 else lines[1:] or lines
    rate = statistics.median(line["samples_per_s"] for line in kept)
    return {
        "batch": batch, "compiled": job["compile"], "steps": result.step,
        "samples_per_s": rate,
        "mfu": kept[-1]["mfu"] and round(statistics.median(line["mfu"] for line in kept), 4),
        "data_wait": round(statistics.mean(line["data_wait"] for line in kept), 4),
        "memory_mb": max(line["memory_mb"] for line in lines),
        "hours_for_paper": round(PAPER_CHIPS / rate / 3600, 2),
        "loss": round(result.loss, 4),
        "seconds_in_all": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """`run` in a process of its own, with less of a batch where memory does not suffice."""
    while True:
        with tempfile.TemporaryDirectory() as scratch:
            asked = json.dumps({**job, "run": f"{scratch}/run"})
            done = subprocess.run(
                [sys.executable, "-W", "ignore", __file__, "--job", asked],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        if done.returncode == 0:
            figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
            return figures
        if "out of memory" in done.stderr.lower() and job["batch"] > 64:
            job = {**job, "batch": job["batch"] // 2}
            continue
        return {"batch": job["batch"], "failed": done.stderr.strip()[-2000:]}


def against_goals(figures: dict[str, Any]) -> dict[str, bool]:
    """Which goals are met."""
    met = {}
    for name, goal in GOALS.items():
        value = figures.get(name)
        if value is not None:
            met[name] = value >= goal if name == "mfu" else value < goal
    return met


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--shards", type=int, default=48)
    parser.add_argument("--models", nargs="+", default=list(BATCH))
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--smoke", action="store_true", help="two steps of a tiny model on a CPU")
    parser.add_argument("--job", help="(used by the script itself)")
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(run(json.loads(arguments.job))))
        return
    if not (arguments.smoke or torch.cuda.is_available()):
        print(json.dumps({"not_run": "this machine has no CUDA GPU; --smoke runs anywhere"}))
        return
    smoke = arguments.smoke
    shards, chips = (1, 8) if smoke else (arguments.shards, CHIPS)
    device = "CPU (smoke)" if smoke else torch.cuda.get_device_name()
    result: dict[str, Any] = {"device": device, "torch": torch.__version__, "goals": GOALS}
    with tempfile.TemporaryDirectory() as scratch:
        make_data(Path(scratch) / "dataset", shards, chips)
        for vit in ["tiny"] if smoke else arguments.models:
            job = {
                "dataset": f"{scratch}/dataset", "vit": vit, "batch": 4 if smoke else BATCH[vit],
                "steps": 2 if smoke else arguments.steps, "shards": shards, "chips": chips,
                "compile": not (arguments.eager or smoke), "smoke": smoke,
            }  # fmt: skip
            figures = measure(job)
            result[f"vit_{vit}"] = {**figures, "goals_met": against_goals(figures)}
    report(result)


if __name__ == "__main__":
    main()
