"""OSM extracts: PBF -> QuackOSM -> one GeoParquet file, converted once and kept by content.

Which features there are is QuackOSM's rule: every tagged node is a point; a tagged way is a line,
or a polygon if it is closed and its tags mean an area (its `osm_way_polygon_features` table, but
roundabouts stay lines; `area=yes` and `area=no` decide where given); relations of type multipolygon
and boundary become (multi)polygons when all their member ways are in the extract. Other relations
(routes, turn restrictions, ...) have no geometry of their own and are counted, as are incomplete
ones and ways whose nodes all lie in one place.
"""

import difflib
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import duckdb
import numpy as np
import osmium
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from schemas.config import OsmSource
from schemas.errors import GeoLinkError
from schemas.grid import Bounds

STAGE_VERSION = 2
"""Raise it when the converted file changes for the same input."""

_PBF_MAGIC = b"\n\x09OSMHeader"
_ROW_GROUP = 10_240

# A process of its own: QuackOSM spawns workers, which a caller's script or a Dask worker (a daemon)
# may not be able to, and it leaves half a gigabyte of modules behind.
_QUACKOSM = """
import json, sys
from importlib.resources import files
from quackosm import convert_pbf_to_parquet
text = files("quackosm").joinpath("osm_way_polygon_features.json").read_text(encoding="utf-8")
areas = json.loads(text)
areas["all"].remove("junction")
areas["denylist"]["junction"] = ["circular", "roundabout"]
convert_pbf_to_parquet(
    sys.argv[1], tags_filter=None, keep_all_tags=True, explode_tags=False, sort_result=False,
    ignore_metadata_tags=False, ignore_cache=True, verbosity_mode="silent",
    osm_way_polygon_features_config=areas,
    result_file_path=sys.argv[2], working_directory=sys.argv[3],
)
"""


@dataclass(frozen=True)
class Extract:
    """A converted OSM extract.

    `parquet`: GeoParquet, one row a feature, along a Hilbert curve: `osm` int64 (id << 2 | type),
    `geometry` (WKB, lon/lat), `xmin`, `ymin`, `xmax`, `ymax` (degrees), `tags` (sorted list of
    `key=value`, filtered), `digest` uint64 (of id, tags and geometry). `tag_counts`: Parquet of
    key, value, objects.
    """

    source: Path
    parquet: Path
    tag_counts: Path
    key: str
    sha256: str
    osm_timestamp: str
    """Of the data, ISO 8601 UTC; empty where the file does not tell."""
    objects: int
    bytes: int
    """Of the PBF file."""
    counts: dict[str, int]
    """Features left out, by reason."""


def convert_extract(pbf: Path, cache: Path, source: OsmSource) -> Extract:
    """Convert a PBF file, or find it converted already under the same content.

    Two processes may convert the same extract at once: both write the same bytes, one rename wins.

    Raises GeoLinkError: file missing, empty, truncated, damaged or not PBF; nothing tagged in it; a
    kept key that does not occur; cache folder not writable; spatial extension not to be had.
    """
    _check_pbf(pbf)
    with pbf.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    parts = [sha256, source.drop_keys, source.keep_keys, STAGE_VERSION, version("quackosm")]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = cache / "osm"
    parquet, tag_counts = folder / f"{key}.parquet", folder / f"{key}-tags.parquet"
    if not (parquet.exists() and tag_counts.exists()):
        _convert(pbf, source, folder, parquet, tag_counts)
    about = json.loads(pq.read_metadata(parquet).metadata[b"geolink"])
    return Extract(
        source=pbf, parquet=parquet, tag_counts=tag_counts, key=key, sha256=sha256,
        osm_timestamp=about["osm_timestamp"], objects=about["objects"], bytes=pbf.stat().st_size,
        counts=about["counts"],
    )  # fmt: skip


