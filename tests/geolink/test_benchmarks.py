"""Benchmarks that need a GPU run small on any machine."""

import json
import subprocess
import sys
from pathlib import Path


def test_the_pretraining_benchmark_runs_without_a_gpu_in_small() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "pretrain_gpu.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--smoke"],
        capture_output=True, text=True, check=True, cwd=script.parents[1],
    )  # fmt: skip
    found = json.loads(done.stdout)["vit_tiny"]
    assert found["steps"] == 2
    assert found["samples_per_s"] > 0
    assert 0 <= found["data_wait"] < 1
    assert found["hours_for_paper"] > 0
    assert found["mfu"] is None
    assert "hours_for_paper" in found["goals_met"]
