"""Runs of `geolink pretrain` killed with SIGKILL at seeded random moments, and what they become."""

import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from geolink.checkpoint import checkpoints
from geolink.training.log import read_log
from schemas.training import ModelConfig

ROOT = Path(__file__).resolve().parents[1]

# Large enough for its checkpoints to take some time to write.
MODEL = ModelConfig(
    image_size=32, patch_size=8, bands=3, embed_dim=96, depth=2, num_heads=3, tag_dim=16,
    osm_dim=32, fusion_dim=16, fusion_heads=2, projection_dim=8, decoder_dim=32, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip


@dataclass
class Killed:
    """What was killed."""

    kills: int = 0
    in_write: int = 0
    """While a checkpoint was half written."""
    before_step: int = 0
    """Before the process had done a step."""
    runs: int = 0


def write_config(folder: Path, name: str, dataset: Path, **changes: Any) -> Path:
    """The config of a run `folder/name`, as a user writes it."""
    path = folder / f"{name}.yaml"
    config = {
        "dataset": str(dataset), "run": name, "model": MODEL.model_dump(mode="json"),
        "batch_size": 5, "window_shards": 2, "log_every": 1, "checkpoint_every": 5,
        "accelerator": "cpu", **changes,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    return path


def begin(config: Path) -> "subprocess.Popen[str]":
    """`geolink pretrain` as a process of its own.

    Of one thread: runs are the same to the bit where they compute with as many threads.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "geolink.cli", "pretrain", str(config)], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(config: Path) -> None:
    """Start or go on with a run, to its end."""
    process = begin(config)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def kill_somewhere(config: Path, rng: random.Random, killed: Killed, *, in_write: bool) -> bool:
    """Start or go on with a run and kill it: while it writes a checkpoint, or at any moment.

    Returns whether it was done before, well.
    """
    run = config.with_suffix("")
    before = len(read_log(run))
    process = begin(config)
    try:
        if in_write:
            wait(process, lambda: any(run.glob(".step-*.partial")), poll_s=0.0005)
        elif rng.random() < 0.8:
            wait(process, lambda: len(read_log(run)) > before)
            time.sleep(rng.uniform(0, 1.5))
        else:
            time.sleep(rng.uniform(0.5, 6))
        done = process.poll() is not None
    finally:
        process.kill()
        _, errors = process.communicate()
    if done:
        assert process.returncode == 0, errors
        return True
    killed.kills += 1
    killed.in_write += any(run.glob(".step-*.partial"))
    killed.before_step += len(read_log(run)) <= before
    return False


def wait(process: "subprocess.Popen[str]", what: Any, poll_s: float = 0.005) -> None:
    """Until something is so, or the process has ended."""
    deadline = time.monotonic() + 120
    while not what() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(poll_s)


FIGURES = (
    "step", "epoch", "loss", "reconstruction", "contrast", "consistency", "grad_norm", "lr",
)  # fmt: skip


def outcome(run: Path) -> tuple[list[tuple[Any, ...]], dict[str, torch.Tensor]]:
    """Every step's losses, and the final weights and state of the optimizer."""
    lines = [tuple(line[n] for n in FIGURES) for line in read_log(run) if "loss" in line]
    last = checkpoints(run)[-1]
    both = [load_file(last / f"{name}.safetensors") for name in ("model", "optimizer")]
    return lines, both[0] | both[1]


def assert_same(a: Path, b: Path) -> None:
    """Two runs are the same to the bit."""
    (ours, our_weights), (theirs, their_weights) = outcome(a), outcome(b)
    assert ours == theirs
    assert our_weights.keys() == their_weights.keys()
    assert all(torch.equal(our_weights[n], their_weights[n]) for n in our_weights)
