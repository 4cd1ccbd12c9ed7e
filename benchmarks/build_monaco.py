"""From a PBF to a published snapshot, stage by stage, against only moving the pixels.

Scenes are rendered over the extract first (12 bands at 10 m, two dates), which is not counted. Then
`build_dataset` runs with a stopwatch around the functions it calls: once from nothing, in a fresh
process, and then over a quarter, a half and the whole of the region with the extract converted.
The floor, in the same run: the bands of the scenes that each shard uses are read by rasterio, one
window a band, and written by `write_shard` with every other array empty.

    python benchmarks/build_monaco.py [extract.osm.pbf] [--size-km KM] [--repeat 3]

Without an extract: with `--size-km`, a made-up town; else `$GEOLINK_SHARED/data/monaco.osm.pbf`,
or the same below `../shared`, or where neither is there a town of 4 km. Prints JSON.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import rasterio
from _common import growth, report
from rasterio.enums import Resampling
from rasterio.windows import from_bounds

import pipelines.build
import pipelines.inputs
import pipelines.plan
from pipelines import catalog, snapshot, store, tags
from pipelines.build import BuildResult, build_dataset
from pipelines.plan import BlockSource, ShardTask, make_plan
from pipelines.world import World, make_world
from schemas.config import DatasetConfig
from schemas.grid import block_bounds
from schemas.layout import FIXED_DIMS, LAYOUT

GOAL = 1.5
FRACTIONS = (0.25, 0.5, 1.0)

STAGES: dict[str, list[tuple[Any, str]]] = {
    "convert extract": [(pipelines.plan, "extract_of")],
    "plan": [(pipelines.build, "make_plan")],
    "read pixels": [(pipelines.inputs, "load_block"), (pipelines.inputs, "cut_chips")],
    "load features": [(pipelines.inputs, "load_features")],
    "rasterise": [(pipelines.inputs, "rasterise")],
    "clip": [(pipelines.build, "clip")],
    "tags": [(tags, "tag_arrays")],
    "relations": [(pipelines.build, "build_relations")],
    "anchors": [(pipelines.build, "build_anchors")],
    "correspondence": [(pipelines.build, "build_correspondence")],
    "cut labels": [(pipelines.build, "cut_labels"), (pipelines.build, "densities")],
    "statistics": [(pipelines.build, "patch_brightness"), (pipelines.build, "statistics")],
    "write": [(store, "write_shard")],
    "vocabulary": [(tags, "write_vocabulary")],
    "publish": [(snapshot, "publish")],
    "catalog": [(catalog, "record_build")],
}
"""Where the functions of each stage are called from."""


class Stopwatch:
    """Seconds of each stage; what a stage calls of another one counts for the other alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running = ["other"]
        self._mark = time.perf_counter()

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._mark
        self._mark = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what runs within for `name`."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted for `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return timed

    def figures(self) -> dict[str, float]:
        """Rounded seconds, stages in their order, what lies between them last."""
        return {name: round(self.seconds[name], 3) for name in (*STAGES, "other")}


def timed_build(config: DatasetConfig) -> dict[str, Any]:
    """Build into a new folder; figures, and the result under `result`."""
    watch = Stopwatch()
    wall, cpu = time.perf_counter(), time.process_time()
    with ExitStack() as stack, watch.stage("other"):
        for name, functions in STAGES.items():
            for module, attribute in functions:
                timed = watch.around(name, getattr(module, attribute))
                stack.enter_context(mock.patch.object(module, attribute, timed))
        result = build_dataset(config)
    seconds = time.perf_counter() - wall
    if not result.published:
        raise SystemExit(f"nothing was published: {result.failed}")
    return {
        "shards": len(result.rows),
        "chips": sum(r.chips for r in result.rows),
        "objects": sum(r.objects for r in result.rows),
        "edges": sum(r.edges for r in result.rows),
        "mb": round(sum(r.bytes for r in result.rows) / 1e6, 1),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "chips_per_second": round(sum(r.chips for r in result.rows) / seconds, 1),
        "stages": watch.figures(),
        "result": result,
    }


