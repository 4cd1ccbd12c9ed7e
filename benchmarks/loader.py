"""Packed batches of 3x224x224 uint8 chips with their graphs, in samples per second.

Fabricated shards of 256 chips with about 50, and about 300, objects a chip. Contenders, each in a
process of its own, on the same chips, in batches of 64, page cache warm:

- `ours`: `ShardStream`, one reading thread;
- `memory_map`: the same bytes in flat files, mapped, and read in whole shards into fresh memory,
  of which batches are then gathered in shuffled order; nothing checked, no graph made;
- `memory_map_in_place`: the floor: batches gathered from the map itself;
- `per_file`: the usual layout: one jpg and one pickled PyG `HeteroData` a chip, read and collated
  by PyG's `DataLoader` in one process (`per_file_2_workers`: in two more).

    python benchmarks/loader.py [--repeat 3] [--shards 4] [--objects 50 300]

Prints JSON.
"""

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _common import best_of, growth, peak_mb, report
from numpy.typing import NDArray
from PIL import Image

from geolink.reader import open_dataset, read_shard
from geolink.stream import STREAMED, ShardStream, read_chips
from pipelines.snapshot import publish
from pipelines.store import prepare_dataset
from schemas.grid import Block
from tests.shards import make_grid, make_info, random_arrays, store_row, write_vocabulary

BATCH = 64
CHIPS = 256
PER_FILE = 512
OBJECTS = (50, 300)
EPOCH = 4
"""An epoch goes so often over the shards, so that it is long enough to be typical."""
GRID = make_grid(size=224, patch=16, shard_side=16)


def smooth_images(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Pixels that a jpg shrinks about as it does aerial images: blobs and a little noise."""
    coarse = rng.normal(120, 40, (CHIPS, 3, 28, 28)).repeat(8, 2).repeat(8, 3)
    return np.clip(coarse + rng.normal(0, 6, coarse.shape), 1, 255).astype(np.uint8)


def make_data(folder: Path, shards: int, objects: int) -> None:
    """Write and publish the shards."""
    dataset = folder / "dataset"
    prepare_dataset(dataset, make_info(GRID))
    rows = []
    for n in range(shards):
        block = Block(32632, 10 + n, 100)
        arrays = random_arrays(n, chips=CHIPS, objects=objects, grid=GRID, block=block)
        arrays["image"] = smooth_images(np.random.default_rng(n))
        rows.append(store_row(dataset, block, arrays))
    publish(dataset, rows, write_vocabulary(dataset, 16), make_info(GRID))


def make_baselines(folder: Path) -> None:
    """The same chips as a flat file, and some of them as a jpg and a pickle each."""
    dataset = open_dataset(folder / "dataset")
    graph_bytes = 0
    with (folder / "image.bin").open("wb") as images, (folder / "graph.bin").open("wb") as graphs:
        for row in dataset.rows:
            arrays = read_shard(dataset, row, STREAMED)
            images.write(arrays.pop("image").tobytes())
            graph_bytes += graphs.write(b"".join(a.tobytes() for a in arrays.values()))
    flat = {"shards": len(dataset.rows), "graph": graph_bytes // (len(dataset.rows) * CHIPS)}
    (folder / "flat.json").write_text(json.dumps(flat))
    (folder / "files").mkdir()
    for n, batch in enumerate(read_chips(dataset, None, batch_size=1)):
        if n == PER_FILE:
            break
        pixels = np.ascontiguousarray(batch.image[0].numpy().transpose(1, 2, 0))
        Image.fromarray(pixels).save(folder / "files" / f"{n:05d}.jpg", quality=90)
        with (folder / "files" / f"{n:05d}.pkl").open("wb") as file:
            pickle.dump(batch.graph.to_pyg(), file)


def ours(folder: Path) -> Iterator[int]:
    """Sizes of the batches of one epoch."""
    dataset = open_dataset(folder / "dataset")
    dataset = replace(dataset, rows=dataset.rows * EPOCH)
    for batch in ShardStream(dataset, split="train", batch_size=BATCH, seed=0, window_shards=4):
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


def mapped(folder: Path) -> tuple[dict[str, int], NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels [chip, band, y, x] and bytes of graphs [chip, byte], mapped."""
    flat = json.loads((folder / "flat.json").read_text())
    chips = flat["shards"] * CHIPS
    images = np.memmap(folder / "image.bin", np.uint8, "r", shape=(chips, 3, 224, 224))
    graphs = np.memmap(folder / "graph.bin", np.uint8, "r", shape=(chips, flat["graph"]))
    return flat, images, graphs


def gathered(images: NDArray[np.uint8], graphs: NDArray[np.uint8]) -> Iterator[int]:
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
            with Image.open(folder / "files" / f"{n:05d}.jpg") as picture:
                pixels = torch.from_numpy(np.array(picture).transpose(2, 0, 1))
            graph = pickle.loads((folder / "files" / f"{n:05d}.pkl").read_bytes())  # noqa: S301
            return pixels, graph

    for pixels, _ in DataLoader(Files(), BATCH, shuffle=True, num_workers=workers):
        yield len(pixels)


def per_file_2_workers(folder: Path) -> Iterator[int]:
    """The same in two worker processes."""
    yield from per_file(folder, workers=2)


CONTENDERS: dict[str, Callable[[Path], Iterator[int]]] = {
    f.__name__: f for f in (ours, memory_map, memory_map_in_place, per_file, per_file_2_workers)
}


def measure(name: str, folder: Path, repeat: int) -> dict[str, float]:
    """Samples per second of the fastest of some epochs, their start included; peak memory.

    `samples_per_cpu_s` counts processor time of this process, which other load disturbs less.
    """
    idle = peak_mb()
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
    for name in CONTENDERS:
        figures[name] = json.loads(child("--repeat", str(repeat), "--run", name, str(folder)))
    rate = {name: figures[name]["samples_per_s"] for name in CONTENDERS}
    ratio = {f"ours_to_{n}": round(rate["ours"] / rate[n], 2) for n in rate if n != "ours"}
    return {**figures, **ratio}


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
    parser.add_argument("--make", metavar="FOLDER", help="(used by the script itself)")
    parser.add_argument("--run", nargs=2, metavar=("CONTENDER", "FOLDER"), help="(likewise)")
    arguments = parser.parse_args()
    if arguments.run:
        name, folder = arguments.run
        print(json.dumps(measure(name, Path(folder), arguments.repeat)))
    elif arguments.make:
        make_data(Path(arguments.make), arguments.shards, arguments.objects[0])
        make_baselines(Path(arguments.make))
    else:
        compare_all(arguments.objects, arguments.shards, arguments.repeat)


def compare_all(sizes: Sequence[int], shards: int, repeat: int) -> None:
    """Print the figures for chips with so many objects."""
    result = {}
    for objects in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            child("--shards", str(shards), "--objects", str(objects), "--make", scratch)
            result[f"{objects}_objects"] = compare(Path(scratch), repeat)
    rates = [result[f"{n}_objects"]["ours"]["samples_per_s"] for n in sizes]
    if len(sizes) > 1:
        result["growth_with_objects"] = growth(list(sizes), [1 / rate for rate in rates])
    report(result)


if __name__ == "__main__":
    main()
