"""Benchmarks that take long, or need a GPU, run small on any machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


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


@pytest.mark.slow
def test_the_evidence_is_written_into_its_page_from_runs_and_evaluations_in_small(
    tmp_path: Path,
) -> None:
    (tmp_path / "evidence.md").write_text(
        "# Kept\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nkept too\n"
    )
    script = Path(__file__).parents[2] / "benchmarks" / "evidence.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--smoke", "--docs", str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=script.parents[1],
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["evaluations"] == {"done": 12, "left": 0}
    assert {(s["model"], s["inputs"]) for s in found["scores"] if s["task"] == "segmentation"} == {
        ("image-only", "image"), ("geolink2", "image"), ("geolink2", "image+osm"),
        ("the map as it is", "osm"),
    }  # fmt: skip
    few, many = found["labels"]["0.1"], found["labels"]["1.0"]
    assert 0 < few < many
    lead = next(n for n in found["leads"] if n["task"] == "knn" and n["share"] == 1.0)
    score = {
        s["model"]: s["measures"]["accuracy"]["mean"]
        for s in found["scores"]
        if (s["task"], s["inputs"], s["share"]) == ("knn", "image", 1.0)
    }
    points = score["geolink2"] - score["image-only"]
    assert lead["measures"]["accuracy"]["points"] == pytest.approx(points, abs=0.011)
    page = (tmp_path / "evidence.md").read_text()
    assert page.startswith("# Kept")
    assert page.endswith("kept too\n")
    assert "old" not in page
    assert f"{lead['measures']['accuracy']['points']:+.1f}" in page
    assert (tmp_path / "evidence.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_benchmark_of_maps_runs_in_small() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "predict.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--side", "64"],
        capture_output=True, text=True, check=True, cwd=script.parents[1],
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["throughput"]["windows"] == 1
    assert found["throughput"]["pixels_per_s"] > 0
