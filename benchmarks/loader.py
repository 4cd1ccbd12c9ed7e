"""Packed batches of chips with their graphs, in samples per second.

Fabricated shards of 256 chips, of 3x224x224 uint8 and of 12x64x64 uint16, with about 50 and about
300 objects a chip. Contenders, each in a process of its own, on the same chips, in batches of 64,
page cache warm:

- `ours`: `ShardStream` with its defaults, two reading threads;
- `memory_map`: the same bytes in flat files, mapped, and read in whole shards into fresh memory,
  of which batches are then gathered in shuffled order; nothing checked, no graph made;
- `memory_map_in_place`: the floor: batches gathered from the map itself;
- `per_file`: the usual layout: one picture (jpg; GeoTIFF for 12 bands) and one pickled PyG
  `HeteroData` a chip, read and collated by PyG's `DataLoader` in one process
  (`per_file_2_workers`: in two more);
- `s3_cold`, `s3_warm`: `ours` from an S3 endpoint on this machine, every answer of which comes 20
  ms late, with a cache: its first epoch, and the ones after. The endpoint takes part of the same
  cores.

    python benchmarks/loader.py [--repeat 3] [--shards 4] [--objects 50 300] [--images rgb sentinel]

Prints JSON, with what was aimed at and whether it was reached.
"""

import argparse
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
from _common import best_of, growth, peak_mb, report
from numpy.typing import NDArray
from PIL import Image

from geolink.reader import open_dataset, read_shard
from geolink.stream import STREAMED, ShardStream, read_chips
from pipelines.snapshot import publish
from pipelines.store import prepare_dataset
from schemas.grid import Block, Grid
from schemas.sensor import AERIAL_RGB, SENTINEL_2_L2A, Sensor
from schemas.storage import storage
from tests.servers.s3 import environment, proxy, s3
from tests.shards import make_grid, make_info, random_arrays, store_row, write_vocabulary

BATCH = 64
CHIPS = 256
PER_FILE = 512
OBJECTS = (50, 300)
EPOCH = 16
"""An epoch goes so often over the shards, so that it is long enough to be typical."""
LATENCY_S = 0.02
GOALS = {
    "ours_to_memory_map": 0.5,
    "ours_to_per_file": 20.0,
    "samples_per_s": 4000.0,
    "s3_warm_to_ours": 0.9,
}
"""Least that is aimed at."""


class Images(NamedTuple):
    """What chips look like."""

    grid: Grid
    sensor: Sensor
    mean: float
    spread: float
    noise: float


IMAGES = {
    "rgb": Images(make_grid(size=224, patch=16, shard_side=16), AERIAL_RGB, 120, 40, 6),
    "sentinel": Images(make_grid(size=64, patch=8, shard_side=16), SENTINEL_2_L2A, 2000, 600, 60),
}