def block_digests(extract: Extract, boxes: Sequence[Bounds]) -> list[str]:
    """Hash of the features whose bounding box meets each box of degrees, in any order of rows.

    `EMPTY_DIGEST` where there is none. A box with west > east crosses the antimeridian. Memory does
    not grow with the extract.
    """
    query, box_of = _split_at_antimeridian(boxes)
    count = np.zeros(len(boxes), np.int64)
    total = np.zeros(len(boxes), np.uint64)
    mixed = np.zeros(len(boxes), np.uint64)
    tree = shapely.STRtree(shapely.box(*query.T)) if len(query) else None
    columns = ["xmin", "ymin", "xmax", "ymax", "digest"]
    for batch in pq.ParquetFile(extract.parquet).iter_batches(65_536, columns=columns):
        if tree is None:
            break
        xmin, ymin, xmax, ymax, digest = (column.to_numpy() for column in batch.columns)
        feature, part = tree.query(shapely.box(xmin, ymin, xmax, ymax), predicate="intersects")
        box = box_of[part]
        if len(query) > len(boxes):  # a feature may meet both halves of a box: it counts once
            box, feature = np.unique(np.stack([box, feature]), axis=1)
        values = digest[feature]
        count += np.bincount(box, minlength=len(boxes))
        np.add.at(total, box, values)
        np.add.at(mixed, box, values * (values | np.uint64(1)))
    return [_digest(*sums) for sums in zip(count.tolist(), total.tolist(), mixed.tolist())]


def _digest(count: int, total: int, mixed: int) -> str:
    return hashlib.blake2b(f"{count}/{total}/{mixed}".encode(), digest_size=16).hexdigest()


EMPTY_DIGEST = _digest(0, 0, 0)
"""Digest of a box that no feature meets."""


