"""How converting an OSM extract, and asking for its parts, grows with its size.

    python -m benchmarks.osm_size [MILLIONS ...]      (0.05 0.5 5)

Makes PBF files of so many millions of tagged objects: towns of buildings, streets, trees, a wood
and a river, about 3.8 elements an object. For each it measures the conversion (seconds, and the
largest resident memory of its whole process tree, shared pages counted in every process), the
digests of all shards' boxes, the query of single shards (seconds, row groups read, rows), and the
strata of a sample. Every step runs in a process of its own, so that its memory is its own.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import osmium
import psutil
from osmium.osm import mutable

from benchmarks._common import growth
from schemas.grid import Grid

GRID = Grid(gsd_m=10, size=64, patch=8, shard_side=4)
_TOWN = 1000
"""Objects of a town of one square kilometre."""
_BUILDINGS, _STREETS, _RIVERS, _TREES, _WOODS = 500, 99, 1, 399, 1
_NODES = 4 * _BUILDINGS + 8 * _STREETS + 30 * _RIVERS + 4 * _WOODS + _TREES
_WAYS = _BUILDINGS + _STREETS + _RIVERS + 2 * _WOODS
_SIDE = 0.01
"""Degrees from town to town."""


def write_pbf(path: Path, objects: int, seed: int = 0) -> None:
    """A PBF of so many tagged objects: a square of towns around 9 degrees east, 48 north."""
    towns = max(1, objects // _TOWN)
    rng = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(towns)))
    # Towns come in any order, as mappers do: neighbours in id are not neighbours in space.
    row, column = np.divmod(rng.permutation(side * side)[:towns], side)
    with osmium.SimpleWriter(str(path), overwrite=True) as writer:
        for town in range(towns):
            xy = _town(rng, 9 + column[town] * _SIDE, 48 + row[town] * _SIDE).tolist()
            first = town * _NODES + 1
            for i, at in enumerate(xy):
                tree = _TREES > i - (_NODES - _TREES) >= 0
                tags = {"natural": "tree", "height": str(i % 20)} if tree else {}
                writer.add_node(mutable.Node(id=first + i, location=at, tags=tags))
        for town in range(towns):
            _ways(writer, town)
        for town in range(towns):
            last = (town + 1) * _WAYS
            members = [("w", last - 1, "outer"), ("w", last, "outer")]
            tags = {"type": "multipolygon", "landuse": "forest"}
            writer.add_relation(mutable.Relation(id=town + 1, members=members, tags=tags))


def _town(rng: np.random.Generator, lon: float, lat: float) -> Any:
    """Positions of a town's nodes: corners of buildings and the wood, streets, then trees."""
    size = _SIDE * 0.9
    at = rng.uniform(0, size, (_BUILDINGS, 1, 2))
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * 1e-4
    buildings = (at + square).reshape(-1, 2)
    steps = rng.normal(0, 3e-4, (_STREETS, 8, 2)).cumsum(axis=1)
    streets = np.clip(rng.uniform(0, size, (_STREETS, 1, 2)) + steps, 0, size).reshape(-1, 2)
    # A river wanders over thirty towns' distance.
    river = (size / 2 + rng.normal(0, 0.3 / 8, (30, 2)).cumsum(axis=0)).reshape(-1, 2)
    wood = rng.uniform(0, size / 2, 2) + square * 20
    trees = rng.uniform(0, size, (_TREES, 2))
    return np.concatenate([buildings, streets, river, wood, trees]) + np.array([lon, lat])


def _ways(writer: osmium.SimpleWriter, town: int) -> None:
    node = town * _NODES + 1
    way = town * _WAYS + 1
    kinds = ("residential", "footway", "service", "tertiary")
    for i in range(_BUILDINGS):
        ring = [node, node + 1, node + 2, node + 3, node]
        tags = {"building": "yes" if i % 3 else "house", "building:levels": str(i % 6)}
        writer.add_way(mutable.Way(id=way, nodes=ring, tags=tags))
        way, node = way + 1, node + 4
    for i in range(_STREETS):
        tags = {"highway": kinds[i % 4], "surface": "asphalt"}
        writer.add_way(mutable.Way(id=way, nodes=range(node, node + 8), tags=tags))
        way, node = way + 1, node + 8
    tags = {"waterway": "river"}
    writer.add_way(mutable.Way(id=way, nodes=range(node, node + 30), tags=tags))
    way, node = way + 1, node + 30
    writer.add_way(mutable.Way(id=way, nodes=[node, node + 1, node + 2]))
    writer.add_way(mutable.Way(id=way + 1, nodes=[node + 2, node + 3, node]))


