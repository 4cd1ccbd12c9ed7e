"""What snapshot, history and vocabulary say of a dataset, in the page's words."""

import heapq
import io
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow.parquet as pq

from flows.report.layers import SEVERITIES
from flows.report.records import Records
from flows.report.survey import Survey
from pipelines.remote import public
from schemas.dataset import Snapshot, SnapshotRow, read_snapshot, snapshot_numbers, vocabulary_name
from schemas.findings import FINDINGS, Finding
from schemas.splits import SPLITS
from schemas.storage import Location, storage

_WORST = 3
_GRAVEST = 5
_NAMED = 200
"""Letters of what a finding is about."""
_TAGS = 12
_SCENES = 40


@dataclass(frozen=True)
class FindingLine:
    """One row of the table of findings."""

    code: str
    severity: str
    scope: str
    meaning: str
    remedy: str
    count: int
    shards: int
    """Shards that have it; 0: found before any shard was built."""
    worst: list[tuple[str, int]]
    """Shards with most of it."""
    named: str
    """What it is about, where that is known and no shard tells."""


@dataclass(frozen=True)
class SceneRow:
    """One row of the table of scenes."""

    scene: str
    day: str
    used: int
    """Shards of the snapshot that hold pixels of it."""
    considered: int
    scene_cloud: str
    shard_cloud: str
    reason: str


def finding_lines(rows: Sequence[SnapshotRow], records: Records) -> list[FindingLine]:
    """Every finding of a snapshot and of its plan, gravest first, then by count."""
    total, shards = Counter[str](records.skipped), Counter[str]()
    for row in rows:
        total.update(row.qc)
        shards.update([code for code, n in row.qc.items() if n])
    if records.failed_count:
        total["shard_failed"] += records.failed_count
        shards["shard_failed"] += records.failed_count
    lines = []
    for code in sorted(code for code, n in total.items() if n):
        worst = heapq.nsmallest(
            _WORST, ((-r.qc[code], r.shard) for r in rows if r.qc.get(code)), key=lambda w: w
        )
        failed = [(shard, 1) for shard, _ in records.failed[:_WORST]]
        known = FINDINGS.get(code, _unknown(code))
        lines.append(
            FindingLine(
                code, known.severity, _scope(known.scope, total[code]), known.meaning, known.remedy,
                total[code], shards[code],
                failed if code == "shard_failed" else [(shard, -n) for n, shard in worst],
                textwrap.shorten(records.named.get(code, ""), _NAMED, placeholder=" …"),
            )
        )  # fmt: skip
    return sorted(lines, key=lambda x: (SEVERITIES.index(x.severity), -x.count, x.code))


def _unknown(code: str) -> Finding:
    return Finding(
        code, "warning", "dataset", "A finding that this version of GeoLink does not know.",
        "Make the report with the GeoLink that built the dataset.",
    )  # fmt: skip


def _scope(scope: str, count: int) -> str:
    word = "case" if scope in ("dataset", "extract") else scope
    return word if count == 1 else f"{word}s"


def verdict(lines: Sequence[FindingLine]) -> tuple[str, str, list[FindingLine]]:
    """The gravest severity there is (or `fine`), what to make of it, and what to look at first."""
    kinds = Counter(line.severity for line in lines)
    gravest = [x for s in ("error", "warning") for x in lines if x.severity == s][:_GRAVEST]
    if not gravest:
        return "fine", "Nothing was found that needs attention.", []
    parts = [
        f"{kinds[s]} kind{'s' * (kinds[s] != 1)} of {s}" for s in ("error", "warning") if kinds[s]
    ]
    text = "Something is wrong" if kinds["error"] else "Worth a look before use"
    return gravest[0].severity, f"{text}: {' and '.join(parts)}.", gravest


def splits(rows: Sequence[SnapshotRow]) -> list[dict[str, Any]]:
    """Shards, chips and objects by split."""
    chips = sum(row.chips for row in rows) or 1
    table = []
    for split in SPLITS:
        of = [row for row in rows if row.split == split and row.chips]
        n = sum(row.chips for row in of)
        table.append(
            {"name": split, "shards": len(of), "chips": n, "share": n / chips,
             "objects": sum(row.objects for row in of)}
        )  # fmt: skip
    return table


def changed_shards(dataset: Location, snapshot: Snapshot) -> set[str]:
    """Shards whose content the snapshot before, where one is left, does not have."""
    earlier = [n for n in snapshot_numbers(dataset) if n < snapshot.number]
    if not earlier:
        return {row.shard for row in snapshot.rows}
    before = {row.shard: row.key for row in read_snapshot(dataset, earlier[-1]).rows}
    return {row.shard for row in snapshot.rows if before.get(row.shard) != row.key}


def top_tags(dataset: Location, vocabulary: str) -> tuple[list[tuple[str, int]], int]:
    """The commonest tags `key=value` with their objects, and the number of distinct tags."""
    data = storage(dataset).read(vocabulary_name(vocabulary))
    file = pq.ParquetFile(io.BytesIO(data))
    best: list[tuple[int, str]] = []
    for batch in file.iter_batches(columns=["key", "value", "objects"]):
        columns = (
            batch["objects"].to_pylist(),
            batch["key"].to_pylist(),
            batch["value"].to_pylist(),
        )
        some = ((-n, f"{key}={value}") for n, key, value in zip(*columns, strict=True))
        best = heapq.nsmallest(_TAGS, [*best, *some])
    return [(tag, -n) for n, tag in best], file.metadata.num_rows


def scene_rows(
    rows: Sequence[SnapshotRow], found: Survey, records: Records
) -> tuple[list[SceneRow], int]:
    """The scenes used most, then others that were considered; and how many there are in all."""
    used = Counter(scene for row in rows for scene in row.scenes)
    if records.scenes:
        lines = [
            SceneRow(
                r.scene, r.acquired.strftime("%Y-%m-%d") if r.acquired else "", used[r.scene],
                r.considered, "" if r.cloud_cover is None else f"{r.cloud_cover:.0f} %",
                "" if r.cloud is None else f"{r.cloud:.0%}".replace("%", " %"), r.reason or "",
            )
            for r in records.scenes
        ]  # fmt: skip
        return lines, max(records.scene_count, len(used))
    names = used.keys() | found.scenes.keys()
    order = heapq.nsmallest(_SCENES, names, key=lambda s: (-used[s], s not in found.scenes, s))
    return [_scene_row(scene, used[scene], found) for scene in order], len(names)


def _scene_row(scene: str, used: int, found: Survey) -> SceneRow:
    line, seconds = found.scenes.get(scene), found.scene_seconds.get(scene)
    cloud = (
        f"{line.cloud[0] / line.cloud[1]:.0%}".replace("%", " %") if line and line.cloud[1] else ""
    )
    reason = min(line.reasons, key=lambda r: (-line.reasons[r], r)) if line and line.reasons else ""
    return SceneRow(
        scene, "" if seconds is None else _day(seconds), used,
        max(line.considered if line else 0, used), "", cloud, reason,
    )  # fmt: skip


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def config_text(config: str) -> str:
    """A config as indented JSON, without the queries of addresses, which can hold tokens."""
    return public(json.dumps(json.loads(config), indent=2, ensure_ascii=False)) if config else ""


def osm_times(rows: Sequence[SnapshotRow]) -> list[tuple[str, int]]:
    """Times of the extracts of the shards, and how many shards have each; oldest first."""
    return sorted(Counter(row.osm_timestamp for row in rows if row.chips).items())
