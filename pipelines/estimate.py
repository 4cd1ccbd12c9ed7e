"""What a build would do and cost, without doing it: shards and why, scenes, bytes, time, money.

Nothing is written, but in a temporary folder: an extract that has not been converted yet is
converted there, since which shards it changes cannot be known otherwise.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
from shapely.geometry.base import BaseGeometry

from pipelines import snapshot
from pipelines.files import Asset
from pipelines.plan import BlockSource, Plan, ShardTask, cache_folder, make_plan
from pipelines.reasons import differences
from pipelines.remote import is_remote
from pipelines.store import shard_attributes, shard_path
from pipelines.threads import side_by_side
from schemas.config import DatasetConfig
from schemas.dataset import SnapshotRow
from schemas.errors import GeoLinkError
from schemas.grid import Grid
from schemas.layout import LAYOUT
from schemas.storage import Location, storage

HOURS_PER_GIGAPIXEL = 0.05
BYTES_PER_PIXEL = 1.5
"""Rates where no earlier build tells: worker hours per 1e9 pixels, counted in every band, and bytes
of a shard per such pixel. As measured with 12 bands at 10 m (`docs/scale.md`)."""
HOURS_PER_SHARD = 1.0 / 3600
"""Opening files, masks, objects, writing, however few pixels. Measured rates hold it already."""
READ_SHARE = 0.6
"""Bytes read of a compressed raster per byte of its pixels."""
READ_REQUESTS = 3
"""Requests for one band of one scene over a block, where it is remote."""
WRITE_REQUESTS = 2 * len(LAYOUT) + 10
"""Files of a shard, each a request of an object store."""


@dataclass(frozen=True)
class Prices:
    """What things cost, in any currency."""

    gb_month: float = 0.0
    """Keeping 1e9 bytes for a month."""
    requests_1000: float = 0.0
    """A thousand requests, read or write."""
    worker_hour: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What a build would do."""

    dataset: Location
    shards: dict[str, str]
    """Shards to build, and why."""
    unchanged: int
    removed: int
    """Shards of the latest snapshot that are no part of the plan."""
    chips: int
    """Of the shards to build, before any is dropped for what its pixels show."""
    scenes: int
    """Distinct ones that may be read."""
    skipped: dict[str, int]
    named: dict[str, list[str]]
    """Which inputs those are, by code, where that is known."""
    read_bytes: int
    read_requests: int
    write_bytes: int
    write_requests: int
    worker_hours: float
    hours: float
    rates: str
    """Where the rates come from."""
    cost_once: float
    """Requests and worker hours."""
    cost_month: float
    """Keeping what is written."""

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "dataset": str(self.dataset)}


def estimate_build(
    config: DatasetConfig,
    *,
    workers: int = 1,
    within: BaseGeometry | None = None,
    prices: Prices | None = None,
) -> Estimate:
    """Plan a build and say what it would do.

    Bytes to read: masks of all candidate scenes, and the images of as many as are composited: one,
    or all for a median. Time and bytes to write: by the rates of the dataset's earlier builds, else
    by the figures above.

    Raises GeoLinkError for bad config or inputs.
    """
    prices = prices or Prices()
    with _copied_cache(cache_folder(config)) as cache:
        plan = make_plan(config.model_copy(update={"cache": cache}), within=within)
    before = {r.shard: r for r in snapshot.latest_rows(config.dataset)}
    shards = _reasons(config.dataset, plan, before)
    todo = [t for t in plan.tasks if t.shard in shards]
    planned = {t.shard for t in plan.tasks}
    pixels = sum(_pixels(t) for t in todo)
    hours, fixed, size, rates = _rates(config.dataset, plan)
    read, requests, scenes = _reading(todo)
    remote = isinstance(config.dataset, str)
    write_requests = WRITE_REQUESTS * len(todo) if remote else 0
    worker_hours = hours * pixels + fixed * len(todo)
    written = round(size * pixels)
    once = (requests + write_requests) / 1000 * prices.requests_1000
    return Estimate(
        config.dataset, shards, len(plan.tasks) - len(todo),
        0 if within is not None else len(before.keys() - planned),
        sum(_chips(t) for t in todo), scenes, plan.skipped, plan.named, read, requests, written,
        write_requests, worker_hours, worker_hours / max(1, min(workers, len(todo))), rates,
        once + worker_hours * prices.worker_hour, written / 1e9 * prices.gb_month,
    )  # fmt: skip