class TreeMemory(threading.Thread):
    """Largest sum of resident memory of this process's children, sampled ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self.done.wait(0.1):
            total = 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)


def _step(name: str, *arguments: str) -> dict[str, Any]:
    """Run one step of this script in a process of its own; its figures and memory."""
    memory = TreeMemory()
    memory.start()
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.osm_size", "--step", name, *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    memory.done.set()
    memory.join()
    wall = round(time.perf_counter() - started, 2)
    return {**json.loads(done.stdout), "process_s": wall, "peak_mb": round(memory.peak / 1e6, 1)}


def _convert(pbf: str, cache: str) -> dict[str, Any]:
    from pipelines.osm import convert_extracts
    from schemas.sources import OsmSource

    started = time.perf_counter()
    extract = convert_extracts([Path(pbf)], Path(cache), OsmSource(pbf=(pbf,)))
    seconds = round(time.perf_counter() - started, 2)
    return {
        "seconds": seconds, "objects": extract.objects,
        "pbf_mb": round(extract.bytes / 1e6, 1),
        "parquet_mb": round(extract.parquet.stat().st_size / 1e6, 1),
    }  # fmt: skip


def _boxes(objects: int) -> list[tuple[float, float, float, float]]:
    """Boxes of the shards (4 x 4 chips of 64 px at 10 m) over the towns."""
    from pipelines.region import plan_blocks
    from schemas.config import Splits
    from schemas.grid import block_bounds, to_lonlat
    from schemas.sources import Region

    side = np.ceil(np.sqrt(objects / _TOWN)) * _SIDE
    plans, _ = plan_blocks(Region(bbox=(9, 48, 9 + side, 48 + side)), GRID, Splits())
    return [to_lonlat(p.block.epsg).transform_bounds(*block_bounds(GRID, p.block)) for p in plans]


def _digests(pbf: str, cache: str) -> dict[str, Any]:
    from pipelines.osm import EMPTY_DIGEST, block_digests, convert_extracts
    from schemas.sources import OsmSource

    extract = convert_extracts([Path(pbf)], Path(cache), OsmSource(pbf=(pbf,)))
    boxes = _boxes(extract.objects)
    started = time.perf_counter()
    digests = block_digests(extract, boxes)
    seconds = round(time.perf_counter() - started, 3)
    full = sum(d != EMPTY_DIGEST for d in digests)
    return {"seconds": seconds, "shards": len(boxes), "with_objects": full}


def _queries(pbf: str, cache: str) -> dict[str, Any]:
    """Query up to 200 shards, one after the other, in one process."""
    import pyarrow.parquet as pq

    from pipelines.features import load_features
    from pipelines.osm import convert_extracts, row_group_bounds
    from schemas.grid import to_utm
    from schemas.sources import OsmSource
    from schemas.taxonomy import default_taxonomy

    extract = convert_extracts([Path(pbf)], Path(cache), OsmSource(pbf=(pbf,)))
    boxes = _boxes(extract.objects)
    some = [boxes[i] for i in np.linspace(0, len(boxes) - 1, min(200, len(boxes))).astype(int)]
    groups = row_group_bounds(pq.read_metadata(extract.parquet))
    taxonomy = default_taxonomy()
    read, rows, seconds, memory = [], [], [], []
    for west, south, east, north in some:
        meets = (groups[:, 0] <= east) & (groups[:, 2] >= west)
        read.append(int((meets & (groups[:, 1] <= north) & (groups[:, 3] >= south)).sum()))
        bounds = to_utm(32632).transform_bounds(west, south, east, north)
        started = time.perf_counter()
        features = load_features(extract.parquet, 32632, bounds, taxonomy)
        seconds.append(time.perf_counter() - started)
        rows.append(len(features.osm))
        memory.append(psutil.Process().memory_info().rss / 1e6)
    half = len(memory) // 2
    return {
        "shards": len(some), "row_groups": len(groups),
        "row_groups_read_median": float(np.median(read)), "row_groups_read_most": max(read),
        "features_median": float(np.median(rows)),
        "seconds_median": round(float(np.median(seconds)), 4),
        "rss_mb_after_half": round(memory[half], 1), "rss_mb_at_end": round(memory[-1], 1),
    }  # fmt: skip


def _strata(pbf: str, cache: str) -> dict[str, Any]:
    """A land-use sample of a thousand chips of the towns."""
    from pipelines.osm import convert_extracts
    from pipelines.region import plan_blocks
    from pipelines.sampling import sample_blocks
    from schemas.config import Splits
    from schemas.sources import OsmSource, Region, Sampling
    from schemas.taxonomy import default_taxonomy

    extract = convert_extracts([Path(pbf)], Path(cache), OsmSource(pbf=(pbf,)))
    side = np.ceil(np.sqrt(extract.objects / _TOWN)) * _SIDE
    plans, _ = plan_blocks(Region(bbox=(9, 48, 9 + side, 48 + side)), GRID, Splits())
    started = time.perf_counter()
    sample = Sampling(chips=1000, by="land-use")
    kept, _ = sample_blocks(plans, sample, GRID, extract, default_taxonomy())
    seconds = round(time.perf_counter() - started, 2)
    return {
        "seconds": seconds, "chips": sum(int(p.chips.sum()) for p in plans),
        "kept": sum(int(p.chips.sum()) for p in kept),
    }  # fmt: skip


STEPS = {"convert": _convert, "digests": _digests, "queries": _queries, "strata": _strata}


def main() -> None:
    sizes = [float(v) for v in sys.argv[1:]] or [0.05, 0.5, 5.0]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for millions in sizes:
            pbf, cache = Path(name, f"{millions:g}.osm.pbf"), Path(name, f"cache-{millions:g}")
            started = time.perf_counter()
            write_pbf(pbf, round(millions * 1e6))
            figures[f"{millions:g} M"] = {
                "write_pbf_s": round(time.perf_counter() - started, 1),
                **{step: _step(step, str(pbf), str(cache)) for step in STEPS},
            }
            print(json.dumps(figures[f"{millions:g} M"]), file=sys.stderr, flush=True)
    if len(sizes) > 1:
        whole = [round(s * 1e6) for s in sizes]
        of = [figures[f"{s:g} M"] for s in sizes]
        for step in STEPS:
            figures[f"growth of {step}"] = {
                what: growth(whole, [f[step][what] for f in of])
                for what in ("process_s", "peak_mb")
            }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        print(json.dumps(STEPS[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
