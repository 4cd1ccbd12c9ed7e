"""A region of many shards, end to end: time against a floor, memory, and what two workers gain.

A made-up region is rendered first (Sentinel-2-like scenes as local files, two dates), which is not
counted, and its extract converted. Then, every run in a process of its own:

- `ratio`: `build_dataset` from the plan to the published snapshot, over shards of 4 x 4 chips of
  64 px (and once more of 128 px) with 12 bands, and the floor over the same shards: the masks of
  all candidate scenes and the bands of those that gave pixels are read by rasterio, one window
  each, and written by the same `write_shard` with every other array empty.
- `memory`: peak memory of coordinator and worker at 25, 100 and 400 small shards.
- `workers`: the same shards on one worker and on two.

    python benchmarks/build_region.py [--size-km 26] [--repeat 3]

Prints JSON.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import psutil
import rasterio
from _common import peak_mb, report
from build_monaco import only_pixels, read_windows
from rasterio.windows import from_bounds

from pipelines import store
from pipelines.build import build_dataset
from pipelines.plan import BlockSource, ShardTask, make_plan
from pipelines.world import World, make_world
from schemas.config import DatasetConfig
from schemas.dataset import read_snapshot
from schemas.grid import block_bounds

GOALS = {"ratio": 1.5, "memory_growth": 1.1, "speed_up": 1.7}
BIG: dict[str, Any] = {
    "grid": {"gsd_m": 10, "size": 64, "patch": 8, "shard_side": 4}, "sensor": "sentinel-2-l2a",
}  # fmt: skip
LARGE: dict[str, Any] = {**BIG, "grid": {"gsd_m": 10, "size": 128, "patch": 16, "shard_side": 4}}
SMALL: dict[str, Any] = {
    "grid": {"gsd_m": 10, "size": 32, "patch": 8, "shard_side": 4},
    "sensor": {"preset": "sentinel-2-l2a", "bands": ["blue", "green", "red", "nir"]},
}  # fmt: skip
KINDS = {"big": BIG, "large": LARGE, "small": SMALL}
SHARDS = (25, 100, 400)


def config_of(world: World, folder: Path, name: str, kind: str, shards: int) -> DatasetConfig:
    """A square of so many shards (or a few more, where it meets the grid's lines) of a world."""
    options = KINDS[kind]
    grid = options["grid"]
    side_m = grid["gsd_m"] * grid["size"] * grid["shard_side"]
    west, south, east, north = world.bounds_lonlat
    x0, y0, x1, y1 = world.bounds_utm
    side = (shards**0.5 - 0.5) * side_m
    part_x, part_y = min(1.0, side / (x1 - x0)), min(1.0, side / (y1 - y0))
    return DatasetConfig.model_validate(
        {
            "name": "region", "dataset": folder / name, "cache": folder / "cache",
            "region": {
                "bbox": (west, south, west + part_x * (east - west),
                         south + part_y * (north - south)),
            },
            "scenes": {"stac": str(world.s2_catalog)}, "osm": {"pbf": str(world.pbf)},
            "min_valid": 0, **options,
        }
    )  # fmt: skip


class ChildrenPeak:
    """Largest resident memory of a process started by this one, MB, looked at ten times a second
    (Linux; elsewhere 0).
    """

    def __enter__(self) -> "ChildrenPeak":
        self.mb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.1):
            for child in me.children(recursive=True):
                # One that is a zombie has no figure, one that has ended no file any more.
                with contextlib.suppress(OSError, StopIteration):
                    self.mb = max(self.mb, peak_mb(child.pid))


def run_build(config: DatasetConfig, workers: int) -> dict[str, Any]:
    """Build from nothing; figures."""
    marks: list[float] = []
    started, cpu = time.perf_counter(), time.process_time()
    with ChildrenPeak() as children:
        result = build_dataset(
            config, workers=workers, progress=lambda *_: marks.append(time.perf_counter())
        )
    seconds = time.perf_counter() - started
    if not result.published:
        raise SystemExit(f"nothing was published: {result.failed}")
    # From the first shard that is done to the last: without plan, start of workers and publishing.
    steady = (len(marks) - 1) / (marks[-1] - marks[0])
    return {
        "shards": len(result.rows), "chips": sum(r.chips for r in result.rows),
        "objects": sum(r.objects for r in result.rows),
        "mb": round(sum(r.bytes for r in result.rows) / 1e6, 1),
        "seconds": round(seconds, 2), "cpu_seconds": round(time.process_time() - cpu, 2),
        "shards_per_second": round(steady, 2),
        "coordinator_mb": peak_mb(), "worker_mb": children.mb,
    }  # fmt: skip


