"""What differs between two snapshots of a dataset, or between two datasets on the same grid.

Shards of the same key and bytes are not read. An object is compared chip by chip, under its typed
OSM id: the parts of one OSM object in a chip count as one. It is changed if its parts have other
tags, classes or kinds, or another size or position than tolerances allow.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.reasons import differences
from pipelines.store import shard_attributes
from schemas.dataset import DatasetInfo, Snapshot, SnapshotRow, read_arrays, read_snapshot
from schemas.errors import GeoLinkError
from schemas.storage import Location

SIZE_TOLERANCE = 1e-3
"""Relative; sizes are stored as float32."""
POSITION_TOLERANCE_M = 0.1
"""Of the mean of an object's anchors."""

_OBJECTS = (
    "chip_id", "object_offset", "object_kind", "object_class", "object_osm", "object_size",
    "object_anchor", "object_tag_offset", "object_tag", "tag",
)  # fmt: skip
_CHIPS = ("image", "label_pixel", "label_patch")
Arrays = dict[str, NDArray[Any]]


@dataclass
class Tally:
    """Objects by what became of them, each by class."""

    added: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    unchanged: Counter[str] = field(default_factory=Counter)
    """In shards that were read."""
    changed_in: Counter[str] = field(default_factory=Counter)
    """Changed objects by what differs: tags, class, kind, parts, size, position."""


@dataclass
class Difference:
    """From one snapshot to another."""

    before: tuple[str, int]
    """Address and snapshot."""
    after: tuple[str, int]
    contract: dict[str, tuple[Any, Any]]
    """Fields of `dataset.json` that differ: before and after."""
    shards_added: list[str] = field(default_factory=list)
    shards_removed: list[str] = field(default_factory=list)
    shards_rebuilt: dict[str, list[str]] = field(default_factory=dict)
    """By shard: why."""
    shards_unchanged: int = 0
    shards_moved: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Shards in another split: before and after."""
    chips_added: int = 0
    chips_removed: int = 0
    chips_changed: dict[str, int] = field(default_factory=dict)
    """Chips of both sides, by array that differs."""
    objects: Tally = field(default_factory=Tally)
    scenes_added: list[str] = field(default_factory=list)
    scenes_removed: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether nothing that a reader sees differs."""
        shards = (self.shards_added, self.shards_removed, self.shards_rebuilt, self.shards_moved)
        return not (any(shards) or self.contract)


