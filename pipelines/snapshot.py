"""Publishing: a snapshot is one Parquet file, created whole if it is absent, never changed."""

import io
import json
from collections.abc import Sequence
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.dataset import (
    DatasetInfo,
    Snapshot,
    SnapshotRow,
    read_snapshot,
    snapshot_name,
    snapshot_numbers,
)
from schemas.errors import GeoLinkError
from schemas.layout import SCHEMA_VERSION
from schemas.storage import Location, join, storage, writing

_COLUMNS = pa.schema(
    [
        ("shard", pa.string()),
        ("path", pa.string()),
        ("key", pa.string()),
        ("checksum", pa.string()),
        ("split", pa.string()),
        ("chips", pa.int64()),
        ("objects", pa.int64()),
        ("edges", pa.int64()),
        ("bytes", pa.int64()),
        ("epsg", pa.int32()),
        ("bounds_lonlat", pa.list_(pa.float64())),
        ("scenes", pa.list_(pa.string())),
        ("osm_timestamp", pa.string()),
        ("pixels", pa.list_(pa.int64())),
        ("pixel_sum", pa.list_(pa.float64())),
        ("pixel_sum_squares", pa.list_(pa.float64())),
        ("qc", pa.map_(pa.string(), pa.int64())),
        ("chip_findings", pa.list_(pa.uint32())),
    ]
)


class SnapshotExists(GeoLinkError):
    """Another build published first; read the latest snapshot again and retry."""


def latest(dataset: Location) -> Snapshot | None:
    """The latest snapshot; None before the first one.

    Raises GeoLinkError if it is damaged.
    """
    return read_snapshot(dataset) if snapshot_numbers(dataset) else None


def latest_rows(dataset: Location) -> list[SnapshotRow]:
    """Rows of the latest snapshot; empty before the first one."""
    snapshot = latest(dataset)
    return snapshot.rows if snapshot else []


def publish(
    dataset: Location,
    rows: Sequence[SnapshotRow],
    vocabulary: str,
    info: DatasetInfo,
    *,
    base: int | None = None,
) -> tuple[int, bool]:
    """Publish the next snapshot: (its number, True), or (the latest, False) if nothing changed.

    base: number of the snapshot that `rows` were derived from (0 before the first; none: whichever
    is the latest now). Rows are stored by shard id, whatever order they come in.

    Raises SnapshotExists if another build has published since `base`, GeoLinkError if a shard
    comes twice or the file cannot be written.
    """
    rows = sorted(rows, key=lambda row: row.shard)
    twice = [a.shard for a, b in pairwise(rows) if a.shard == b.shard]
    if twice:
        raise GeoLinkError(f"shard {twice[0]} comes twice in the snapshot of {dataset}")
    before = latest(dataset)
    if before and (before.rows, before.vocabulary, before.info) == (rows, vocabulary, info):
        return before.number, False
    newest = before.number if before else 0
    number = (newest if base is None else base) + 1
    name = snapshot_name(number)
    with writing(join(dataset, name)):
        data = _parquet(rows, number, vocabulary, info)
        if newest >= number or not storage(dataset).create(name, data):
            raise SnapshotExists(
                f"another build of {dataset} has published snapshot {number}; run again"
            )
    return number, True


def _parquet(rows: Sequence[SnapshotRow], number: int, vocabulary: str, info: DatasetInfo) -> bytes:
    meta = {
        "schema_version": SCHEMA_VERSION,
        "snapshot": number,
        "vocabulary": vocabulary,
        "info": info.model_dump(mode="json"),
    }
    records = [{**row._asdict(), "qc": sorted(row.qc.items())} for row in rows]
    table = pa.Table.from_pylist(
        records, schema=_COLUMNS.with_metadata({b"geolink": json.dumps(meta).encode()})
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