@contextmanager
def _copied_cache(cache: Path) -> Iterator[Path]:
    """A temporary cache with links to all that is in a cache; what is added to it is dropped."""
    with tempfile.TemporaryDirectory(prefix="geolink-dry-run-") as folder:
        copy = Path(folder)
        for path in (cache / "osm").rglob("*"):
            inside = path.relative_to(cache)
            if path.is_file() and not inside.parts[1].startswith("converting-"):
                (copy / inside).parent.mkdir(parents=True, exist_ok=True)
                os.symlink(path.resolve(), copy / inside)
        yield copy


def _reasons(dataset: Location, plan: Plan, before: Mapping[str, SnapshotRow]) -> dict[str, str]:
    """Shards to build, and why."""
    found = side_by_side(lambda task: _reason(dataset, task, before.get(task.shard)), plan.tasks)
    return {t.shard: why for t, why in zip(plan.tasks, found, strict=True) if why}


def _reason(dataset: Location, task: ShardTask, row: SnapshotRow | None) -> str:
    """Why a shard is to be built; empty: it is not."""
    files = storage(dataset)
    if row is not None and (row.key, row.split) == (task.key, task.split):
        whole = files.exists(f"{row.path}/zarr.json")
        return "" if whole else "missing: the snapshot names it, its files are gone"
    if files.exists(f"{shard_path(task.shard, task.key)}/zarr.json"):
        return "finished by an earlier run: only to be published"
    if row is None:
        return "new"
    try:
        made_from = shard_attributes(dataset, row.path)["made_from"]
    except (GeoLinkError, OSError, KeyError):
        return "changed; its predecessor cannot be read"
    return "; ".join(differences(made_from, task.made_from)) or "split changed"


def _chips(task: ShardTask) -> int:
    source = task.source
    return int(source.chips.sum()) if isinstance(source, BlockSource) else len(source.pairs)


def _pixels(task: ShardTask) -> int:
    """Pixels of a shard's chips, counted in every band."""
    return _chips(task) * task.info.grid.size**2 * len(task.info.sensor.bands)


def _rates(dataset: Location, plan: Plan) -> tuple[float, float, float, str]:
    """Worker hours per pixel and per shard, bytes per pixel, and where that comes from."""
    grid, bands = plan.info.grid, len(plan.info.sensor.bands)
    with _catalog(dataset) as path:
        if path is not None:
            try:
                with duckdb.connect(str(path), read_only=True) as con:
                    row = con.execute(
                        "SELECT count(*), sum(seconds), sum(bytes), sum(chips) FROM shards "
                        "WHERE state = 'built' AND chips > 0 AND seconds > 0"
                    ).fetchone()
            except duckdb.Error:
                row = None
            if row and row[0]:
                count, seconds, size, chips = row
                pixels = chips * grid.size**2 * bands
                return seconds / 3600 / pixels, 0.0, size / pixels, f"measured on {count:,} shards"
    rates = "assumed: no shard has been built yet; converting an extract comes on top"
    return HOURS_PER_GIGAPIXEL / 1e9, HOURS_PER_SHARD, BYTES_PER_PIXEL, rates


@contextmanager
def _catalog(dataset: Location) -> Iterator[Path | None]:
    """The dataset's catalog as a file; None where there is none."""
    files = storage(dataset)
    if not files.exists("catalog.duckdb"):
        yield None
    elif isinstance(dataset, Path):
        yield dataset / "catalog.duckdb"
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "catalog.duckdb"
            path.write_bytes(files.read("catalog.duckdb"))
            yield path


def _reading(tasks: list[ShardTask]) -> tuple[int, int, int]:
    """Bytes to read, requests for them, and how many scenes they come from."""
    total: Counter[str] = Counter()
    scenes: set[str] = set()
    for task in tasks:
        if not isinstance(task.source, BlockSource):
            continue
        source, grid = task.source, task.info.grid
        used = len(source.scenes) if source.rules.composite == "median" else 1
        itemsize = 2 if task.info.sensor.dtype == "uint16" else 1
        for rank, scene in enumerate(source.scenes):
            assets = [(a, itemsize) for a in (scene.bands if rank < used else ())]
            assets += [(scene.mask, 1)] if scene.mask is not None else []
            for asset, size in assets:
                total["bytes"] += round(_block_pixels(asset, grid) * size * READ_SHARE)
                total["requests"] += READ_REQUESTS if is_remote(asset.href) else 0
            scenes |= {scene.id} if assets else set()
    return total["bytes"], total["requests"], len(scenes)


def _block_pixels(asset: Asset, grid: Grid) -> int:
    """Pixels of a file over a block, at its own spacing where that is known, in metres."""
    side_m = grid.size * grid.shard_side * grid.gsd_m
    step = abs(asset.transform[0]) if asset.transform else grid.gsd_m
    return round((side_m / (step if step > 0.01 else grid.gsd_m)) ** 2)
