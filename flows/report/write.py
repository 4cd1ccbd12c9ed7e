"""The page: everything that is known of a dataset, put into the template."""

from datetime import UTC
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows.report import facts, layers, map, pictures
from flows.report.charts import charts
from flows.report.projection import corners
from flows.report.records import Records, read_records
from flows.report.survey import Survey, survey
from geolink.page.base import render, write
from pipelines.history import history
from schemas.dataset import DatasetInfo, Snapshot, read_info, read_snapshot
from schemas.errors import GeoLinkError
from schemas.findings import FINDINGS
from schemas.storage import Location

_HISTORY = 12


def write_report(dataset: Location, page: Path, *, snapshot: int | None = None) -> Path:
    """Write the report of a dataset at a snapshot (none: the latest) to `page`; returns its path.

    The same dataset gives the same page.

    Raises GeoLinkError: no dataset or snapshot there, a shard that cannot be read, or a page that
    cannot be written.
    """
    read_info(dataset)
    steps = history(dataset)
    found = read_snapshot(dataset, snapshot)
    records = read_records(dataset, found.number)
    seen = survey(dataset, found.rows, found.info)
    lines = facts.finding_lines(found.rows, records)
    severity, sentence, gravest = facts.verdict(lines)
    tags, tag_count = facts.top_tags(dataset, found.vocabulary)
    scenes, scene_count = facts.scene_rows(found.rows, seen, records)
    worst, typical = pictures.worst_chips(found.rows), pictures.typical_chips(found.rows)
    html = render(
        "flows/report/page.html.j2",
        info=found.info, number=found.number, version=version("geolink-osm"),
        published=next(s.published for s in steps if s.snapshot == found.number),
        steps=steps[: -_HISTORY - 1 : -1], steps_left_out=max(len(steps) - _HISTORY, 0),
        figures=_figures(found, scene_count), severity=severity, sentence=sentence,
        gravest=gravest, lines=lines,
        about=FINDINGS, **_map(dataset, found, records, seen),
        survey=seen, charts=charts(seen, found.info),
        worst=pictures.draw(dataset, worst, found.info),
        typical=pictures.draw(dataset, typical, found.info),
        flagged=sum(bits != 0 for row in found.rows for bits in row.chip_findings),
        scenes=scenes, scene_count=scene_count, splits=facts.splits(found.rows),
        osm_times=facts.osm_times(found.rows), records=records, tags=tags, tag_count=tag_count,
        classes=_classes(found.info, seen), config=facts.config_text(records.config),
    )  # fmt: skip
    write(page, html)
    return page


def _figures(found: Snapshot, scenes: int) -> list[tuple[str, str]]:
    rows = found.rows
    return [
        (f"{sum(row.chips for row in rows):,}", "chips"),
        (f"{sum(row.chips > 0 for row in rows):,}", "shards"),
        (f"{sum(row.objects for row in rows):,}", "OSM objects in chips"),
        (f"{sum(row.edges for row in rows):,}", "spatial relations"),
        (f"{scenes:,}", "scenes considered"),
        (_size(sum(row.bytes for row in rows)), "on disk"),
    ]


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if n >= 100 or unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _map(dataset: Location, found: Snapshot, records: Records, seen: Survey) -> dict[str, Any]:
    """The map, its views, and its rules of style."""
    rows = {row.shard: row for row in found.rows}
    failed = [shard for shard, _ in records.failed if shard not in rows]
    seconds: dict[str, float] = {
        s: t.replace(tzinfo=UTC).timestamp() for s, t in records.acquired.items()
    }
    seconds |= seen.scene_seconds
    changed = facts.changed_shards(dataset, found)
    views = layers.layers(found.rows, failed, changed, seconds, found.number)
    titles = [
        f"{row.shard}: {row.split}, {row.chips:,} chips, {row.objects:,} objects"
        for row in found.rows
    ] + [f"{shard}: failed" for shard in failed]
    where = corners(found.info.grid, [*rows, *failed], rows)
    try:
        drawn = map.draw_map(where, views, titles)
    except GeoLinkError:
        return {"map": None, "views": [], "map_css": ""}
    return {"map": drawn, "views": views, "map_css": map.css(views)}


def _classes(info: DatasetInfo, seen: Survey) -> list[dict[str, Any]]:
    """Classes by their share of the area of the chips that were read, largest first."""
    share = seen.area / max(seen.chips, 1)
    table = [
        {"name": c.name.replace("_", " "), "color": c.color, "share": float(s)}
        for c, s in zip(info.taxonomy.classes, share, strict=True) if s > 0
    ]  # fmt: skip
    return sorted(table, key=lambda c: (-c["share"], c["name"]))
