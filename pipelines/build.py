"""One shard in five steps, and a dataset as many shards and one publish."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from pipelines import catalog, snapshot, store, tags
from pipelines.alignment import align, shift_m
from pipelines.anchors import build_anchors
from pipelines.checks import check_chips
from pipelines.correspondence import build_correspondence
from pipelines.execute import Failure, run_tasks
from pipelines.inputs import Inputs, read_inputs
from pipelines.labels import cut_labels, densities
from pipelines.objects import Objects, clip
from pipelines.plan import ShardTask, make_plan
from pipelines.relations import build_relations
from pipelines.statistics import patch_brightness, statistics
from schemas.config import DatasetConfig
from schemas.dataset import DatasetInfo, SnapshotRow
from schemas.errors import GeoLinkError
from schemas.storage import Location, storage

Arrays = dict[str, NDArray[Any]]


def build_shard(task: ShardTask) -> SnapshotRow:
    """Build and store one shard; one that is stored already under the same key is adopted.

    Raises GeoLinkError if the shard cannot be written.
    """
    stored = store.adopt_shard(task.dataset, task.shard, task.key)
    if stored is not None:
        return _row(task, stored)
    aligned = align(task, read_inputs(task))
    inputs = aligned.inputs
    objects = clip(inputs.features, inputs.arrays["bounds"], task.info.objects, frame=inputs.frame)
    indices = build_indices(inputs, objects, task.info)
    labels = build_labels(inputs, objects, task.info)
    arrays: Arrays = {**inputs.arrays, **objects.arrays(), **indices, **labels}
    arrays["shift"] = shift_m(task, aligned)
    arrays["finding"], found = check_chips(arrays, aligned.shift, inputs.seam, task.info)
    counts = Counter(task.counts)
    for part in (inputs.counts, inputs.features.counts, objects.counts, aligned.counts, found):
        counts.update(part)
    attributes = _attributes(task, inputs, arrays, counts) | {"moved_m": aligned.moved_m}
    stored = store.write_shard(task.dataset, task.shard, task.key, arrays, attributes, task.info)
    return _row(task, stored)


def build_indices(inputs: Inputs, objects: Objects, info: DatasetInfo) -> Arrays:
    """Tags, relations, anchors and object-patch correspondence of a shard's objects."""
    bounds = inputs.arrays["bounds"]
    geometry, chip, kind = objects.geometry, objects.chip, objects.kind
    return {
        **tags.tag_arrays(inputs.features, objects),
        **build_relations(geometry, chip, kind, objects.chips),
        "object_anchor": build_anchors(geometry, kind, chip, bounds),
        **build_correspondence(geometry, kind, chip, bounds, info.grid.patches),
    }


def build_labels(inputs: Inputs, objects: Objects, info: DatasetInfo) -> Arrays:
    """Labels of pixels, patches and regions from one raster, and their spatial statistics."""
    classes = len(info.taxonomy.classes)
    grid = info.grid
    labels: Arrays = cut_labels(inputs.raster, *inputs.lattice, grid.size, grid.patch, classes)
    labels = {name: array[inputs.kept] for name, array in labels.items()}
    fraction = labels.pop("patch_fraction")
    brightness = patch_brightness(inputs.arrays["image"], grid.patch, info.sensor.nodata)
    moran, lee = statistics(fraction, brightness)
    line, point = densities(
        objects.kind,
        objects.osm_class,
        objects.size,
        objects.chip,
        inputs.arrays["bounds"],
        classes,
    )
    return {**labels, "moran": moran, "lee": lee, "line_density": line, "point_density": point}


def _attributes(
    task: ShardTask, inputs: Inputs, arrays: Arrays, counts: Counter[str]
) -> dict[str, object]:
    """What a snapshot row needs beyond sizes; kept in the shard, so that it can be adopted."""
    image = arrays["image"]
    valid = image != task.info.sensor.nodata
    wide = np.where(valid, image, 0).astype(np.float64)
    lonlat = arrays["center_lonlat"]
    half = np.abs(arrays["bounds"][:, 2] - arrays["bounds"][:, 0]) / 2 / 111_320.0
    box = [0.0, 0.0, 0.0, 0.0]
    if len(lonlat):
        half_lon = half / np.cos(np.radians(lonlat[:, 1]))
        box = [
            float((lonlat[:, 0] - half_lon).min()), float((lonlat[:, 1] - half).min()),
            float((lonlat[:, 0] + half_lon).max()), float((lonlat[:, 1] + half).max()),
        ]  # fmt: skip
    axes = (0, 2, 3)
    return {
        "epsg": int(arrays["epsg"][0]) if len(lonlat) else 0,
        "bounds_lonlat": box,
        "scenes": inputs.scenes,
        "radiometry": inputs.radiometry,
        "considered": inputs.considered,
        "pixels": valid.sum(axis=axes).tolist(),
        "pixel_sum": wide.sum(axis=axes).tolist(),
        "pixel_sum_squares": np.einsum("nbyx,nbyx->b", wide, wide).tolist(),
        "made_from": task.made_from,
        "chip_findings": arrays["finding"].tolist(),
        "qc": {k: int(v) for k, v in sorted(counts.items()) if v},
    }


