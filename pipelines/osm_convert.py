"""One PBF file becomes one GeoParquet file: QuackOSM, then tags filtered and rows along a curve.

Which features there are is QuackOSM's rule: every tagged node is a point; a tagged way is a line,
or a polygon if it is closed and its tags mean an area (its `osm_way_polygon_features` table, but
roundabouts stay lines; `area=yes` and `area=no` decide where given); relations of type multipolygon
and boundary become (multi)polygons when all their member ways are in the extract. Other relations
(routes, turn restrictions, ...) have no geometry of their own and are counted, as are incomplete
ones and ways whose nodes all lie in one place.
"""

import difflib
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import osmium

from schemas.errors import GeoLinkError
from schemas.sources import OsmSource

_PBF_MAGIC = b"\n\x09OSMHeader"
_ROW_GROUP = 10_240
_MEMORY_SHARE = 0.3
"""Of what DuckDB would take, four fifths of the machine's memory; what does not fit is spilled."""

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
limit = {"memory_limit": sys.argv[4]}
convert_pbf_to_parquet(
    sys.argv[1], tags_filter=None, keep_all_tags=True, explode_tags=False, sort_result=False,
    ignore_metadata_tags=False, ignore_cache=True, verbosity_mode="silent",
    osm_way_polygon_features_config=areas,
    result_file_path=sys.argv[2], working_directory=sys.argv[3],
    duckdb_conn_kwargs={"config_kwargs": limit},
)
"""


def check_pbf(pbf: Path) -> None:
    """Raises GeoLinkError where a file is missing, empty or not PBF by its first bytes."""
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
class Survey:
    """What a PBF holds, counted with libosmium: the measure of what a conversion must return."""

    nodes: int
    ways: int
    areas: int
    """Relations of type multipolygon or boundary."""
    relations: int
    """Relations of any other type."""
    osm_timestamp: str
    keys: frozenset[str]
    """Of all tags, where the config keeps only some."""


def survey_pbf(pbf: Path, source: OsmSource) -> Survey:
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
    return Survey(
        found["n"], found["w"], found["area"], found["r"], stated or newest, frozenset(keys)
    )


def check_keys(name: str, source: OsmSource, keys: frozenset[str]) -> None:
    """Raises GeoLinkError for a kept key that does not occur, with the nearest that does."""
    for pattern in source.keep_keys:
        if not any(map(re.compile(any_glob((pattern,))).fullmatch, keys)):
            near = difflib.get_close_matches(pattern, sorted(keys), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise GeoLinkError(f"keep_keys: nothing in {name} has a key {pattern!r}{hint}")


def convert_pbf(
    pbf: Path, source: OsmSource, survey: Survey, work: Path, counts: dict[str, int], name: str
) -> None:
    """Write `features.parquet` and `tags.parquet` (see `pipelines.osm.Extract`) into `work`.

    counts: findings so far, which are stored with the others. name: what messages call the input.

    Raises GeoLinkError or duckdb.Error if it cannot be converted.
    """
    odd = set(str(work.resolve())) & set("'*?[]")
    if odd:
        raise GeoLinkError(
            f"cache folder {work.parent} has {''.join(sorted(odd))!r} in its path, which QuackOSM "
            "cannot read; set `cache` to another folder"
        )
    _run_quackosm(pbf, work, name)
    _write_features(name, source, survey, work, counts)


def _run_quackosm(pbf: Path, work: Path, name: str) -> None:
    """QuackOSM's conversion, every feature with all its tags, to `work/all.parquet`."""
    install_spatial()
    # Under a name of our own: QuackOSM does not quote the path in its SQL.
    link = work / "extract.osm.pbf"
    link.symlink_to(pbf.resolve())
    done = subprocess.run(
        [
            sys.executable, "-c", _QUACKOSM, str(link), str(work / "all.parquet"), str(work),
            memory_limit(),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise GeoLinkError(
            f"QuackOSM could not convert {name}: {reason}; check the file with "
            "`osmium fileinfo -e`, and that memory and disk suffice"
        )


def memory_limit() -> str:
    """How much memory a conversion's DuckDB may take before it spills to disk beside the cache."""
    with duckdb.connect() as con:
        query = "SELECT current_setting('memory_limit')"
        (text,) = con.execute(query).fetchone() or ("4 GiB",)
    number, unit = str(text).split()
    mib = float(number) * 1024 ** ("MiB", "GiB", "TiB").index(unit)
    return f"{max(512.0, mib * _MEMORY_SHARE):.0f}MiB"


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


# Control characters, and marks that turn the direction of text: they can hide a key from the tag
# filter or garble a terminal, and are never content. Letters of any script stay as they are.
_CONTROL = r"[\x00-\x1f\x7f-\x{9f}\x{200e}\x{200f}\x{202a}-\x{202e}\x{2066}-\x{2069}]"

_FEATURES = """
CREATE TABLE features AS
WITH entries AS (
  SELECT feature_id, geometry, regexp_matches(tags::VARCHAR, $control) AS cleaned,
    [{'key': regexp_replace(t.key, $control, '', 'g'),
      'value': regexp_replace(t.value, $control, '', 'g')} FOR t IN map_entries(tags)] AS tags
  FROM read_parquet($all)
), kept AS (
  SELECT
    split_part(feature_id, '/', 2)::BIGINT << 2
      | CASE split_part(feature_id, '/', 1) WHEN 'node' THEN 1 WHEN 'way' THEN 2 ELSE 3 END AS osm,
    -- Where the rings of a relation begin depends on the order its ways were joined in.
    CASE WHEN feature_id LIKE 'relation/%' THEN ST_Normalize(geometry) ELSE geometry END AS shape,
    list_sort(list_distinct([
      t.key || '=' || t.value FOR t IN tags
      IF NOT regexp_full_match(t.key, $drop) AND regexp_full_match(t.key, $keep)
    ])) AS tags, cleaned
  FROM entries
)
SELECT
  osm, shape AS geometry,
  ST_XMin(shape) AS xmin, ST_YMin(shape) AS ymin, ST_XMax(shape) AS xmax, ST_YMax(shape) AS ymax,
  tags, cleaned,
  md5_number_lower(concat_ws(chr(31), osm, array_to_string(tags, chr(31)), hex(ST_AsWKB(shape))))
    AS digest
FROM kept
"""

# Wide features (borders, rivers, power lines) in row groups of their own: one of them among its
# small neighbours would stretch the bounds of the whole group over all that it meets.
_SORTED = """
SELECT f.* EXCLUDE (cleaned) FROM features f, (SELECT
  {'min_x': min(xmin), 'min_y': min(ymin), 'max_x': max(xmax), 'max_y': max(ymax)}::BOX_2D AS box
  FROM features) extent
ORDER BY
  greatest(xmax - xmin, ymax - ymin) > 0.01, greatest(xmax - xmin, ymax - ymin) > 0.1,
  ST_Hilbert((xmin + xmax) / 2, (ymin + ymax) / 2, extent.box), osm
"""

_TAG_COUNTS = """
SELECT split_part(tag, '=', 1) AS key, substr(tag, strpos(tag, '=') + 1) AS value,
  count(*) AS objects
FROM (SELECT unnest(tags) AS tag FROM features) GROUP BY ALL ORDER BY key, value
"""


def _write_features(
    name: str, source: OsmSource, survey: Survey, work: Path, merged: dict[str, int]
) -> None:
    """Filter tags, sort, and write `features.parquet` and `tags.parquet` into `work`."""
    all_features = str(work / "all.parquet")
    with duckdb.connect(str(work / "sort.duckdb"), config={"memory_limit": memory_limit()}) as con:
        con.load_extension("spatial")
        con.execute("SET enable_progress_bar = false")
        con.execute("SET preserve_insertion_order = false")
        types = con.execute(
            "SELECT split_part(feature_id, '/', 1), count(*) FROM read_parquet(?) GROUP BY 1",
            [all_features],
        ).fetchall()
        returned = Counter(dict(types))
        con.execute(
            _FEATURES,
            {
                "all": all_features,
                "control": _CONTROL,
                "drop": any_glob(source.drop_keys),
                "keep": any_glob(source.keep_keys or ("*",)),
            },
        )
        counts = {
            **merged,
            "osm_way_incomplete": survey.ways - returned["way"],
            "osm_relation_incomplete": survey.areas - returned["relation"],
            "osm_relation_without_geometry": survey.relations,
            "osm_way_without_length": _delete(
                con, "osm & 3 = 2 AND ST_GeometryType(geometry) = 'POINT'"
            ),
            "osm_filtered": _delete(con, "len(tags) = 0"),
            "osm_tag_cleaned": _count(con, "cleaned"),
            # QuackOSM repairs what is invalid without a word; a way in several parts tells of it.
            "osm_way_repaired": _count(
                con, "osm & 3 = 2 AND ST_GeometryType(geometry) NOT IN ('LINESTRING', 'POLYGON')"
            ),
            # No rectangle of degrees holds it; OSM splits areas at 180 degrees, so these are few.
            "osm_spans_antimeridian": _delete(con, "xmax - xmin > 180"),
        }
        (objects,) = con.execute("SELECT count(*) FROM features").fetchone() or (0,)
        if not objects:
            raise GeoLinkError(
                f"no feature of {name} is left with a tag; drop fewer keys or keep others"
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


def _count(con: duckdb.DuckDBPyConnection, condition: str) -> int:
    query = f"SELECT count(*) FROM features WHERE {condition}"  # noqa: S608 - own condition
    (n,) = con.execute(query).fetchone() or (0,)
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
