"""Features of frozen encoders: extraction against the bare encoder, and kNN over a million of them.

    python benchmarks/features.py [--rows N]      (1,000,000)

Extraction is reading a dataset's shards, normalising, encoding and writing features to disk; the
bare encoder gets batches that lie in memory as it takes them. Both in seconds of the processor, so
that other programs do not count. kNN: so many features of 1,024 numbers on disk vote on 256
queries; the memory that the process takes for it must not grow with their size (pages of the mapped
file are not its own: the system gives them back when memory is short).
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import best_of
from geolink.checkpoint import MODEL, CheckpointMeta, host_copy, model_tensors, save_checkpoint
from geolink.models.build import make_model
from geolink.tasks.encoders import open_encoder
from geolink.tasks.knn import feature_scale, knn_votes
from geolink.tasks.sources import open_data
from geolink.tasks.store import FeatureStore
from schemas.evaluation import Inputs, TaskConfig
from schemas.training import ModelConfig, TrainConfig
from tests.shards import make_dataset, make_grid

CPU = torch.device("cpu")
BATCH = 64
WIDTH, CLASSES = 1024, 10


def make_run(folder: Path) -> Path:
    """A checkpoint of new weights: ViT-Tiny for images of 64 pixels, patches of 8."""
    model = ModelConfig(vit="tiny", image_size=64, patch_size=8, tag_dim=16)
    meta = CheckpointMeta(
        geolink="0", revision=None, step=1, steps=1, dataset="fabricated", snapshot=1,
        tag_encoder="wordllama", bands=("red", "green", "blue"), nodata=0, mean=(127.0,) * 3,
        std=(73.0,) * 3, config=TrainConfig(dataset=folder, run=folder, model=model),
    )  # fmt: skip
    save_checkpoint(folder, {MODEL: host_copy(model_tensors(make_model(model)))}, meta, {})
    return folder


def extraction(folder: Path) -> dict[str, Any]:
    """Seconds of the processor, and the share of the bare encoder's throughput that is reached."""
    grid = make_grid(size=64, patch=8, shard_side=8)
    data_folder = make_dataset(
        folder / "d", shards=8, chips=64, objects=30.0, splits=("train", "val", "test"), grid=grid
    )
    run = make_run(folder / "run")
    data = open_data(TaskConfig(checkpoint=run, data=data_folder))
    batches = list(data.batches("train", batch_size=BATCH))
    chips = sum(len(batch) for batch in batches)
    found: dict[str, Any] = {"chips": chips}
    inputs: Inputs
    for inputs in ("image", "image+osm"):
        encoder = open_encoder(run, inputs, data, device=CPU)
        prepared = [(encoder.prepare(batch.image), batch.graph) for batch in batches]

        @torch.inference_mode()
        def bare(prepared: Any = prepared, encoder: Any = encoder) -> None:
            for images, graph in prepared:
                encoder.embed(images, graph)

        def extract(encoder: Any = encoder) -> None:
            FeatureStore(None, CPU, BATCH).features(encoder, data, "train")

        bare()
        # By turns, so that both see the same machine.
        each = [
            (best_of(1, bare, time.process_time)[0], best_of(1, extract, time.process_time)[0])
            for _ in range(4)
        ]
        alone, whole = (min(seconds) for seconds in zip(*each, strict=True))
        found[inputs] = {
            "bare_s": round(alone, 3), "extraction_s": round(whole, 3),
            "chips_per_cpu_s": round(chips / whole, 1), "of_bare": round(alone / whole, 3),
        }  # fmt: skip
    return found


class Own:
    """The most memory of its own that this process takes meanwhile, beyond what it had."""

    def __enter__(self) -> "Own":
        self._before = self._most = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def peak_mb(self) -> int:
        """In MB; pages of mapped files are not the process's own."""
        return round((self._most - self._before) * 1.024e-3)

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self._most = max(self._most, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


def neighbours(folder: Path, rows: int) -> dict[str, Any]:
    """Seconds and peak memory of kNN over features on disk, of a quarter as many and of all."""
    path = folder / "features.npy"
    out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, WIDTH))
    rng = np.random.default_rng(0)
    for low in range(0, rows, 1 << 14):
        part = out[low : low + (1 << 14)]
        part[:] = rng.standard_normal(part.shape, np.float32)
    out.flush()
    del out
    known = np.load(path, mmap_mode="r")
    query = rng.standard_normal((256, WIDTH)).astype(np.float32)
    found: dict[str, Any] = {"rows": rows, "width": WIDTH, "megabytes": round(rows * WIDTH * 4e-6)}
    for name, count in (("quarter", rows // 4), ("all", rows)):
        used = np.arange(count)
        target = np.zeros((count, CLASSES), np.uint8)
        target[used, used % CLASSES] = 1
        started = time.process_time()
        with Own() as own:
            votes = knn_votes(
                known, used, target, query, feature_scale(known, used), k=20, temperature=0.07,
                device=CPU,
            )  # fmt: skip
        found[name] = {"cpu_s": round(time.process_time() - started, 1), "peak_mb": own.peak_mb()}
        assert np.allclose(votes.sum(1), 1, atol=1e-4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="Features that vote.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        extracted = extraction(Path(folder))
        voted = neighbours(Path(folder), arguments.rows)
    goals = {
        "extraction_of_bare >= 0.9": extracted["image"]["of_bare"] >= 0.9,
        "knn_peak_mb <= 1000": voted["all"]["peak_mb"] <= 1000,
    }
    print(json.dumps({"extraction": extracted, "knn": voted, "goals_met": goals}, indent=2))


if __name__ == "__main__":
    main()
