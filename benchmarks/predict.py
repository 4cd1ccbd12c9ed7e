"""Maps of a trained model against its bare encoder and head, and their memory.

    python benchmarks/predict.py [--side PIXELS]      (768)

A segmentation model over a GeoTIFF of so many pixels a side: pixels are read, windows cut and
blended, parts kept. The bare model gets the same windows in the same batches, which lie in memory
as it takes them. Both in seconds of the processor, by turns, so that other programs do not count.
`pixels_per_window`: how many pixels of the map a window of `window` squared pays for, as windows
overlap. Memory: what a file of eight times the side takes beyond one of four, with a model that
does nothing. Prints JSON.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import best_of, peak_mb, report
from benchmarks.embed import VIT_TINY, make_scene
from flows.areas import scene_areas
from flows.predict import BLOCK_PX, _predict_blocks
from geolink.tasks.evaluate import evaluate
from geolink.tasks.predict import Predictor, open_predictor
from pipelines.pixels import look
from schemas.evaluation import TaskConfig
from schemas.storage_local import LocalStorage
from tests.tasks import make_checkpoint

CPU = torch.device("cpu")
BATCH = 32
GOAL = 0.80


def make_model(folder: Path) -> Path:
    """A segmentation of three classes, hardly trained."""
    rng = np.random.default_rng(0)
    run = make_checkpoint(folder / "run", **VIT_TINY)
    for split in ("train", "val", "test"):
        for name, shape, most in (("images", (64, 64, 3), 255), ("masks", (64, 64), 3)):
            path = folder / "data" / split / name
            path.mkdir(parents=True)
            for n in range(4):
                np.save(path / f"{n}.npy", _image(rng.integers(1 * (most > 3), most, shape)))
    evaluate(TaskConfig(
        task="segmentation", checkpoint=run, data=folder / "data", baselines=(), bootstrap=10,
        training={"epochs": 1, "batch_size": 4, "freeze": True}, output=folder / "model",
    ))  # fmt: skip
    return folder / "model"


def _image(pixels: Any) -> Any:
    return np.moveaxis(pixels, -1, 0).astype(np.uint8) if pixels.ndim == 3 else pixels.astype("u1")


def compare(model: Path, scene: Path, folder: Path) -> dict[str, Any]:
    """Windows a second of the processor, mapped and seen alone."""
    areas = scene_areas(look(scene), (), BLOCK_PX)
    predictor = open_predictor(model, areas, None, device=CPU)
    found = areas(1)
    batches: list[torch.Tensor] = []

    def kept(images: torch.Tensor) -> torch.Tensor:
        batches.append(images)
        return prepare(images)

    prepare = predictor.encoder.prepare

    def run(name: str, by: Predictor = predictor) -> None:
        _predict_blocks(by, found, None, LocalStorage(folder / name), BATCH, None)

    run("warm", replace(predictor, encoder=replace(predictor.encoder, prepare=kept)))
    windows = sum(len(batch) for batch in batches)

    def bare() -> None:
        for batch in batches:
            predictor.probabilities(batch)

    times = []
    for n in range(2):
        alone = best_of(1, bare, time.process_time)[0]
        times.append((alone, best_of(1, lambda: run(str(n)), time.process_time)[0]))  # noqa: B023
    alone, whole = (min(each) for each in zip(*times, strict=True))
    pixels = found[0].shape[0] * found[0].shape[1]
    return {
        "windows": windows, "window": predictor.window, "pixels_per_s": round(pixels / whole),
        "pixels_per_window": round(pixels / windows), "share": round(alone / whole, 3),
    }  # fmt: skip


class _Idle(Predictor):
    """Says the same of all pixels."""

    def probabilities(self, images: torch.Tensor, graph: Any = None) -> torch.Tensor:
        side = self.window
        return torch.full((1, 3, 1, 1), 1 / 3).expand(len(images), 3, side, side)


def growth_mb(model: Path, folder: Path, side: int) -> float:
    """Memory that a file of twice the side takes beyond what one of `side` took."""
    peaks = []
    for pixels in (side, 2 * side):
        scene = make_scene(folder / f"{pixels}.tif", pixels)
        areas = scene_areas(look(scene), (), BLOCK_PX)
        predictor = open_predictor(model, areas, None, device=CPU)
        idle = _Idle(predictor.kept, predictor.encoder, predictor.module, CPU)
        _predict_blocks(idle, areas(1), None, LocalStorage(folder / f"m{pixels}"), BATCH, None)
        peaks.append(peak_mb())
    return round(peaks[1] - peaks[0], 1)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=768, help="Pixels of the GeoTIFF.")
    side = parser.parse_args().side
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder)
        # First, as the largest memory of a process is what is measured.
        grown = growth_mb(model, folder, 4 * side)
        figures = compare(model, make_scene(folder / "scene.tif", side), folder / "m")
    goals = {"share": figures["share"] >= GOAL}
    report({"throughput": figures, "memory_growth_mb": grown, "goals_met": goals})


if __name__ == "__main__":
    main()
