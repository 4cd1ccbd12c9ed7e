"""Is a dataset what was published? Checksums, layout, invariants; a sample built anew from sources.

Shards are read once, a few at a time, whatever their number.
"""

import io
import json
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.build import build_shard
from pipelines.certificates import snapshot_checksum
from pipelines.invariants import shard_faults
from pipelines.plan import make_plan
from pipelines.reasons import differences
from pipelines.store import checksum, read_files, shard_attributes
from pipelines.tags import tag_id
from pipelines.threads import side_by_side
from schemas.chunks import read_array
from schemas.config import DatasetConfig
from schemas.dataset import (
    Snapshot,
    SnapshotRow,
    certificate_name,
    read_info,
    read_snapshot,
    snapshot_name,
    snapshot_numbers,
    tag_table_name,
    vocabulary_name,
)
from schemas.errors import GeoLinkError
from schemas.layout import ARRAYS
from schemas.parquet import read_parquet
from schemas.pins import read_pins
from schemas.storage import Location, storage
from schemas.storage_objects import MemoryFiles

_SHARD_FILE = re.compile(r"(shards/[^/]+/[^/]+\.zarr)/.+")
_KNOWN = re.compile(
    r"dataset\.json|catalog\.duckdb(\.wal)?|report\.html|tags/[^/]+\.(parquet|npy)"
    r"|snapshots/\d{8}(\.parquet|-splits\.json)|pins/[\w.-]+\.json|clock-[0-9a-f]{32}"
    r"|(.+/)?\.lock",
    re.ASCII,
)


class Damage(NamedTuple):
    """One thing that is wrong."""

    where: str
    """A file, shard or snapshot, relative to the dataset."""
    what: str


@dataclass
class Verification:
    """What was verified, and what is wrong."""

    dataset: Location
    snapshot: int
    shards: int = 0
    chips: int = 0
    objects: int = 0
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)
    unreferenced: int = 0
    """Shards that no snapshot names: `geolink gc` removes them in time."""
    unknown: list[str] = field(default_factory=list)
    """Files that are none of a dataset's."""
    recomputed: list[str] = field(default_factory=list)
    """Shards built anew from the sources, and compared byte for byte."""
    changed: dict[str, list[str]] = field(default_factory=dict)
    """Sampled shards whose sources are others by now, and what differs: not comparable."""


Progress = Callable[[int, int], None]
"""Called with shards done, and all shards."""