def floor(config: DatasetConfig, result: BuildResult, folder: Path) -> dict[str, float]:
    """Seconds of only reading the same pixels and writing them."""
    used = {row.shard: (row.scenes, row.chips) for row in result.rows}
    tasks = [t for t in make_plan(config).tasks if t.shard in used]
    seconds = {"read": 0.0, "write": 0.0}
    wall, cpu = time.perf_counter(), time.process_time()
    for task in tasks:
        mark = time.perf_counter()
        image = read_windows(task, used[task.shard][0])[: used[task.shard][1]]
        seconds["read"] += time.perf_counter() - mark
        mark = time.perf_counter()
        store.write_shard(folder, task.shard, "floor", only_pixels(image, task), {})
        seconds["write"] += time.perf_counter() - mark
    return {
        **{name: round(s, 3) for name, s in seconds.items()},
        "seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }


def read_windows(task: ShardTask, scenes: list[str]) -> np.ndarray[Any, Any]:
    """Chips of a block out of every band of the scenes named; where two have pixels, the first."""
    assert isinstance(task.source, BlockSource)
    grid, side = task.info.grid, task.info.grid.size * task.info.grid.shard_side
    bounds = block_bounds(grid, task.source.block)
    image = np.zeros((len(task.info.sensor.bands), side, side), task.info.sensor.dtype)
    for scene in task.source.scenes:
        for n, asset in enumerate(scene.bands if scene.id in scenes else ()):
            with rasterio.open(asset.href) as file:
                band = file.read(
                    asset.index, window=from_bounds(*bounds, file.transform), boundless=True,
                    fill_value=0, out_shape=(side, side), resampling=Resampling.nearest,
                )  # fmt: skip
            np.copyto(image[n], band, where=image[n] == 0)
    cut = image.reshape(len(image), grid.shard_side, grid.size, grid.shard_side, grid.size)
    chips = np.ascontiguousarray(cut.transpose(1, 3, 0, 2, 4))
    return chips.reshape(-1, len(image), grid.size, grid.size)


def only_pixels(image: np.ndarray[Any, Any], task: ShardTask) -> dict[str, Any]:
    """The arrays of a shard with nothing in them but pixels."""
    chips, bands, y, x = image.shape
    p, classes = task.info.grid.patches, len(task.info.taxonomy.classes)
    sizes = {
        **FIXED_DIMS, "chip": chips, "band": bands, "y": y, "x": x, "patch_y": p, "patch_x": p,
        "class": classes, "chip_edge": chips + 1, "object_edge": 1, "tag_edge": 1,
    }  # fmt: skip
    empty = {
        spec.name: np.zeros([sizes.get(dim, 0) for dim in spec.dims], spec.dtype)
        for spec in LAYOUT
        if spec.name != "image"
    }
    return {**empty, "image": image}


def config_of(world: World, folder: Path, name: str, fraction: float = 1.0) -> DatasetConfig:
    """The dataset of the western part of a world's region."""
    west, south, east, north = world.bounds_lonlat
    return DatasetConfig.model_validate(
        {
            "name": "monaco", "dataset": folder / name, "cache": folder / "cache",
            "region": {"bbox": (west, south, west + fraction * (east - west), north)},
            "scenes": {"stac": str(world.s2_catalog)}, "osm": {"pbf": world.pbf},
            "sensor": "sentinel-2-l2a",
            "grid": {"gsd_m": 10, "size": 64, "patch": 8, "shard_side": 4}, "min_valid": 0,
        }
    )  # fmt: skip


def default_extract() -> Path | None:
    """Monaco where it is at hand."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    pbf = Path(os.environ.get("GEOLINK_SHARED", beside)) / "data" / "monaco.osm.pbf"
    return pbf if pbf.is_file() else None


def measure(world: World, folder: Path, repeat: int) -> dict[str, Any]:
    """All figures."""
    cold = timed_build(config_of(world, folder, "cold"))
    del cold["result"]
    cold["peak_mb_converting"] = round(
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        / (1e6 if sys.platform == "darwin" else 1e3),
        1,
    )
    parts: dict[str, dict[str, Any]] = {}
    for fraction in FRACTIONS:
        builds, floors = [], []
        for n in range(repeat):
            config = config_of(world, folder, f"{fraction}-{n}", fraction)
            builds.append(timed_build(config))
            floors.append(floor(config, builds[-1].pop("result"), folder / f"floor-{fraction}-{n}"))
        best = min(builds, key=lambda b: float(b["seconds"]))
        least = min(floors, key=lambda f: f["seconds"])
        parts[f"{fraction:g}"] = {
            **best,
            "floor": least,
            "ratio": round(best["seconds"] / least["seconds"], 2),
            "ratio_cpu": round(
                min(b["cpu_seconds"] for b in builds) / min(f["cpu_seconds"] for f in floors), 2
            ),
        }
    ends = [parts[f"{f:g}"] for f in (FRACTIONS[0], FRACTIONS[-1])]
    return {
        "goal_ratio": GOAL,
        "cold": cold,
        "region": parts,
        "ratio_cold": round(cold["seconds"] / ends[-1]["floor"]["seconds"], 2),
        # In seconds of this process: the disk and other programs are not what grows.
        "growth_exponent_with_shards": growth(
            [e["shards"] for e in ends], [e["cpu_seconds"] for e in ends]
        ),
    }


def main() -> None:
    """Render the scenes, run everything, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pbf", type=Path, nargs="?")
    parser.add_argument("--repeat", type=int, default=3, help="builds of each size; best counts")
    parser.add_argument("--size-km", type=float, help="side of a made-up town")
    arguments = parser.parse_args()
    pbf, size_km = arguments.pbf, arguments.size_km
    if pbf is None and size_km is None:
        pbf = default_extract()
    size_km = size_km or 4.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        world = make_world(folder / "world", osm_pbf=pbf, size_km=size_km, aerial_km=0.64)
        figures = measure(world, folder, arguments.repeat)
    extract = pbf.name if pbf else f"town of {size_km:g} km"
    report({"benchmark": "build", "extract": extract, "gsd_m": 10, **figures})


if __name__ == "__main__":
    main()
