"""Embedding of a region against the bare encoder, and its memory.

    python benchmarks/embed.py [--side PIXELS]      (1,024)

A dataset of 16 shards, and a GeoTIFF of so many pixels a side, are embedded whole: pixels are read,
windows cut, encoded and blended, vectors kept as float16 in Zarr. The bare encoder gets the same
windows in the same batches, which lie in memory as it takes them. Both in seconds of the processor,
so that other programs do not count. Goal: at least 0.80 of the bare encoder's throughput.
`patches_per_window`: how many patches of the map a window of `grid` squared pays for, as windows
overlap. Memory: what a file of eight times the side takes beyond one of four. Prints JSON.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._common import best_of, peak_mb, report
from flows.areas import scene_areas
from flows.embed import BLOCK_PX
from geolink.embed.area import Area, dataset_areas
from geolink.embed.models import Embedder, open_embedder
from geolink.embed.run import embed_areas
from geolink.embed.windows import Lattice
from geolink.reader import Dataset, open_dataset
from pipelines.pixels import look
from schemas.evaluation import Inputs
from tests.shards import make_dataset, make_grid
from tests.tasks import make_checkpoint

CPU = torch.device("cpu")
BATCH = 64
GOAL = 0.80
VIT_TINY = {"image_size": 64, "embed_dim": 192, "depth": 12, "num_heads": 3}


def compare(
    run: Path, inputs: Inputs, areas: Any, dataset: Dataset | None, folder: Path
) -> dict[str, Any]:
    """Windows a second of the processor, embedded and encoded alone."""
    embedder, found = open_embedder(run, inputs, areas, dataset, device=CPU)
    lattice = Lattice(embedder.encoder.grid, embedder.encoder.grid // 4, BATCH)
    batches: list[torch.Tensor] = []

    def kept(images: torch.Tensor) -> torch.Tensor:
        batches.append(embedder.encoder.prepare(images))
        return batches[-1]

    def embed(name: str, by: Embedder = embedder) -> None:
        embed_areas(by, found, dataset, folder / name, {}, lattice=lattice, kept="float16")

    embed(f"{inputs}-warm", replace(embedder, encoder=replace(embedder.encoder, prepare=kept)))
    windows = sum(len(batch) for batch in batches)
    model: Any = embedder.encoder.module

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            model.image_tokens(batch)

    # By turns, so that both see the same machine.
    each = [
        (best_of(1, bare, time.process_time)[0],
         best_of(1, lambda n=n: embed(f"{inputs}-{n}"), time.process_time)[0])
        for n in range(2)
    ]  # fmt: skip
    alone, whole = (min(times) for times in zip(*each, strict=True))
    patches = sum(b.rows * b.columns for a in found for b in a.blocks)
    return {
        "windows": windows, "bare_windows_per_s": round(windows / alone, 1),
        "windows_per_s": round(windows / whole, 1), "share": round(alone / whole, 3),
        "patches_per_window": round(patches / windows, 1), "grid": lattice.grid,
    }  # fmt: skip


def make_scene(path: Path, side: int) -> Path:
    """A GeoTIFF of noise, a strip at a time."""
    rng = np.random.default_rng(0)
    with rasterio.open(
        path, "w", driver="GTiff", count=3, height=side, width=side, dtype="uint8", tiled=True,
        crs="EPSG:32632", transform=from_origin(500_000, 5_000_000, 1, 1), photometric="RGB",
    ) as file:  # fmt: skip
        for row in range(0, side, 256):
            strip = rng.integers(1, 255, (3, min(256, side - row), side), np.uint8)
            file.write(strip, window=((row, row + strip.shape[1]), (0, side)))
    return path


def growth_mb(run: Path, folder: Path, side: int) -> float:
    """Memory that a file of twice the side takes beyond what one of `side` took; the encoder is
    replaced by one that does nothing, which leaves what grows as it is."""

    def embed(name: str, pixels: int) -> None:
        scene = look(make_scene(folder / f"{name}.tif", pixels))
        embedder, areas = open_embedder(
            run, "image", scene_areas(scene, (), BLOCK_PX), None, device=CPU
        )
        encoder = embedder.encoder
        nothing = torch.zeros(1, encoder.widths[0], encoder.grid, encoder.grid)
        idle = replace(
            encoder, module=None,
            maps=lambda images, graph: [nothing.expand(len(images), -1, -1, -1)],
        )  # fmt: skip
        lattice = Lattice(encoder.grid, 0, BATCH)
        embed_areas(
            replace(embedder, encoder=idle), areas, None, folder / name, {}, lattice=lattice,
            kept="int8",
        )  # fmt: skip

    folder.mkdir()
    embed("small", side)
    before = peak_mb()
    embed("large", 2 * side)
    return round(peak_mb() - before, 1)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=1024, help="Pixels of the GeoTIFF.")
    side = parser.parse_args().side
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_checkpoint(folder / "run", **VIT_TINY)
        # First, as the largest memory of a process is what is measured.
        grown = growth_mb(run, folder / "memory", 4 * side)
        grid = make_grid(size=64, patch=8, shard_side=4)
        dataset = open_dataset(
            make_dataset(folder / "d", shards=16, chips=16, objects=30, grid=grid)
        )
        scene = look(make_scene(folder / "scene.tif", side))

        def areas(patch: int) -> list[Area]:
            return dataset_areas(dataset, patch)

        both: tuple[Inputs, ...] = ("image", "image+osm")
        figures = {
            f"dataset, {inputs}": compare(run, inputs, areas, dataset, folder / "e")
            for inputs in both
        }
        figures["GeoTIFF"] = compare(
            run, "image", scene_areas(scene, (), BLOCK_PX), None, folder / "s"
        )
    goals = {name: figure["share"] >= GOAL for name, figure in figures.items()}
    report({"throughput": figures, "memory_growth_mb": grown, "goals_met": goals})


if __name__ == "__main__":
    main()
