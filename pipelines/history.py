"""The past of a dataset: what each snapshot changed, and who holds on to it."""

from dataclasses import dataclass
from datetime import UTC, datetime

from pipelines.diff import contract_changes
from schemas.dataset import (
    Snapshot,
    certificate_name,
    read_info,
    read_snapshot,
    snapshot_name,
    snapshot_numbers,
)
from schemas.pins import read_pins
from schemas.storage import Location, storage


@dataclass(frozen=True)
class Step:
    """One snapshot, beside the one before that is left."""

    snapshot: int
    published: datetime
    """When its file was written, by the storage's clock, UTC."""
    shards: int
    built: int
    """New shards."""
    rebuilt: int
    """Shards with another content than before."""
    removed: int
    chips: int
    objects: int
    bytes: int
    contract: tuple[str, ...]
    """Fields of `dataset.json` that changed."""
    pinned: tuple[str, ...]
    """Names of the pins that hold it, each with who set it."""
    certified: bool
    """Whether it has a certificate of its splits."""


def history(dataset: Location) -> list[Step]:
    """Every snapshot that is left, oldest first. Memory holds two snapshots at a time.

    Raises GeoLinkError: no dataset, or a snapshot or pin that cannot be read.
    """
    read_info(dataset)
    entries = {e.name: e for e in storage(dataset).entries("snapshots")}
    pins = read_pins(dataset)
    now = datetime.now(UTC)
    steps: list[Step] = []
    before: Snapshot | None = None
    for number in snapshot_numbers(dataset):
        snapshot = read_snapshot(dataset, number)
        holding = tuple(
            f"{name} ({pin.by})" for name, pin in sorted(pins.items())
            if pin.snapshot == number and pin.holds(now)
        )  # fmt: skip
        certified = certificate_name(number) in entries
        published = entries[snapshot_name(number)].modified
        steps.append(_step(before, snapshot, published, holding, certified))
        before = snapshot
    return steps


def _step(
    before: Snapshot | None,
    snapshot: Snapshot,
    published: datetime,
    pinned: tuple[str, ...],
    certified: bool,
) -> Step:
    old = {row.shard: row.key for row in before.rows} if before else {}
    rows = snapshot.rows
    return Step(
        snapshot=snapshot.number,
        published=published,
        shards=len(rows),
        built=sum(row.shard not in old for row in rows),
        rebuilt=sum(old.get(row.shard, row.key) != row.key for row in rows),
        removed=len(old.keys() - {row.shard for row in rows}),
        chips=sum(row.chips for row in rows),
        objects=sum(row.objects for row in rows),
        bytes=sum(row.bytes for row in rows),
        contract=tuple(contract_changes(before.info, snapshot.info)) if before else (),
        pinned=pinned,
        certified=certified,
    )