def verify_dataset(
    dataset: Location,
    snapshot: int | None = None,
    *,
    config: DatasetConfig | None = None,
    deep: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Verify a snapshot (none: the latest) and everything it names.

    config, deep, seed: build `deep` shards, drawn by `seed`, anew from the sources of a config.

    Raises GeoLinkError: no dataset, no such snapshot, or sources that cannot be read.
    """
    info = read_info(dataset)
    found = read_snapshot(dataset, snapshot)
    result = Verification(dataset, found.number, shards=len(found.rows))
    latest = snapshot_numbers(dataset)[-1]
    if found.number == latest and info != found.info:
        what = "differs from what the latest snapshot was published with; build again"
        result.damages.append(Damage("dataset.json", what))
    vocabulary = _Vocabulary.read(dataset, found)
    result.damages += vocabulary.damages
    result.damages += _snapshots_and_pins(dataset, found.number)
    chips: list[NDArray[np.int64]] = []
    checks = side_by_side(lambda row: _check_shard(dataset, row, found, vocabulary), found.rows)
    for done, (row, check) in enumerate(zip(found.rows, checks, strict=True), start=1):
        result.damages += [Damage(row.path, what) for what in check.faults]
        result.chips += row.chips
        result.objects += row.objects
        result.bytes += row.bytes
        chips.append(check.chips)
        vocabulary.counted += np.bincount(check.tag, check.tag_objects, len(vocabulary.ids)).astype(
            np.int64
        )
        if progress:
            progress(done, len(found.rows))
    result.damages += _across(found, chips, vocabulary, bool(result.damages))
    _list_files(dataset, result)
    if deep:
        if config is None:
            raise GeoLinkError("building shards anew needs the dataset's config")
        _recompute(dataset, found, config, deep, seed, result)
    return result


class _ShardCheck(NamedTuple):
    faults: list[str]
    chips: NDArray[np.int64]
    """[N, 3]: identity of the chips and their time."""
    tag: NDArray[np.int64]
    """[U] rows of the vocabulary."""
    tag_objects: NDArray[np.int64]
    """[U] objects that carry the tag."""


_NO_CHECK = (np.zeros((0, 3), np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))


def _check_shard(
    dataset: Location, row: SnapshotRow, snapshot: Snapshot, vocabulary: "_Vocabulary"
) -> _ShardCheck:
    files, arrays, faults = read_stored(dataset, row)
    if len(arrays) < len(ARRAYS):
        return _ShardCheck(faults, *_NO_CHECK)
    try:
        attributes = json.loads(files["zarr.json"])["attributes"]
        faults += shard_faults(row, arrays, attributes, snapshot.info)
    except (ValueError, KeyError, TypeError) as error:
        return _ShardCheck([*faults, f"has damaged attributes ({error!r})"], *_NO_CHECK)
    except GeoLinkError as error:
        return _ShardCheck([*faults, str(error)], *_NO_CHECK)
    at, known = vocabulary.rows_of(arrays["tag"])
    if not known.all():
        faults.append(f"has {int((~known).sum())} tags that the vocabulary lacks")
    objects = np.bincount(arrays["object_tag"], minlength=len(at))
    chips = np.column_stack([arrays["chip_id"].view(np.int64), arrays["time"]])
    return _ShardCheck(faults, chips, at[known], objects[known].astype(np.int64))


def read_stored(
    dataset: Location, row: SnapshotRow
) -> tuple[dict[str, bytes], dict[str, NDArray[Any]], list[str]]:
    """Files of a published shard, those of its arrays that are whole, and what is wrong with them,
    each as a sentence's end.
    """
    try:
        files = read_files(dataset, row.path)
    except OSError as error:
        return {}, {}, [f"cannot be read: {error}"]
    if "zarr.json" not in files:
        return files, {}, ["is missing; build again" if not files else "is missing its zarr.json"]
    memory = MemoryFiles(files)
    faults, arrays = [], {}
    for name in ARRAYS:
        try:
            arrays[name] = read_array(memory, name)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            faults.append(f"array {name!r} is missing or damaged ({error})")
    if checksum(files) != row.checksum and not faults:
        faults.append("reads well but is not the one that was published (another checksum)")
    size = sum(len(data) for data in files.values())
    if size != row.bytes:
        faults.append(f"has {size:,} bytes, the snapshot says {row.bytes:,}")
    return files, arrays, faults


@dataclass
class _Vocabulary:
    """Tags of a snapshot, and how many objects its shards were found to have of each."""

    name: str
    ids: NDArray[np.uint64]
    objects: NDArray[np.int64]
    counted: NDArray[np.int64]
    damages: list[Damage]

    @classmethod
    def read(cls, dataset: Location, snapshot: Snapshot) -> "_Vocabulary":
        """Read and check it; an empty one where it is damaged."""
        name = vocabulary_name(snapshot.vocabulary)
        table_name = tag_table_name(snapshot.vocabulary, snapshot.info.tag_encoder)
        blank = cls(name, np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64), [])
        files, damages = storage(dataset), []
        try:
            table = read_parquet(files.read(name))
            ids = table["id"].to_numpy().astype(np.uint64)
            pairs = zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True)
            if not np.array_equal(tag_id([f"{k}={v}" for k, v in pairs]), ids):
                damages.append(Damage(name, "has ids that are not those of its tags"))
            if np.any(ids[1:] <= ids[:-1]):
                damages.append(Damage(name, "has ids that do not rise"))
            objects = table["objects"].to_numpy().astype(np.int64)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            blank.damages.append(Damage(name, f"is missing or damaged ({error})"))
            return blank
        try:
            vectors = np.load(io.BytesIO(files.read(table_name)), allow_pickle=False)
            if vectors.dtype != np.float16 or vectors.ndim != 2 or len(vectors) != len(ids):
                what = f"is {vectors.dtype} {list(vectors.shape)}, not float16 [{len(ids)}, D]"
                damages.append(Damage(table_name, what))
            elif not np.isfinite(vectors).all():
                damages.append(Damage(table_name, "holds values that are no numbers"))
        except (OSError, ValueError, EOFError) as error:
            damages.append(Damage(table_name, f"is missing or damaged ({error})"))
        return cls(name, ids, objects, np.zeros(len(ids), np.int64), damages)

    def rows_of(self, tag: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Rows [U] of tags, and which of them are known."""
        if not len(self.ids):
            return np.zeros(len(tag), np.int64), np.zeros(len(tag), bool)
        at = np.minimum(np.searchsorted(self.ids, tag), len(self.ids) - 1)
        return at, self.ids[at] == tag


def _across(
    snapshot: Snapshot, chips: list[NDArray[np.int64]], vocabulary: _Vocabulary, damaged: bool
) -> list[Damage]:
    """What only shows over all shards together; nothing certain where one is damaged."""
    damages: list[Damage] = []
    name = snapshot_name(snapshot.number)
    if damaged:
        return damages
    if not np.array_equal(vocabulary.counted, vocabulary.objects):
        differ = int((vocabulary.counted != vocabulary.objects).sum())
        damages.append(Damage(vocabulary.name, f"counts the objects of {differ} tags wrong"))
    every = np.concatenate([np.zeros((0, 3), np.int64), *chips])
    twice = len(every) - len(np.unique(every, axis=0))
    if twice:
        damages.append(Damage(name, f"{twice} chips come twice, with the same time"))
    return damages


def _snapshots_and_pins(dataset: Location, verified: int) -> list[Damage]:
    """Other snapshots read well; pins hold snapshots that are there; certificates are of theirs."""
    damages, files = [], storage(dataset)
    numbers = snapshot_numbers(dataset)
    for number in numbers:
        if number != verified:
            try:
                read_snapshot(dataset, number)
            except GeoLinkError as error:
                damages.append(Damage(snapshot_name(number), str(error)))
        name = certificate_name(number)
        if files.exists(name):
            try:
                stated = json.loads(files.read(name))["snapshot_checksum"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                damages.append(Damage(name, f"is damaged ({error!r})"))
                continue
            if stated != snapshot_checksum(dataset, number):
                damages.append(Damage(name, "was made of another snapshot; check the splits again"))
    try:
        pins = read_pins(dataset)
    except GeoLinkError as error:
        return [*damages, Damage("pins", str(error))]
    return damages + [
        Damage(f"pins/{name}.json", f"pins snapshot {pin.snapshot}, which is not there")
        for name, pin in pins.items()
        if pin.snapshot not in numbers
    ]


def _list_files(dataset: Location, result: Verification) -> None:
    """Files that are none of a dataset's, and shards that no snapshot names."""
    named = set()
    for number in snapshot_numbers(dataset):
        try:
            named |= {row.path for row in read_snapshot(dataset, number).rows}
        except GeoLinkError:  # told of already
            continue
    shards = set()
    for entry in storage(dataset).entries():
        if match := _SHARD_FILE.fullmatch(entry.name):
            shards.add(match[1])
        elif not _KNOWN.fullmatch(entry.name):
            result.unknown.append(entry.name)
    result.unreferenced = len(shards - named)


def _recompute(
    dataset: Location,
    snapshot: Snapshot,
    config: DatasetConfig,
    count: int,
    seed: int,
    result: Verification,
) -> None:
    """Build a sample of shards anew from the sources, elsewhere, and compare."""
    tasks = {task.shard: task for task in make_plan(config).tasks}
    rows = random.Random(seed).sample(snapshot.rows, min(count, len(snapshot.rows)))
    for row in sorted(rows):
        task = tasks.get(row.shard)
        if task is None:
            result.changed[row.shard] = ["it is not part of the region any more"]
        elif task.key != row.key:
            made_from = shard_attributes(dataset, row.path)["made_from"]
            result.changed[row.shard] = differences(made_from, task.made_from)
        else:
            with tempfile.TemporaryDirectory() as folder:
                built = build_shard(replace(task, dataset=Path(folder)))
            result.recomputed.append(row.shard)
            if built.checksum != row.checksum:
                what = "has other bytes than when it is built from the same sources"
                result.damages.append(Damage(row.path, what))
