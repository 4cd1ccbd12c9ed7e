"""Removing what no kept snapshot needs, safely beside running builds and readers.

Kept are the latest snapshots, pinned ones, and those that were the latest at some time within the
grace: a reader or build that began on one of them, less than the grace ago, notices nothing. What
they do not name is removed once it is older than the grace. Ages are told by the storage's own
clock, and what seems to come from the future is young, so a clock that is set back removes nothing.

A build may at any moment adopt a finished shard that no snapshot names. It makes the shard young
first, and looks for its shards once more before it publishes. Here, a shard's `zarr.json` goes
first (without it a shard counts as missing), then snapshots are read once more, and what has been
published meanwhile is put back before any other file is touched; and a shard that somebody has
begun to write meanwhile is left to them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

from schemas.dataset import (
    certificate_name,
    read_info,
    read_snapshot,
    snapshot_name,
    snapshot_numbers,
    tag_table_name,
    vocabulary_name,
)
from schemas.errors import GeoLinkError
from schemas.pins import read_pins
from schemas.storage import Entry, Location, Storage, storage, writing

GRACE = timedelta(hours=24)
_SHARD = re.compile(r"(shards/[^/]+/[^/]+\.zarr)/.+")
_OTHER = re.compile(
    r"tags/[^/]+\.(npy|parquet)|snapshots/\d{8}-splits\.json|pins/[^/]+\.json|clock-[0-9a-f]{32}"
)
"""Files that a dataset may be rid of: beside shards, nothing that is named otherwise is removed."""


@dataclass(frozen=True)
class Removal:
    """What was removed, or would be."""

    dataset: Location
    dry_run: bool
    kept_snapshots: list[int]
    removed_snapshots: list[int]
    shards: list[str]
    """Paths of shards, finished or not."""
    files: list[str]
    """Vocabularies, tag tables, expired pins, certificates of removed snapshots, leftovers."""
    bytes: int
    young: int
    """Shards and files that nothing needs but that are younger than the grace."""
    spared: list[str]
    """Shards that a build published, or began to write, while they were about to be removed."""


class _Group(NamedTuple):
    """Files that are needed or not as one: those of a shard, or a single file."""

    name: str
    files: list[Entry]

    @property
    def bytes(self) -> int:
        return sum(e.size for e in self.files)

    def older(self, now: datetime, grace: timedelta) -> bool:
        """Whether even its newest file is older than the grace; what is of the future is young."""
        return all(now - e.modified > grace for e in self.files)


def collect_garbage(
    dataset: Location, *, keep: int = 10, grace: timedelta = GRACE, dry_run: bool = False
) -> Removal:
    """Remove snapshots beyond the latest `keep`, and everything that none of those left names.

    dry_run: only say what would be removed.

    Raises GeoLinkError: no dataset, a kept snapshot or a pin that cannot be read (it may need
    anything), or a dataset that cannot be written.
    """
    if keep < 1 or grace < timedelta(0):
        raise GeoLinkError("keep at least one snapshot, and give a grace time of 0 or more")
    read_info(dataset)
    files = storage(dataset)
    now = files.now()
    # Listed before snapshots are read: what is published in between was made young before.
    groups = _groups(files.entries())
    kept, removed = _snapshots(dataset, keep, now, grace)
    needed = _needed(dataset, kept, now)
    idle = [g for g in groups if g.name not in needed]
    old = [g for g in idle if g.older(now, grace)]
    swept, spared = list[str](), list[str]()
    if not dry_run:
        with writing(str(dataset)):
            back = _remove_snapshots(dataset, files, removed, now)
            kept, removed = sorted({*kept, *back}), [n for n in removed if n not in back]
            needed = _needed(dataset, kept, now)
            left = [g for g in old if g.name not in needed]
            old, spared = _remove(dataset, files, left, kept, now)
            swept = [*files.sweep("shards"), *files.sweep("")]
    shards = [g.name for g in old if g.name.startswith("shards/")]
    others = [g.name for g in old if not g.name.startswith("shards/")]
    return Removal(
        dataset, dry_run, kept, removed, shards, [*others, *swept], sum(g.bytes for g in old),
        sum(not g.older(now, grace) for g in idle), spared,
    )  # fmt: skip


def _groups(entries: Iterable[Entry]) -> list[_Group]:
    """Shards, and other files that may be removed."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        shard = _SHARD.fullmatch(entry.name)
        if shard or _OTHER.fullmatch(entry.name):
            found.setdefault(shard[1] if shard else entry.name, []).append(entry)
    return [_Group(name, files) for name, files in sorted(found.items())]


def _snapshots(
    dataset: Location, keep: int, now: datetime, grace: timedelta
) -> tuple[list[int], list[int]]:
    """Snapshots to keep and to remove."""
    modified = {e.name: e.modified for e in storage(dataset).entries("snapshots")}
    numbers = [n for n in snapshot_numbers(dataset) if snapshot_name(n) in modified]
    kept = {*numbers[-keep:], *_pinned(dataset, now)}
    # A snapshot was the latest until the next one came: what began on it may still be running.
    kept |= {
        n for n, following in pairwise(numbers)
        if now - modified[snapshot_name(following)] <= grace
    }  # fmt: skip
    return [n for n in numbers if n in kept], [n for n in numbers if n not in kept]


def _pinned(dataset: Location, now: datetime) -> set[int]:
    return {pin.snapshot for pin in read_pins(dataset).values() if pin.holds(now)}


def _needed(dataset: Location, numbers: Iterable[int], now: datetime) -> set[str]:
    """Names of everything that some snapshots name, their certificates, and pins that hold."""
    needed = {f"pins/{name}.json" for name, pin in read_pins(dataset).items() if pin.holds(now)}
    for number in numbers:
        snapshot = read_snapshot(dataset, number)
        key = snapshot.vocabulary
        needed |= {row.path for row in snapshot.rows} | {
            vocabulary_name(key), tag_table_name(key, snapshot.info.tag_encoder),
            certificate_name(number),
        }  # fmt: skip
    return needed


def _remove_snapshots(
    dataset: Location, files: Storage, numbers: list[int], now: datetime
) -> set[int]:
    """Remove snapshots; those that were pinned meanwhile are put back and returned."""
    contents = {n: files.read(snapshot_name(n)) for n in numbers}
    files.delete(snapshot_name(n) for n in numbers)
    back = _pinned(dataset, now) & contents.keys()
    for number in back:
        files.create(snapshot_name(number), contents[number])
    return back


def _remove(
    dataset: Location, files: Storage, groups: list[_Group], kept: list[int], now: datetime
) -> tuple[list[_Group], list[str]]:
    """Remove shards and other files: those removed, and shards spared."""
    markers = {}
    for group in groups:
        name = f"{group.name}/zarr.json"
        if any(e.name == name for e in group.files):
            markers[name] = files.read(name)
    files.delete(markers)
    newer = set(snapshot_numbers(dataset)) - set(kept)
    needed = _needed(dataset, newer, now)
    for name, data in markers.items():
        if name.removesuffix("/zarr.json") in needed:
            files.write(name, data)
    # A build may have made a vocabulary young, or a program a pin, since they were listed.
    there = {e for folder in ("tags", "pins", "snapshots") for e in files.entries(folder)}
    removed = []
    for group in groups:
        if group.name in needed:
            continue
        if group.name.startswith("shards/"):
            if not files.delete_group(group.name, group.files):
                continue
        elif "/" in group.name and not there.issuperset(group.files):
            continue
        else:
            files.delete([group.name])
        removed.append(group)
    names = {g.name for g in removed}
    return removed, [g.name for g in groups if g.name not in names]