def _split_at_antimeridian(
    boxes: Sequence[Bounds],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Boxes [K, 4] that do not cross the antimeridian, and which box each is a part of [K]."""
    parts: list[tuple[Bounds, int]] = []
    for i, (west, south, east, north) in enumerate(boxes):
        if west <= east:
            parts.append(((west, south, east, north), i))
        else:
            parts += [((west, south, 180.0, north), i), ((-180.0, south, east, north), i)]
    bounds = np.array([p for p, _ in parts], np.float64).reshape(-1, 4)
    return bounds, np.array([i for _, i in parts], np.int64)


def _check_pbf(pbf: Path) -> None:
    if not pbf.is_file():
        raise GeoLinkError(f"OSM extract {pbf} is missing; give the path of an .osm.pbf file")
    try:
        with pbf.open("rb") as file:
            head = file.read(4 + len(_PBF_MAGIC))
    except OSError as error:
        raise GeoLinkError(f"cannot read OSM extract {pbf}: {error.strerror}") from error
    if not head:
        raise GeoLinkError(f"OSM extract {pbf} is empty; download it again")
    if head[4:] != _PBF_MAGIC:
        raise GeoLinkError(
            f"{pbf} is not an OSM PBF file; convert it first, e.g. `osmium cat {pbf.name} -o "
            f"{pbf.name.split('.')[0]}.osm.pbf`"
        )


@dataclass(frozen=True)
class _Survey:
    """What a PBF holds, counted with libosmium: the measure of what a conversion must return."""

    nodes: int
    ways: int
    areas: int
    """Relations of type multipolygon or boundary."""
    relations: int
    """Relations of any other type."""
    osm_timestamp: str


def _survey(pbf: Path, source: OsmSource) -> _Survey:
    """Read the whole file once, counting tagged elements; finds damage that readers may pass over.

    The timestamp is the header's replication timestamp, or else the newest tagged element's.
    """
    found: Counter[str] = Counter()
    keys: set[str] = set()
    newest = ""
    try:
        elements = osmium.FileProcessor(str(pbf)).with_filter(osmium.filter.EmptyTagFilter())
        stated = elements.header.get("osmosis_replication_timestamp")
        for element in elements:
            kind = element.type_str()
            if kind == "r" and element.tags.get("type") in ("multipolygon", "boundary"):
                kind = "area"
            found[kind] += 1
            if source.keep_keys:
                keys.update(tag.k for tag in element.tags)
            if not stated and element.timestamp.year > 1970:
                newest = max(newest, element.timestamp.strftime("%Y-%m-%dT%H:%M:%SZ"))
    except RuntimeError as error:
        raise GeoLinkError(
            f"OSM extract {pbf} is truncated or damaged ({error}); download it again"
        ) from error
    if not found:
        raise GeoLinkError(f"OSM extract {pbf} has no tagged element; use another extract")
    _check_keys(pbf, source, keys)
    return _Survey(found["n"], found["w"], found["area"], found["r"], stated or newest)


def _check_keys(pbf: Path, source: OsmSource, keys: set[str]) -> None:
    for pattern in source.keep_keys:
        if not any(map(re.compile(any_glob((pattern,))).fullmatch, keys)):
            near = difflib.get_close_matches(pattern, sorted(keys), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise GeoLinkError(f"keep_keys: nothing in {pbf} has a key {pattern!r}{hint}")


def _convert(pbf: Path, source: OsmSource, folder: Path, parquet: Path, tag_counts: Path) -> None:
    """Convert in a working folder beside the results, then rename; the Parquet file last."""
    odd = set(str(folder.resolve())) & set("'*?[]")
    if odd:
        raise GeoLinkError(
            f"cache folder {folder} has {''.join(sorted(odd))!r} in its path, which QuackOSM "
            "cannot read; set `cache` to another folder"
        )
    survey = _survey(pbf, source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="converting-") as name:
            work = Path(name)
            _run_quackosm(pbf, work)
            _write_features(pbf, source, survey, work)
            os.replace(work / "tags.parquet", tag_counts)
            os.replace(work / "features.parquet", parquet)
    except (OSError, duckdb.Error) as error:
        raise GeoLinkError(f"cannot convert {pbf} in cache folder {folder}: {error}") from error


def _run_quackosm(pbf: Path, work: Path) -> None:
    """QuackOSM's conversion, every feature with all its tags, to `work/all.parquet`."""
    install_spatial()
    # Under a name of our own: QuackOSM does not quote the path in its SQL.
    link = work / "extract.osm.pbf"
    link.symlink_to(pbf.resolve())
    done = subprocess.run(
        [sys.executable, "-c", _QUACKOSM, str(link), str(work / "all.parquet"), str(work)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise GeoLinkError(
            f"QuackOSM could not convert {pbf}: {reason}; check the file with `osmium fileinfo -e` "
            "and that memory and disk suffice"
        )


def install_spatial() -> None:
    """Make DuckDB's spatial extension loadable: from its wheel, else from DuckDB's server.

    Raises GeoLinkError where neither can be had.
    """
    con = duckdb.connect()
    try:
        if importlib.util.find_spec("duckdb_extension_spatial"):
            from duckdb_extensions import import_extension

            import_extension("spatial", con=con)
        else:
            con.install_extension("spatial")
        con.load_extension("spatial")
    except duckdb.Error as error:
        raise GeoLinkError(
            f"DuckDB {duckdb.__version__} has no spatial extension ({error}); install the package "
            f"duckdb-extension-spatial=={duckdb.__version__}, and let the home folder be writable"
        ) from error
    finally:
        con.close()


_FEATURES = """
CREATE TABLE features AS
WITH kept AS (
  SELECT
    split_part(feature_id, '/', 2)::BIGINT << 2
      | CASE split_part(feature_id, '/', 1) WHEN 'node' THEN 1 WHEN 'way' THEN 2 ELSE 3 END AS osm,
    -- Where the rings of a relation begin depends on the order its ways were joined in.
    CASE WHEN feature_id LIKE 'relation/%' THEN ST_Normalize(geometry) ELSE geometry END AS shape,
    list_sort([
      t.key || '=' || t.value FOR t IN map_entries(tags)
      IF NOT regexp_full_match(t.key, $drop) AND regexp_full_match(t.key, $keep)
    ]) AS tags
  FROM read_parquet($all)
)
SELECT
  osm, shape AS geometry,
  ST_XMin(shape) AS xmin, ST_YMin(shape) AS ymin, ST_XMax(shape) AS xmax, ST_YMax(shape) AS ymax,
  tags,
  md5_number_lower(concat_ws(chr(31), osm, array_to_string(tags, chr(31)), hex(ST_AsWKB(shape))))
    AS digest
FROM kept
"""

_SORTED = """
SELECT f.* FROM features f, (SELECT
  {'min_x': min(xmin), 'min_y': min(ymin), 'max_x': max(xmax), 'max_y': max(ymax)}::BOX_2D AS box
  FROM features) extent
ORDER BY ST_Hilbert((xmin + xmax) / 2, (ymin + ymax) / 2, extent.box), osm
"""

_TAG_COUNTS = """
SELECT split_part(tag, '=', 1) AS key, substr(tag, strpos(tag, '=') + 1) AS value,
  count(*) AS objects
FROM (SELECT unnest(tags) AS tag FROM features) GROUP BY ALL ORDER BY key, value
"""


def _write_features(pbf: Path, source: OsmSource, survey: _Survey, work: Path) -> None:
    """Filter tags, sort, and write `features.parquet` and `tags.parquet` into `work`."""
    all_features = str(work / "all.parquet")
    with duckdb.connect(str(work / "sort.duckdb")) as con:
        con.load_extension("spatial")
        con.execute("SET enable_progress_bar = false")
        types = con.execute(
            "SELECT split_part(feature_id, '/', 1), count(*) FROM read_parquet(?) GROUP BY 1",
            [all_features],
        ).fetchall()
        returned = Counter(dict(types))
        con.execute(
            _FEATURES,
            {
                "all": all_features,
                "drop": any_glob(source.drop_keys),
                "keep": any_glob(source.keep_keys or ("*",)),
            },
        )
        counts = {
            "osm_way_incomplete": survey.ways - returned["way"],
            "osm_relation_incomplete": survey.areas - returned["relation"],
            "osm_relation_without_geometry": survey.relations,
            "osm_way_without_length": _delete(
                con, "osm & 3 = 2 AND ST_GeometryType(geometry) = 'POINT'"
            ),
            "osm_filtered": _delete(con, "len(tags) = 0"),
            # No rectangle of degrees holds it; OSM splits areas at 180 degrees, so these are few.
            "osm_spans_antimeridian": _delete(con, "xmax - xmin > 180"),
        }
        (objects,) = con.execute("SELECT count(*) FROM features").fetchone() or (0,)
        if not objects:
            raise GeoLinkError(
                f"no feature of {pbf} is left with a tag; drop fewer keys or keep others"
            )
        about = {
            "osm_timestamp": survey.osm_timestamp,
            "objects": objects,
            "counts": {k: n for k, n in counts.items() if n},
        }
        _copy(con, _SORTED, work / "features.parquet", json.dumps(about))
        _copy(con, _TAG_COUNTS, work / "tags.parquet", "{}")


def _delete(con: duckdb.DuckDBPyConnection, condition: str) -> int:
    (n,) = con.execute(f"DELETE FROM features WHERE {condition}").fetchone() or (0,)  # noqa: S608
    return int(n)


def _copy(con: duckdb.DuckDBPyConnection, query: str, path: Path, about: str) -> None:
    con.execute(
        f"COPY ({query}) TO $path (FORMAT parquet, COMPRESSION zstd, "
        f"ROW_GROUP_SIZE {_ROW_GROUP}, KV_METADATA {{geolink: $about}})",
        {"path": str(path), "about": about},
    )


def any_glob(patterns: Sequence[str]) -> str:
    """Regular expression for any of some patterns, in which `*` stands for any text."""
    return "|".join(f"(?:{re.escape(p).replace(re.escape('*'), '.*')})" for p in patterns) or "a^"
