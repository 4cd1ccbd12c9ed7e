"""What the catalog beside a dataset adds: failed shards, scenes ruled out before any was opened.

A dataset without a catalog gets its report all the same, and the page says what is missing.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from schemas.catalog import CATALOG_VERSION
from schemas.storage import Location, storage

SCENES = 40
"""Scenes that are listed at most."""
FAILED = 100
BUILDS = 12


class SceneRecord(NamedTuple):
    """A scene over all shards, as of the build that made each."""

    scene: str
    acquired: datetime | None
    cloud_cover: float | None
    """Per cent, of the whole scene by its metadata."""
    considered: int
    """Shards."""
    cloud: float | None
    """Mean masked share over the shards."""
    reason: str | None
    """The commonest why it was not used."""


class Build(NamedTuple):
    """A run of `geolink build` or `refresh`."""

    build: int
    started: datetime
    finished: datetime | None
    version: str
    snapshot: int | None
    state: str


class OsmExtract(NamedTuple):
    """An OSM extract that was converted."""

    source: str
    sha256: str
    bytes: int
    osm_timestamp: str | None
    objects: int


@dataclass
class Records:
    """What the catalog says of a snapshot; empty where there is none."""

    missing: str = ""
    """Why there is no catalog to ask; empty: there is."""
    builds: list[Build] = field(default_factory=list)
    """The last ones, newest first."""
    build_count: int = 0
    config: str = ""
    """JSON of the config that the snapshot was built from."""
    extracts: list[OsmExtract] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    """Shard and message, of the last build if it failed in part."""
    failed_count: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Findings before any shard was built, by code."""
    named: dict[str, str] = field(default_factory=dict)
    """What those are about, by code, where that is known."""
    scenes: list[SceneRecord] = field(default_factory=list)
    scene_count: int = 0
    acquired: dict[str, datetime] = field(default_factory=dict)
    """When the scenes that were candidates were taken."""


def read_records(dataset: Location, snapshot: int) -> Records:
    """What the catalog says of a snapshot."""
    with _opened(dataset) as con:
        if isinstance(con, str):
            return Records(missing=con)
        build = _one(
            con, "SELECT max(build) FROM builds WHERE snapshot = ?", snapshot
        )  # fmt: skip
        last = _one(con, "SELECT max(build) FROM builds")
        found = Records(build_count=_one(con, "SELECT count(*) FROM builds") or 0)
        found.builds = [
            Build(*row) for row in con.execute(
                "SELECT build, started, finished, version, snapshot, state FROM builds "
                "ORDER BY build DESC LIMIT ?", [BUILDS],
            ).fetchall()
        ]  # fmt: skip
        _add_failed(con, found, last)
        if build is not None:
            found.config = str(_one(con, "SELECT config FROM builds WHERE build = ?", build))
            skipped = con.execute(
                "SELECT code, sum(count)::BIGINT, string_agg(message, ', ') FROM findings "
                "WHERE build = ? AND shard IS NULL GROUP BY code", [build],
            ).fetchall()  # fmt: skip
            found.skipped = {code: n for code, n, _ in skipped}
            found.named = {code: message for code, _, message in skipped if message}
            _add_scenes(con, found, build)
        found.extracts = [
            OsmExtract(*row) for row in con.execute(
                "SELECT source, sha256, bytes, osm_timestamp, objects FROM extracts "
                "ORDER BY osm_timestamp DESC, extract"
            ).fetchall()
        ]  # fmt: skip
        return found


def _add_failed(con: duckdb.DuckDBPyConnection, found: Records, last: Any) -> None:
    failed = "FROM shards WHERE build = ? AND state = 'failed'"
    found.failed_count = _one(con, f"SELECT count(*) {failed}", last) or 0
    found.failed = con.execute(
        f"SELECT shard, message {failed} ORDER BY shard LIMIT ?",
        [last, FAILED],
    ).fetchall()


def _add_scenes(con: duckdb.DuckDBPyConnection, found: Records, build: int) -> None:
    """Scenes by shard, each as of the last build up to `build` that made the shard."""
    con.execute(
        "CREATE TEMP TABLE made AS SELECT s.* FROM scenes s SEMI JOIN ("
        "SELECT shard, max(build) AS build FROM shards WHERE state = 'built' "
        "AND build <= ? GROUP BY shard) b USING (shard, build)", [build],
    )  # fmt: skip
    found.scene_count = _one(con, "SELECT count(DISTINCT scene) FROM made") or 0
    found.scenes = [
        SceneRecord(*row) for row in con.execute(
            "SELECT scene, min(acquired), min(cloud_cover), count(*), avg(block_cloud), "
            "mode(reason ORDER BY reason) FILTER (WHERE NOT chosen) FROM made GROUP BY scene "
            "ORDER BY count(*) FILTER (WHERE chosen) DESC, count(*) DESC, scene LIMIT ?",
            [SCENES],
        ).fetchall()
    ]  # fmt: skip
    found.acquired = dict(
        con.execute(
            "SELECT scene, min(acquired) FROM made WHERE chosen AND acquired IS NOT NULL "
            "GROUP BY scene"
        ).fetchall()
    )


def _one(con: duckdb.DuckDBPyConnection, sql: str, *values: Any) -> Any:
    row = con.execute(sql, list(values)).fetchone()
    return row[0] if row else None


@contextmanager
def _opened(dataset: Location) -> Iterator[duckdb.DuckDBPyConnection | str]:
    """The catalog, open for reading, or why it is not."""
    files = storage(dataset)
    if not files.exists("catalog.duckdb"):
        yield "The dataset has no catalog.duckdb beside it"
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalog.duckdb"
        if isinstance(dataset, Path):
            path = dataset / "catalog.duckdb"
        else:
            path.write_bytes(files.read("catalog.duckdb"))
        try:
            con = duckdb.connect(str(path), read_only=True)
        except duckdb.Error as error:
            locked = "lock" in str(error).lower()
            yield "A build is writing catalog.duckdb" if locked else "catalog.duckdb is damaged"
            return
        with con:
            version = _one(con, "SELECT value FROM meta WHERE key = 'version'")
            if version != str(CATALOG_VERSION):
                yield f"catalog.duckdb is of version {version}, not {CATALOG_VERSION}"
            else:
                yield con