def run_floor(config: DatasetConfig, built: Path, folder: Path) -> dict[str, Any]:
    """Only read the same pixels and write them; figures."""
    used = {row.shard: (row.scenes, row.chips) for row in read_snapshot(built).rows}
    tasks = make_plan(config).tasks
    seconds = {"read": 0.0, "write": 0.0}
    started, cpu = time.perf_counter(), time.process_time()
    for task in tasks:
        mark = time.perf_counter()
        image = read_windows(task, used[task.shard][0])[: used[task.shard][1]]
        read_masks(task)
        seconds["read"] += time.perf_counter() - mark
        mark = time.perf_counter()
        store.write_shard(folder, task.shard, "floor", only_pixels(image, task), {})
        seconds["write"] += time.perf_counter() - mark
    return {
        **{name: round(s, 2) for name, s in seconds.items()},
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }  # fmt: skip


def read_masks(task: ShardTask) -> None:
    """Read the masks of all candidates over a block."""
    assert isinstance(task.source, BlockSource)
    bounds = block_bounds(task.info.grid, task.source.block)
    for scene in task.source.scenes:
        if scene.mask is not None:
            with rasterio.open(scene.mask.href) as file:
                window = from_bounds(*bounds, file.transform)
                file.read(scene.mask.index, window=window, boundless=True, fill_value=0)


def apart(folder: Path, *arguments: object) -> dict[str, Any]:
    """Figures of a run in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--in", str(folder), *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def one_run(world: World, folder: Path, what: list[str]) -> dict[str, Any]:
    """What `apart` asks for: `build NAME KIND SHARDS WORKERS` or `floor NAME KIND SHARDS BUILT`."""
    command, name, kind, shards, last = what
    config = config_of(world, folder, name, kind, int(shards))
    if command == "floor":
        return run_floor(config, folder / last, folder / name)
    return run_build(config, int(last))


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run that took least, with the least processor time of all."""
    least = min(runs, key=lambda r: float(r["seconds"]))
    return {**least, "cpu_seconds": min(r["cpu_seconds"] for r in runs)}


def ratio(folder: Path, kind: str, shards: int, repeat: int) -> dict[str, Any]:
    """Builds against floors, in turn."""
    builds, floors = [], []
    for n in range(repeat):
        builds.append(apart(folder, "build", f"{kind}{n}", kind, shards, 1))
        floors.append(apart(folder, "floor", f"floor-{kind}{n}", kind, shards, f"{kind}{n}"))
    build, floor = best(builds), best(floors)
    return {
        "build": build, "floor": floor,
        "ratio": round(build["seconds"] / floor["seconds"], 2),
        "ratio_cpu": round(build["cpu_seconds"] / floor["cpu_seconds"], 2),
    }  # fmt: skip


def measure(folder: Path, repeat: int) -> dict[str, Any]:
    """All figures."""
    apart(folder, "build", "first", "small", 4, 1)  # converts the extract
    ratios = {kind: ratio(folder, kind, shards, repeat) for kind, shards in
              (("big", 100), ("large", 25))}  # fmt: skip
    memory = {n: apart(folder, "build", f"small{n}", "small", n, 1) for n in SHARDS}
    two = [apart(folder, "build", f"two{n}-{r}", "big", 100, n) for r in range(repeat)
           for n in (1, 2)]  # fmt: skip
    one, both = best(two[0::2]), best(two[1::2])
    spread = apart(folder, "build", "spread", "small", SHARDS[-1], 2)
    few = apart(folder, "build", "few", "small", SHARDS[0], 2)
    peaks = [m["coordinator_mb"] for m in memory.values()]
    return {
        "goals": GOALS,
        "ratio": ratios["big"],
        "ratio_of_larger_shards": ratios["large"],
        "memory": {
            "in_one_process": memory,
            "growth": round(max(peaks) / min(peaks), 3),
            "on_two_workers": {few["shards"]: few, spread["shards"]: spread},
            "growth_coordinator": round(spread["coordinator_mb"] / few["coordinator_mb"], 3),
            "growth_worker": round(spread["worker_mb"] / few["worker_mb"], 3),
        },
        "workers": {
            "one": one, "two": both,
            "speed_up": round(both["shards_per_second"] / one["shards_per_second"], 2),
            "speed_up_end_to_end": round(one["seconds"] / both["seconds"], 2),
        },
    }  # fmt: skip


def main() -> None:
    """Render the region, run everything, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-km", type=float, default=26.0, help="side of the region")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the best counts")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("what", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        about = json.loads((arguments.folder / "world.json").read_text())
        world = make_world(arguments.folder / "world", **about)
        print(json.dumps(one_run(world, arguments.folder, arguments.what)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        about = {"seed": 3, "size_km": arguments.size_km, "aerial_km": 0.64}
        make_world(folder / "world", **about)
        (folder / "world.json").write_text(json.dumps(about))
        figures = measure(folder, arguments.repeat)
    report({"benchmark": "region", "gsd_m": 10, "cores": os.cpu_count(), **figures})


if __name__ == "__main__":
    main()