def _row(task: ShardTask, stored: store.StoredShard) -> SnapshotRow:
    a = stored.attributes
    return SnapshotRow(
        shard=task.shard, path=stored.path, key=task.key, checksum=stored.checksum,
        split=task.split, chips=stored.sizes["chip"], objects=stored.sizes["object"],
        edges=stored.sizes["edge"], bytes=stored.bytes, epsg=a["epsg"],
        bounds_lonlat=a["bounds_lonlat"], scenes=a["scenes"], osm_timestamp=task.osm_timestamp,
        pixels=a["pixels"], pixel_sum=a["pixel_sum"], pixel_sum_squares=a["pixel_sum_squares"],
        qc=a["qc"], chip_findings=a["chip_findings"],
    )  # fmt: skip


@dataclass
class BuildResult:
    """What a build did."""

    dataset: Location
    snapshot: int | None
    published: bool
    built: int = 0
    unchanged: int = 0
    removed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    rows: list[SnapshotRow] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)
    """Which inputs were skipped, by code, where that is known."""
    seconds: float = 0.0

    @property
    def qc(self) -> dict[str, int]:
        """Findings summed over shards and inputs."""
        total = Counter(self.skipped)
        for row in self.rows:
            total.update(row.qc)
        return dict(sorted(total.items()))


Progress = Callable[[int, int, SnapshotRow | None], None]
"""Called with shards done, shards to do, and the row just finished (None if it failed)."""


def build_dataset(
    config: DatasetConfig,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    within: BaseGeometry | None = None,
    change: bool = False,
    partial: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Plan, build what is missing, publish a snapshot. Safe to run again, to kill, to run twice.

    within: rebuild only shards that meet this geometry (degrees); the others stay as they are.
    change: the dataset may get another contract (sensor, taxonomy, ...) than it has.
    A shard that fails is reported and the rest is built; then nothing is published, unless
    `partial` (a failed shard then stays as it was, or out), and the next run needs to build only
    the failed ones.

    Raises GeoLinkError for bad config or inputs, or a target that cannot be written.
    """
    started = time.time()
    plan = make_plan(config, within=within)
    # Shards of two contracts cannot stand in one snapshot: a part of a region may not change it.
    store.prepare_dataset(config.dataset, plan.info, change=change and within is None)
    before = {r.shard: r for r in snapshot.latest_rows(config.dataset)}
    built = {t.shard: t for t in plan.tasks if _is_built(t, before)}
    # The same objects in a newer extract are the same shard, known to hold at a later time.
    rows = [before[s]._replace(osm_timestamp=t.osm_timestamp) for s, t in built.items()]
    todo = [t for t in plan.tasks if t.shard not in built]
    result = BuildResult(
        config.dataset, None, False, unchanged=len(rows), skipped=plan.skipped, named=plan.named
    )
    seconds: dict[str, float] = {}
    pending = todo
    while pending:
        outcomes = run_tasks(build_shard, pending, workers=workers, scheduler=scheduler)
        for done, (task, outcome, seconds[task.shard]) in enumerate(outcomes, start=1):
            row = None if isinstance(outcome, Failure) else outcome
            if isinstance(outcome, Failure):
                result.failed[task.shard] = outcome.reason
            else:
                rows.append(outcome)
            if progress:
                progress(done, len(pending), row)
        # A shard that no snapshot names yet may have been removed by `geolink gc` meanwhile.
        lost = store.lost_shards(config.dataset, rows)
        rows = [row for row in rows if row.shard not in lost]
        pending = [task for task in plan.tasks if task.shard in lost]
    result.built = len(todo) - len(result.failed)
    result.rows = sorted(rows, key=lambda r: r.shard)
    if partial or not result.failed:
        planned = {t.shard for t in plan.tasks} - set(result.failed)
        _publish(config, plan.info, result, None if within is None else planned)
    result.seconds = time.time() - started
    catalog.record_build(config, plan, result, seconds, started)
    return result


def _is_built(task: ShardTask, before: dict[str, SnapshotRow]) -> bool:
    """Whether the latest snapshot holds this shard, of the same inputs and split."""
    row = before.get(task.shard)
    if row is None or (row.key, row.split) != (task.key, task.split):
        return False
    return storage(task.dataset).exists(f"{row.path}/zarr.json")


def _publish(
    config: DatasetConfig, info: DatasetInfo, result: BuildResult, planned: set[str] | None
) -> None:
    """Publish the result's rows; beside them, shards outside `planned` stay as they are now.

    Where another build publishes in between, what it published is taken as the new base.
    """
    own = result.rows
    while True:
        latest = snapshot.latest(config.dataset)
        there = latest.rows if latest else []
        kept = [
            r for r in there
            if r.shard in result.failed or (planned is not None and r.shard not in planned)
        ]  # fmt: skip
        result.rows = sorted([*own, *kept], key=lambda r: r.shard)
        result.removed = len({r.shard for r in there} - {r.shard for r in result.rows})
        if not any(r.chips for r in result.rows):
            raise GeoLinkError(
                f"no chip is left to publish in {config.dataset} ({_shown(result.qc)}); check that "
                "scenes cover the region, and min_valid"
            )
        vocabulary = tags.write_vocabulary(config.dataset, result.rows, config.tag_encoder)
        try:
            result.snapshot, result.published = snapshot.publish(
                config.dataset, result.rows, vocabulary, info,
                base=latest.number if latest else 0,
            )  # fmt: skip
        except snapshot.SnapshotExists:
            continue
        store.write_info(config.dataset, info)
        return


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{k}: {v:,}" for k, v in counts.items()) or "no findings"