def smooth_images(rng: np.random.Generator, like: Images) -> NDArray[Any]:
    """Pixels that shrink about as real ones do: blobs and a little noise."""
    bands, size = len(like.sensor.bands), like.grid.size
    coarse = rng.normal(like.mean, like.spread, (CHIPS, bands, size // 8, size // 8))
    image = coarse.repeat(8, 2).repeat(8, 3)
    image += rng.normal(0, like.noise, image.shape)
    dtype = np.dtype(like.sensor.dtype)
    return np.clip(image, 1, np.iinfo(dtype).max).astype(dtype)


def make_data(folder: Path, shards: int, objects: int, like: Images) -> None:
    """Write and publish the shards."""
    dataset, info = folder / "dataset", make_info(like.grid, like.sensor)
    prepare_dataset(dataset, info)
    rows = []
    for n in range(shards):
        block = Block(32632, 10 + n, 100)
        arrays = random_arrays(
            n, chips=CHIPS, objects=objects, grid=like.grid, sensor=like.sensor, block=block
        )
        arrays["image"] = smooth_images(np.random.default_rng(n), like)
        rows.append(store_row(dataset, block, arrays))
    publish(dataset, rows, write_vocabulary(dataset, 16), info)


def make_baselines(folder: Path) -> None:
    """The same chips as a flat file, and some of them as a jpg and a pickle each."""
    dataset = open_dataset(folder / "dataset")
    graph_bytes = 0
    with (folder / "image.bin").open("wb") as images, (folder / "graph.bin").open("wb") as graphs:
        for row in dataset.rows:
            arrays = read_shard(dataset, row, STREAMED)
            images.write(arrays.pop("image").tobytes())
            graph_bytes += graphs.write(b"".join(a.tobytes() for a in arrays.values()))
    shape, dtype = dataset.info.grid.size, dataset.info.sensor.dtype
    flat = {
        "shards": len(dataset.rows), "graph": graph_bytes // (len(dataset.rows) * CHIPS),
        "image": [len(dataset.info.sensor.bands), shape, shape], "dtype": dtype,
    }  # fmt: skip
    (folder / "flat.json").write_text(json.dumps(flat))
    (folder / "files").mkdir()
    for n, batch in enumerate(read_chips(dataset, None, batch_size=1)):
        if n == PER_FILE:
            break
        write_picture(folder / "files" / f"{n:05d}", batch.image[0].numpy())
        with (folder / "files" / f"{n:05d}.pkl").open("wb") as file:
            pickle.dump(batch.graph.to_pyg(), file)


def write_picture(path: Path, image: NDArray[Any]) -> None:
    """Pixels [band, y, x] as a jpg, or as a GeoTIFF if there are more than three bands."""
    if len(image) == 3:
        pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
        Image.fromarray(pixels).save(path.with_suffix(".jpg"), quality=90)
        return
    bands, height, width = image.shape
    with rasterio.open(
        path.with_suffix(".tif"), "w", driver="GTiff", count=bands, height=height, width=width,
        dtype=image.dtype, compress="deflate",
    ) as file:  # fmt: skip
        file.write(image)


def read_picture(path: Path) -> NDArray[Any]:
    """What `write_picture` wrote."""
    if path.with_suffix(".jpg").exists():
        with Image.open(path.with_suffix(".jpg")) as picture:
            return np.array(picture).transpose(2, 0, 1)
    with rasterio.open(path.with_suffix(".tif")) as file:
        found: NDArray[Any] = file.read()
    return found


@cache
def stream_of(dataset: Path | str, times: int, cached: Path | None = None) -> ShardStream:
    """A stream that goes so many times over the shards in an epoch."""
    opened = open_dataset(dataset)
    opened = replace(opened, rows=opened.rows * times)
    return ShardStream(opened, split="train", batch_size=BATCH, seed=0, readers=2, cache=cached)


def ours(folder: Path) -> Iterator[int]:
    """Sizes of the batches of one epoch."""
    for batch in stream_of(folder / "dataset", EPOCH):
        yield len(batch)


def s3_cold(folder: Path) -> Iterator[int]:
    """One epoch over an empty cache."""
    with tempfile.TemporaryDirectory() as empty:
        for batch in stream_of("s3://data/set", 1, Path(empty)):
            yield len(batch)


def s3_warm(folder: Path) -> Iterator[int]:
    """One epoch over a cache that holds all shards."""
    list(stream_of("s3://data/set", 1, folder / "cache"))
    for batch in stream_of("s3://data/set", EPOCH, folder / "cache"):
        yield len(batch)


def memory_map(folder: Path) -> Iterator[int]:
    """The same bytes in whole shards, without any of the work."""
    flat, images, graphs = mapped(folder)
    for n in list(range(flat["shards"])) * EPOCH:
        shard = np.array(images[n * CHIPS : (n + 1) * CHIPS])
        yield from gathered(shard, np.array(graphs[n * CHIPS : (n + 1) * CHIPS]))


def memory_map_in_place(folder: Path) -> Iterator[int]:
    """The same bytes straight from the map."""
    _, images, graphs = mapped(folder)
    for _ in range(EPOCH):
        yield from gathered(images, graphs)


def mapped(folder: Path) -> tuple[dict[str, Any], NDArray[Any], NDArray[np.uint8]]:
    """Pixels [chip, band, y, x] and bytes of graphs [chip, byte], mapped."""
    flat = json.loads((folder / "flat.json").read_text())
    chips = flat["shards"] * CHIPS
    dtype = np.dtype(flat["dtype"])
    images = np.memmap(folder / "image.bin", dtype, "r", shape=(chips, *flat["image"]))
    graphs = np.memmap(folder / "graph.bin", np.uint8, "r", shape=(chips, flat["graph"]))
    return flat, images, graphs


def gathered(images: NDArray[Any], graphs: NDArray[np.uint8]) -> Iterator[int]:
    """Sizes of batches copied in shuffled order."""
    order = np.random.default_rng(0).permutation(len(images))
    for n in range(0, len(order) - BATCH + 1, BATCH):
        chosen = order[n : n + BATCH]
        pixels, _ = images[chosen], graphs[chosen]
        yield len(pixels)


def per_file(folder: Path, workers: int = 0) -> Iterator[int]:
    """A file of pixels and a file of graph a chip."""
    import torch
    from torch_geometric.loader import DataLoader

    class Files(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return PER_FILE

        def __getitem__(self, n: int) -> Any:
            pixels = torch.from_numpy(read_picture(folder / "files" / f"{n:05d}"))
            graph = pickle.loads((folder / "files" / f"{n:05d}.pkl").read_bytes())  # noqa: S301
            return pixels, graph

    for pixels, _ in DataLoader(Files(), BATCH, shuffle=True, num_workers=workers):
        yield len(pixels)


def per_file_2_workers(folder: Path) -> Iterator[int]:
    """The same in two worker processes."""
    yield from per_file(folder, workers=2)


CONTENDERS: dict[str, Callable[[Path], Iterator[int]]] = {
    f.__name__: f
    for f in (
        ours, memory_map, memory_map_in_place, per_file, per_file_2_workers, s3_cold, s3_warm
    )
}  # fmt: skip
SLOW = ("per_file", "per_file_2_workers", "s3_cold")
"""Run once: they are many times slower, and the first run is as good as any."""


def measure(name: str, folder: Path, repeat: int) -> dict[str, float]:
    """Samples per second of the fastest of some epochs, their start included; peak memory.

    `samples_per_cpu_s` counts processor time of this process, which other load disturbs less.
    """
    idle = peak_mb()
    if name == "s3_warm":
        list(s3_warm(folder))
    busy = time.process_time()
    seconds, chips = best_of(repeat, lambda: sum(CONTENDERS[name](folder)))
    busy = (time.process_time() - busy) / repeat
    return {
        "samples_per_s": round(chips / seconds, 1),
        "samples_per_cpu_s": round(chips / busy, 1),
        "peak_mb": peak_mb(),
        "idle_mb": idle,
    }


def compare(folder: Path, repeat: int) -> dict[str, Any]:
    """Every contender in a process of its own."""
    figures: dict[str, Any] = {}
    with late_store(folder / "dataset"):
        for name in CONTENDERS:
            times = "1" if name in SLOW else str(repeat)
            figures[name] = json.loads(child("--repeat", times, "--run", name, str(folder)))
    rate = {name: figures[name]["samples_per_s"] for name in CONTENDERS}
    ratio = {f"ours_to_{n}": round(rate["ours"] / rate[n], 2) for n in rate if n != "ours"}
    ratio["s3_warm_to_ours"] = round(rate["s3_warm"] / rate["ours"], 2)
    return {**figures, **ratio}


@contextmanager
def late_store(dataset: Path) -> Iterator[None]:
    """The dataset at s3://data/set, in an endpoint whose answers come late, for child processes."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3() as address:
        os.environ |= environment(address)
        remote = storage("s3://data/set")
        for path in sorted(p for p in dataset.rglob("*") if p.is_file()):
            remote.write(path.relative_to(dataset).as_posix(), path.read_bytes())
        with proxy(address, {"slow": 1.0}) as late:
            late.slow_s = LATENCY_S
            os.environ |= environment(late.address)
            yield


def goals(result: dict[str, Any]) -> dict[str, Any]:
    """What was aimed at, the worst that was reached in any case, and whether that is enough."""
    found = {}
    for name, least in GOALS.items():
        cases = [
            case["ours"][name] if name == "samples_per_s" else case[name]
            for case in result.values()
        ]
        found[name] = {"at_least": least, "worst": min(cases), "met": min(cases) >= least}
    return found


def child(*arguments: str) -> str:
    """What this script prints when run with other arguments."""
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    return subprocess.check_output(command, text=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--objects", type=int, nargs="+", default=OBJECTS)
    parser.add_argument("--images", nargs="+", default=list(IMAGES), choices=list(IMAGES))
    parser.add_argument("--make", metavar="FOLDER", help="(used by the script itself)")
    parser.add_argument("--run", nargs=2, metavar=("CONTENDER", "FOLDER"), help="(likewise)")
    arguments = parser.parse_args()
    if arguments.run:
        name, folder = arguments.run
        print(json.dumps(measure(name, Path(folder), arguments.repeat)))
    elif arguments.make:
        like = IMAGES[arguments.images[0]]
        make_data(Path(arguments.make), arguments.shards, arguments.objects[0], like)
        make_baselines(Path(arguments.make))
    else:
        compare_all(arguments.images, arguments.objects, arguments.shards, arguments.repeat)


def compare_all(images: Sequence[str], sizes: Sequence[int], shards: int, repeat: int) -> None:
    """Print the figures for such chips with so many objects."""
    result: dict[str, Any] = {}
    for name in images:
        for objects in sizes:
            with tempfile.TemporaryDirectory() as scratch:
                child("--shards", str(shards), "--objects", str(objects), "--images", name,
                      "--make", scratch)  # fmt: skip
                result[f"{name}_{objects}_objects"] = compare(Path(scratch), repeat)
    more: dict[str, Any] = {"goals": goals(result)}
    if len(sizes) > 1:
        for name in images:
            rates = [result[f"{name}_{n}_objects"]["ours"]["samples_per_s"] for n in sizes]
            more[f"{name}_growth_with_objects"] = growth(list(sizes), [1 / r for r in rates])
    report({**result, **more})


if __name__ == "__main__":
    main()
