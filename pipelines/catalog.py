"""The catalog of a dataset: what was considered, built and found, for questions in SQL.

Only the coordinating process writes, in one short transaction at the end of a build; workers
never open it.
"""

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import shapely

from pipelines.store import shard_attributes
from schemas.catalog import CATALOG_VERSION, catalog_ddl
from schemas.config import DatasetConfig
from schemas.errors import GeoLinkError
from schemas.findings import CHIP_FLAGS, FINDINGS, flagged
from schemas.storage import Location, storage

if TYPE_CHECKING:
    from pipelines.build import BuildResult
    from pipelines.plan import Plan

_LOCK_WAIT_S = 30.0


@contextmanager
def writable(dataset: Location) -> Iterator[duckdb.DuckDBPyConnection]:
    """The dataset's `catalog.duckdb`, open for writing; waits while another build has it.

    DuckDB writes files only: the catalog of a dataset in an object store is fetched, written and
    put back, and of two builds that do so at once the later one's entries stay.

    Raises GeoLinkError: locked for too long, damaged, or made by a newer version.
    """
    if isinstance(dataset, Path):
        with open_catalog(dataset / "catalog.duckdb") as con:
            yield con
        return
    files = storage(dataset)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalog.duckdb"
        if files.exists("catalog.duckdb"):
            path.write_bytes(files.read("catalog.duckdb"))
        with open_catalog(path) as con:
            yield con
        files.write("catalog.duckdb", path.read_bytes())


def open_catalog(path: Path) -> duckdb.DuckDBPyConnection:
    """Open a catalog file, creating its tables; waits while another process has it.

    Raises GeoLinkError: locked for too long, damaged, or made by a newer version.
    """
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            con = duckdb.connect(str(path))
            break
        except duckdb.IOException as error:
            locked = "lock" in str(error).lower()
            if not locked or time.monotonic() > deadline:
                what = "another process holds it" if locked else str(error)
                raise GeoLinkError(f"cannot write catalog {path}: {what}") from error
            time.sleep(0.2)
    con.execute(catalog_ddl())
    con.execute("INSERT OR IGNORE INTO meta VALUES ('version', ?)", [str(CATALOG_VERSION)])
    row = con.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
    if row and int(row[0]) != CATALOG_VERSION:
        con.close()
        age = "a newer" if int(row[0]) > CATALOG_VERSION else "an older"
        raise GeoLinkError(
            f"{path} was made by {age} GeoLink (catalog {row[0]}, this one has {CATALOG_VERSION}); "
            "use that one, or move the file away and a new one is begun"
        )
    return con


def record_build(
    config: DatasetConfig,
    plan: "Plan",
    result: "BuildResult",
    seconds: dict[str, float],
    started: float,
) -> None:
    """Append one build: its region, extract, scenes considered, shards, chips and findings."""
    with writable(config.dataset) as con:
        con.execute("BEGIN")
        row = con.execute("SELECT coalesce(max(build), 0) + 1 FROM builds").fetchone()
        build = int(row[0]) if row else 1
        state = "partial" if result.failed else "published" if result.published else "unchanged"
        con.execute(
            "INSERT INTO builds VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                build, _utc(started), _utc(time.time()), config.model_dump_json(),
                version("geolink-osm"), result.snapshot, state,
            ],
        )  # fmt: skip
        if plan.region is not None:
            con.execute(
                "INSERT INTO regions VALUES (?, ?)", [build, shapely.to_geojson(plan.region)]
            )
        _record_extract(con, plan)
        _record_scenes(con, plan, _considered(config.dataset, result, seconds), build)
        _record_shards(con, plan, result, seconds, build)
        _record_findings(con, result, seconds, build)
        con.execute("COMMIT")


def _considered(
    dataset: Location, result: "BuildResult", built: dict[str, float]
) -> dict[str, list[dict[str, Any]]]:
    """By shard that this build made: the scenes its worker looked at."""
    rows = [r for r in result.rows if r.shard in built]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda r: shard_attributes(dataset, r.path).get("considered", []), rows)
        return {row.shard: records for row, records in zip(rows, found, strict=True)}


