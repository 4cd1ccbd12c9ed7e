"""Why a shard or a chip is as it is: its inputs, its past, and what a rebuild would change."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import shapely

from pipelines.plan import make_plan
from pipelines.reasons import differences
from pipelines.store import shard_attributes
from schemas.config import DatasetConfig
from schemas.dataset import (
    Snapshot,
    SnapshotRow,
    read_arrays,
    read_snapshot,
    snapshot_numbers,
)
from schemas.errors import GeoLinkError
from schemas.grid import block_of, chip_name, parse_chip, unpack_chip
from schemas.storage import Location, storage


@dataclass(frozen=True)
class Explanation:
    """What is known of a shard."""

    row: SnapshotRow
    made_from: dict[str, Any]
    """Preimage of the content key: digests of the contract, stage versions, inputs."""
    considered: list[dict[str, Any]]
    """Scenes looked at when it was built: chosen or not, and why."""
    radiometry: dict[str, str]
    """By scene: the offset that was added, and why."""
    past: list[tuple[int, str]]
    """(snapshot, what made it another shard than in the one before), newest first."""
    chip: dict[str, Any] | None
    """Of the chip that was asked for."""
    rebuild: list[str] | None
    """What a rebuild from the config would differ in; none: no config was given."""


def explain(
    dataset: Location,
    name: str,
    *,
    snapshot: int | None = None,
    config: DatasetConfig | None = None,
) -> Explanation:
    """Explain a shard (`32632-00012-00345`) or a chip (`32632-10000-64-1234-56789`).

    Raises GeoLinkError if the snapshot has no such shard or chip.
    """
    found = read_snapshot(dataset, snapshot)
    row = _row(found, name)
    attributes = shard_attributes(dataset, row.path)
    rebuild = None
    if config is not None:
        rebuild = _rebuild(config, row, attributes["made_from"])
    return Explanation(
        row,
        attributes["made_from"],
        attributes.get("considered", []),
        attributes.get("radiometry", {}),
        _past(dataset, row.shard, found.number),
        None if name == row.shard else _chip(dataset, row, name, attributes),
        rebuild,
    )


def _row(snapshot: Snapshot, name: str) -> SnapshotRow:
    by_shard = {r.shard: r for r in snapshot.rows}
    if name in by_shard:
        return by_shard[name]
    if name.count("-") == 4:
        shard = block_of(snapshot.info.grid, parse_chip(name)).name
        if shard in by_shard:
            return by_shard[shard]
    raise GeoLinkError(
        f"snapshot {snapshot.number} has no shard or chip {name!r}; shards are named "
        "zone-column-row, chips zone-gsd_mm-size-column-row"
    )


def _chip(
    dataset: Location, row: SnapshotRow, name: str, attributes: dict[str, Any]
) -> dict[str, Any]:
    """Identity, scene, validity, objects and findings of one chip."""
    names = ("chip_id", "bounds", "center_lonlat", "time", "scene", "valid", "object_offset",
             "finding", "shift")  # fmt: skip
    arrays, _ = read_arrays(dataset, row.path, names)
    ids = [chip_name(unpack_chip(packed)) for packed in arrays["chip_id"]]
    if name not in ids:
        raise GeoLinkError(
            f"chip {name} is not in its shard {row.shard}: outside the region, below min_valid, "
            "dropped for a finding, or within the buffer of another split"
        )
    n = ids.index(name)
    scene, time = int(arrays["scene"][n]), int(arrays["time"][n])
    unknown = time == np.iinfo(np.int64).min
    return {
        "chip": name,
        "number_in_shard": n,
        "bounds_utm": arrays["bounds"][n].tolist(),
        "center_lonlat": arrays["center_lonlat"][n].round(6).tolist(),
        "acquired": None if unknown else str(np.datetime64(time, "s")),
        "scene": attributes["scenes"][scene] if scene >= 0 else None,
        "valid": float(arrays["valid"][n]),
        "objects": int(np.diff(arrays["object_offset"])[n]),
        "finding_bits": int(arrays["finding"][n]),
        "shift_m": arrays["shift"][n].tolist(),
    }


def _past(dataset: Location, shard: str, upto: int) -> list[tuple[int, str]]:
    """When the shard changed, and why, as far back as snapshots are kept."""
    states: list[tuple[int, SnapshotRow | None]] = []
    for number in (n for n in snapshot_numbers(dataset) if n <= upto):
        rows = read_snapshot(dataset, number).rows
        states.append((number, next((r for r in rows if r.shard == shard), None)))
    events = []
    for (_, before), (number, after) in pairwise([(0, None), *states]):
        if before is None and after is not None:
            events.append((number, "first built"))
        elif before is not None and after is None:
            events.append((number, "left out"))
        elif before is not None and after is not None and before.key != after.key:
            events.append((number, _changed(dataset, before, after)))
    return events[::-1]


def _changed(dataset: Location, before: SnapshotRow, after: SnapshotRow) -> str:
    if not storage(dataset).exists(f"{before.path}/zarr.json"):
        return "rebuilt; the shard before is no longer kept, so why cannot be told"
    old, new = (shard_attributes(dataset, r.path)["made_from"] for r in (before, after))
    return "; ".join(differences(old, new))


def _rebuild(config: DatasetConfig, row: SnapshotRow, made_from: dict[str, Any]) -> list[str]:
    west, south, east, north = row.bounds_lonlat
    near = shapely.box(west, south, east, north) if row.chips else None
    plan = make_plan(config, within=near)
    task = next((t for t in plan.tasks if t.shard == row.shard), None)
    return ["the shard is left out"] if task is None else differences(made_from, task.made_from)