def diff(
    before: tuple[Location, int | None],
    after: tuple[Location, int | None],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compare two snapshots, each (dataset, number; none: the latest).

    Raises GeoLinkError: no such snapshot, datasets on different grids, or a damaged shard.
    """
    a, b = read_snapshot(*before), read_snapshot(*after)
    if a.info.grid != b.info.grid:
        raise GeoLinkError(
            f"{before[0]} and {after[0]} have different grids, so that their chips cannot be "
            "compared; compare datasets of the same gsd_m, size, patch and shard_side"
        )
    result = Difference(
        (str(before[0]), a.number), (str(after[0]), b.number), contract_changes(a.info, b.info)
    )
    rows_a, rows_b = _by_shard(a), _by_shard(b)
    result.shards_added = sorted(rows_b.keys() - rows_a.keys())
    result.shards_removed = sorted(rows_a.keys() - rows_b.keys())
    common = sorted(rows_a.keys() & rows_b.keys())
    for shard in common:
        if rows_a[shard].split != rows_b[shard].split:
            result.shards_moved[shard] = (rows_a[shard].split, rows_b[shard].split)
    other = [s for s in common if not _same(rows_a[s], rows_b[s])]
    result.shards_unchanged = len(common) - len(other)
    for shard in other:
        result.shards_rebuilt[shard] = _why(before[0], rows_a[shard], after[0], rows_b[shard])
    result.scenes_added, result.scenes_removed = _scenes(a.rows, b.rows)
    todo = sorted([*result.shards_added, *result.shards_removed, *other])
    for done, shard in enumerate(todo, start=1):
        sides = [
            (location, rows[shard]) if shard in rows else None
            for location, rows in ((before[0], rows_a), (after[0], rows_b))
        ]
        _compare_shard(sides, a.info, b.info, result)
        if progress:
            progress(done, len(todo))
    return result


def contract_changes(before: DatasetInfo, after: DatasetInfo) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, with both values."""
    a, b = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {name: (a.get(name), b.get(name)) for name in b if a.get(name) != b.get(name)}


def _by_shard(snapshot: Snapshot) -> dict[str, SnapshotRow]:
    return {row.shard: row for row in snapshot.rows}


def _same(a: SnapshotRow, b: SnapshotRow) -> bool:
    return (a.key, a.checksum) == (b.key, b.checksum)


def _why(a: Location, row_a: SnapshotRow, b: Location, row_b: SnapshotRow) -> list[str]:
    """Why a shard was rebuilt, from what its content keys were made of."""
    if row_a.key == row_b.key:
        return ["it has other bytes than before from the same inputs: one of both is damaged"]
    made = [shard_attributes(d, r.path)["made_from"] for d, r in ((a, row_a), (b, row_b))]
    return differences(*made)


def _scenes(a: Iterable[SnapshotRow], b: Iterable[SnapshotRow]) -> tuple[list[str], list[str]]:
    before, after = ({s for row in rows for s in row.scenes} for rows in (a, b))
    return sorted(after - before), sorted(before - after)


def _compare_shard(
    sides: list[tuple[Location, SnapshotRow] | None],
    info_a: DatasetInfo,
    info_b: DatasetInfo,
    result: Difference,
) -> None:
    names = [*_OBJECTS, *_CHIPS] if None not in sides else _OBJECTS
    a, b = (read_arrays(side[0], side[1].path, names)[0] if side else None for side in sides)
    # Chips numbered alike on both sides, so that objects can be keyed by them.
    ids = [_chips(a), _chips(b)]
    every, number = np.unique(np.concatenate(ids), axis=0, return_inverse=True)
    chip_a, chip_b = np.split(number.reshape(-1), [len(ids[0])])
    common, at_a, at_b = np.intersect1d(chip_a, chip_b, assume_unique=True, return_indices=True)
    result.chips_added += len(chip_b) - len(common)
    result.chips_removed += len(chip_a) - len(common)
    if a is not None and b is not None:
        differ = {name: _differ(a[name], b[name], at_a, at_b) for name in _CHIPS}
        for name, mask in differ.items():
            result.chips_changed[name] = result.chips_changed.get(name, 0) + int(mask.sum())
    classes = sorted({*info_a.taxonomy.names, *info_b.taxonomy.names})
    _tally(
        _objects(a, chip_a, info_a, classes), _objects(b, chip_b, info_b, classes), len(every),
        [*classes, "none"], result.objects,
    )  # fmt: skip


def _chips(arrays: Arrays | None) -> NDArray[np.int64]:
    """[N, 2] identity of chips."""
    return np.zeros((0, 2), np.int64) if arrays is None else arrays["chip_id"].view(np.int64)


def _differ(
    a: NDArray[Any], b: NDArray[Any], at_a: NDArray[np.int64], at_b: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which of the chips that both sides have differ in an array [chip, ...]."""
    if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
        return np.ones(len(at_a), bool)
    differ: NDArray[np.bool_] = (a[at_a] != b[at_b]).reshape(len(at_a), -1).any(axis=1)
    return differ


class _Objects(NamedTuple):
    """The K OSM objects of a shard's chips, all parts in a chip as one."""

    chip: NDArray[np.int64]
    osm: NDArray[np.int64]
    """Typed id; negative: made of what the object is, where it has none."""
    osm_class: NDArray[np.int64]
    """Index into the classes of both sides."""
    kinds: NDArray[np.uint8]
    """Bits of the kinds of its parts."""
    parts: NDArray[np.int64]
    tags: NDArray[np.uint64]
    """Hash of its tags."""
    size: NDArray[np.float64]
    """m2 or m, of all parts."""
    centre: NDArray[np.float64]
    """[K, 2] metres within the chip, mean of the parts' anchors."""


def _objects(
    arrays: Arrays | None, chip_number: NDArray[np.int64], info: DatasetInfo, classes: list[str]
) -> _Objects:
    if arrays is None or not len(arrays["object_osm"]):
        none = np.zeros(0, np.int64)
        return _Objects(
            none, none, none, none.astype(np.uint8), none, none.astype(np.uint64),
            np.zeros(0), np.zeros((0, 2)),
        )  # fmt: skip
    a = arrays
    chip = np.repeat(chip_number, np.diff(a["object_offset"]))
    code = np.array([len(classes), *(classes.index(name) for name in info.taxonomy.names)])
    osm_class = code[a["object_class"]]
    # Sums wrap around; differences of them do too.
    total = np.r_[np.uint64(0), np.cumsum(_mixed(a["tag"])[a["object_tag"]], dtype=np.uint64)]
    tags = total[a["object_tag_offset"][1:]] - total[a["object_tag_offset"][:-1]]
    centre = a["object_anchor"].astype(np.float64).mean(axis=1) * info.grid.chip_m
    place = np.floor(centre / POSITION_TOLERANCE_M).astype(np.int64).view(np.uint64)
    own = _mixed(tags + _mixed(place[:, 0] + _mixed(place[:, 1]) + osm_class.astype(np.uint64)))
    unknown = a["object_osm"] >> 2 == 0
    osm = np.where(unknown, -1 - (own >> np.uint64(2)).astype(np.int64), a["object_osm"])
    order = np.lexsort((osm, chip))
    chip, osm = chip[order], osm[order]
    start = np.flatnonzero(np.r_[True, (chip[1:] != chip[:-1]) | (osm[1:] != osm[:-1])])
    parts = np.diff(np.r_[start, len(osm)])
    return _Objects(
        chip[start], osm[start],
        np.maximum.reduceat(osm_class[order], start),
        np.bitwise_or.reduceat(np.uint8(1) << a["object_kind"][order], start),
        parts,
        np.maximum.reduceat(tags[order], start),
        np.add.reduceat(a["object_size"][order].astype(np.float64), start),
        np.add.reduceat(centre[order], start) / parts[:, None],
    )  # fmt: skip


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Values with their bits spread (the finaliser of SplitMix64): sums of them seldom meet."""
    x = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _tally(a: _Objects, b: _Objects, chips: int, classes: list[str], tally: Tally) -> None:
    """Count what became of the objects of two sides."""
    _, rank = np.unique(np.concatenate([a.osm, b.osm]), return_inverse=True)
    key = rank.reshape(-1) * max(chips, 1) + np.concatenate([a.chip, b.chip])
    key_a, key_b = np.split(key, [len(a.osm)])
    _, i, j = np.intersect1d(key_a, key_b, assume_unique=True, return_indices=True)
    gone, new = np.ones(len(key_a), bool), np.ones(len(key_b), bool)
    gone[i], new[j] = False, False
    larger = np.maximum(a.size[i], b.size[j])
    moved = np.hypot(*(a.centre[i] - b.centre[j]).T)
    differs = {
        "tags": a.tags[i] != b.tags[j],
        "class": a.osm_class[i] != b.osm_class[j],
        "kind": a.kinds[i] != b.kinds[j],
        "parts": a.parts[i] != b.parts[j],
        "size": np.abs(a.size[i] - b.size[j]) > SIZE_TOLERANCE * larger,
        "position": moved > POSITION_TOLERANCE_M,
    }
    changed = np.logical_or.reduce(list(differs.values()))
    for name, mask in differs.items():
        tally.changed_in[name] += int(mask.sum())
    for counter, codes in (
        (tally.removed, a.osm_class[gone]), (tally.added, b.osm_class[new]),
        (tally.changed, b.osm_class[j][changed]), (tally.unchanged, b.osm_class[j][~changed]),
    ):  # fmt: skip
        for code, count in enumerate(np.bincount(codes, minlength=len(classes)).tolist()):
            if count:
                counter[classes[code]] += count