def _record_extract(con: duckdb.DuckDBPyConnection, plan: "Plan") -> None:
    if plan.extract is None:
        return
    e = plan.extract
    if con.execute("SELECT 1 FROM extracts WHERE extract = ?", [e.key]).fetchone():
        return
    con.execute(
        "INSERT INTO extracts VALUES (?, ?, ?, ?, ?, ?, ?)",
        [e.key, str(e.source), e.sha256, e.bytes, e.osm_timestamp, e.objects, str(e.parquet)],
    )
    con.execute(
        "INSERT INTO tag_counts SELECT ?, key, value, objects FROM read_parquet(?)",
        [e.key, str(e.tag_counts)],
    )


def _record_scenes(
    con: duckdb.DuckDBPyConnection,
    plan: "Plan",
    considered: dict[str, list[dict[str, Any]]],
    build: int,
) -> None:
    """Every scene that meets a block: what the plan said of it, and what its mask showed there.

    `considered`: by shard that was built, what its worker found.
    """
    rows = []
    for shard, choices in plan.choices.items():
        seen = {str(record["scene"]): record for record in considered.get(shard, [])}
        for c in choices:
            record = seen.get(c.scene.id, {})
            rows.append(
                {
                    "build": build, "shard": shard, "scene": c.scene.id,
                    "acquired": _utc(c.scene.seconds) if c.scene.datetime else None,
                    "cloud_cover": c.scene.cloud_cover, "candidate": c.chosen,
                    "block_cloud": record.get("cloud"), "coverage": record.get("coverage"),
                    "chosen": record.get("chosen", False), "rank": record.get("rank"),
                    "reason": str(record.get("reason") or c.reason),
                }
            )  # fmt: skip
    _append(con, "scenes", rows)


def _record_shards(
    con: duckdb.DuckDBPyConnection,
    plan: "Plan",
    result: "BuildResult",
    seconds: dict[str, float],
    build: int,
) -> None:
    keys = {t.shard: t.key for t in plan.tasks}
    rows: list[dict[str, Any]] = [
        {
            "build": build, "shard": r.shard, "content_key": r.key,
            "state": "built" if r.shard in seconds else "unchanged", "path": r.path,
            "checksum": r.checksum, "split": r.split, "chips": r.chips, "objects": r.objects,
            "edges": r.edges, "bytes": r.bytes, "seconds": seconds.get(r.shard), "message": None,
        }
        for r in result.rows
    ]  # fmt: skip
    rows += [
        {
            "build": build, "shard": shard, "content_key": keys[shard], "state": "failed",
            "path": None, "checksum": None, "split": None, "chips": None, "objects": None,
            "edges": None, "bytes": None, "seconds": seconds.get(shard), "message": message,
        }
        for shard, message in result.failed.items()
    ]  # fmt: skip
    _append(con, "shards", rows)


def _record_findings(
    con: duckdb.DuckDBPyConnection, result: "BuildResult", built: dict[str, float], build: int
) -> None:
    """Counts by shard (none: of the inputs), and which chips of the shards that were built."""
    found: list[tuple[str | None, str, int, str | None]]
    named = {code: ", ".join(about) for code, about in result.named.items()}
    found = [(None, code, n, named.get(code)) for code, n in result.skipped.items()]
    found += [(row.shard, code, n, None) for row in result.rows for code, n in row.qc.items()]
    found += [(s, "shard_failed", 1, message) for s, message in result.failed.items()]
    rows = [
        {
            "build": build, "shard": shard, "code": code, "severity": FINDINGS[code].severity,
            "count": n, "message": message,
        }
        for shard, code, n, message in found
    ]  # fmt: skip
    _append(con, "findings", rows)
    chips = [
        {"build": build, "shard": r.shard, "content_key": r.key, "chip": chip, "code": code}
        for r in result.rows
        if r.shard in built
        for code in CHIP_FLAGS
        for chip in np.flatnonzero(flagged(np.array(r.chip_findings, np.uint32), [code])).tolist()
    ]
    _append(con, "chip_findings", chips)


def _append(con: duckdb.DuckDBPyConnection, table: str, rows: list[dict[str, Any]]) -> None:
    """Append rows to a table by column name."""
    if rows:
        con.register("new_rows", pa.Table.from_pylist(rows))
        con.execute(f"INSERT INTO {table} BY NAME SELECT * FROM new_rows")  # noqa: S608 - own name
        con.unregister("new_rows")


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
