"""What only the shards themselves tell: distributions over chips, gathered a shard at a time.

Counts are added up as shards go by, so memory does not grow with the dataset. Of a large dataset
shards are drawn evenly along the order of their ids.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.dataset import DatasetInfo, SnapshotRow, read_arrays
from schemas.findings import SURE
from schemas.layout import UNKNOWN_TIME
from schemas.storage import Location

SHARDS = 1000
"""Shards that are read at most."""
SHARE_BINS = 20
OBJECT_EDGES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
"""Lower edges of the bins of objects per chip; the last is open."""
SHIFT_STEP_PX, SHIFT_BINS = 0.25, 24
_NAMES = ("valid", "time", "scene", "object_offset", "label_region", "shift")
_THREADS = 8

Counts = NDArray[np.int64]


@dataclass
class SceneLine:
    """A scene over the shards that were looked at."""

    considered: int = 0
    used: int = 0
    cloud: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Sum and number of its masked shares over shards."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why it was not used."""


@dataclass
class Survey:
    """Counts over the shards that were read."""

    shards: int = 0
    of: int = 0
    """Shards with chips in the snapshot."""
    chips: int = 0
    valid: Counts = field(default_factory=lambda: np.zeros(SHARE_BINS, np.int64))
    objects: Counts = field(default_factory=lambda: np.zeros(len(OBJECT_EDGES), np.int64))
    shift: Counts = field(default_factory=lambda: np.zeros(SHIFT_BINS + 1, np.int64))
    """By length in steps of `SHIFT_STEP_PX` pixels, of chips whose shift is sure; last: more."""
    shift_sum_m: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    """East and north, over chips whose shift is sure."""
    months: Counter[str] = field(default_factory=Counter)
    """Chips by month of acquisition, `2024-06`; empty: unknown."""
    cloud_used: Counts = field(default_factory=lambda: np.zeros(SHARE_BINS, np.int64))
    """Scenes by masked share of a shard, those that gave pixels."""
    cloud_unused: Counts = field(default_factory=lambda: np.zeros(SHARE_BINS, np.int64))
    area: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Sum over chips of each class's share of the area."""
    scenes: dict[str, SceneLine] = field(default_factory=dict)
    scene_seconds: dict[str, int] = field(default_factory=dict)
    """When scenes that gave pixels were taken, Unix seconds."""
    stages: dict[str, Counter[str]] = field(default_factory=dict)
    """By stage of the code: shards by its version."""
    settings: dict[str, Counter[str]] = field(default_factory=dict)
    """By option of a shard's inputs: shards by value."""
    radiometry: Counter[str] = field(default_factory=Counter)


def drawn(rows: Iterable[SnapshotRow], most: int = SHARDS) -> list[SnapshotRow]:
    """At most so many shards with chips, evenly along their order."""
    kept = [row for row in rows if row.chips]
    if len(kept) <= most:
        return kept
    return [kept[i * len(kept) // most] for i in range(most)]


def survey(dataset: Location, rows: list[SnapshotRow], info: DatasetInfo) -> Survey:
    """Read the drawn shards and add them up.

    Raises GeoLinkError naming a shard that is missing or damaged.
    """
    found = Survey(of=sum(row.chips > 0 for row in rows))
    found.area = np.zeros(len(info.taxonomy.classes))
    with ThreadPoolExecutor(_THREADS) as pool:
        chosen = drawn(rows)
        for first in range(0, len(chosen), 4 * _THREADS):
            some = chosen[first : first + 4 * _THREADS]
            for arrays, attributes in pool.map(
                lambda row: read_arrays(dataset, row.path, _NAMES), some
            ):
                _add_chips(found, arrays, info.grid.gsd_m)
                _add_scenes(found, arrays, attributes)
                _add_origin(found, attributes.get("made_from", {}))
                found.radiometry.update(set(attributes.get("radiometry", {}).values()))
    return found


def _add_chips(found: Survey, arrays: Mapping[str, NDArray[Any]], gsd_m: float) -> None:
    found.shards += 1
    found.chips += len(arrays["valid"])
    found.valid += _shares(arrays["valid"])
    objects = np.diff(arrays["object_offset"])
    bins = np.searchsorted(OBJECT_EDGES, objects, "right") - 1
    found.objects += np.bincount(bins, minlength=len(OBJECT_EDGES))
    sure = arrays["shift"][arrays["shift"][:, 2] >= SURE, :2].astype(np.float64)
    steps = np.hypot(*sure.T) / gsd_m // SHIFT_STEP_PX
    found.shift += np.bincount(
        np.minimum(steps, SHIFT_BINS).astype(np.int64), minlength=SHIFT_BINS + 1
    )
    found.shift_sum_m += sure.sum(axis=0)
    found.area += arrays["label_region"].sum(axis=0, dtype=np.float64)
    time = arrays["time"]
    months, count = np.unique(
        time[time != UNKNOWN_TIME].astype("M8[s]").astype("M8[M]"), return_counts=True
    )
    found.months.update(dict(zip(months.astype(str).tolist(), count.tolist(), strict=True)))
    unknown = int((time == UNKNOWN_TIME).sum())
    if unknown:
        found.months[""] += unknown


def _add_scenes(
    found: Survey, arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]
) -> None:
    for record in attributes.get("considered", []):
        line = found.scenes.setdefault(str(record["scene"]), SceneLine())
        line.considered += 1
        if record["chosen"]:
            line.used += 1
        else:
            line.reasons[str(record["reason"])] += 1
        if record["cloud"] is not None:
            line.cloud[0] += record["cloud"]
            line.cloud[1] += 1
            bins = found.cloud_used if record["chosen"] else found.cloud_unused
            bins += _shares(np.array([record["cloud"]]))
    scene, time = arrays["scene"], arrays["time"]
    for index in np.unique(scene[(scene >= 0) & (time != UNKNOWN_TIME)]).tolist():
        name = attributes["scenes"][index]
        found.scene_seconds.setdefault(name, int(time[scene == index].min()))


def _add_origin(found: Survey, made_from: Mapping[str, Any]) -> None:
    for stage, version in made_from.get("stages", {}).items():
        found.stages.setdefault(stage, Counter())[str(version)] += 1
    inputs = made_from.get("inputs", {})
    for name in ("min_valid", "registration"):
        if name in inputs:
            found.settings.setdefault(name, Counter())[str(inputs[name])] += 1
    for name, value in inputs.get("rules", {}).items():
        found.settings.setdefault(name, Counter())[str(value)] += 1


def _shares(share: NDArray[Any]) -> Counts:
    """Counts of numbers in [0, 1] by bin."""
    bins = np.clip((share * SHARE_BINS).astype(np.int64), 0, SHARE_BINS - 1)
    return np.bincount(bins, minlength=SHARE_BINS)
