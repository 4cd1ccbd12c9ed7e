"""Features: OSM features of a block, projected, repaired and classified."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from pipelines.ragged import ranks
from pipelines.tags import by_id
from schemas.errors import GeoLinkError
from schemas.grid import Bounds, to_lonlat, to_utm
from schemas.layout import Kind
from schemas.taxonomy import Taxonomy

Geometries = NDArray[np.object_]
Ints = NDArray[np.int64]

HUGE_VERTICES = 4096
"""Vertices from which a feature's validity is remembered, and it is first cut to the shard."""

# Dimension of each GEOS type id: point, line, ring, polygon (collections are split before).
_DIMENSION: NDArray[np.uint8] = np.array([0, 1, 1, 2], np.uint8)


@dataclass(frozen=True)
class Features:
    """Single-part features in metres of one UTM zone, by (OSM id, part); F features."""

    geometry: Geometries
    """[F] valid Point, LineString or Polygon, (easting, northing)."""
    osm: Ints
    """[F] OSM id << 2 | type; 0 where unknown."""
    part: NDArray[np.int32]
    """[F] number of the part within its OSM feature."""
    kind: NDArray[np.uint8]
    """[F] point 0, line 1, polygon 2."""
    osm_class: NDArray[np.uint8]
    """[F] taxonomy class, 0 = none."""
    width_m: NDArray[np.float32]
    """[F] drawn width of a line in metres; 0 = not drawn, or no line."""
    tag_offset: Ints
    """[F + 1] CSR offsets of a feature's tags."""
    tag: NDArray[np.int32]
    """Index into `tags`, ascending within a feature."""
    tags: list[str]
    """Distinct `key=value`, by tag id."""
    counts: dict[str, int]
    """Features changed or left out, by reason."""


def load_features(parquet: Path, epsg: int, bounds_utm: Bounds, taxonomy: Taxonomy) -> Features:
    """Features of a converted extract whose bounding box meets a rectangle of a UTM zone.

    One query that reads only row groups near the place.

    Raises GeoLinkError if the converted extract is gone or damaged.
    """
    table = _query(parquet, to_lonlat(epsg).transform_bounds(*bounds_utm, densify_pts=21))
    geometry = shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))
    osm = table["osm"].to_numpy().astype(np.int64)
    return project_features(geometry, osm, table["tags"].combine_chunks(), epsg, taxonomy)


def project_features(
    lonlat: Geometries, osm: Ints, tags: pa.ListArray, epsg: int, taxonomy: Taxonomy
) -> Features:
    """Features [G] of a converted extract, in degrees, brought to a UTM zone and made simple.

    One projection of all coordinates. tags: lists of `key=value`.
    """
    tag_offset = np.r_[0, np.cumsum(tags.value_lengths().to_numpy())].astype(np.int64)
    coordinates, of = shapely.get_coordinates(lonlat, return_index=True)
    projected = np.stack(to_utm(epsg).transform(*coordinates.T), axis=1)
    fits = np.ones(len(lonlat), bool)
    fits[of[~np.isfinite(projected).all(axis=1)]] = False
    # A copy: coordinates are set in place.
    geometry = shapely.set_coordinates(
        lonlat.copy(), np.where(np.isfinite(projected), projected, 0.0)
    )
    counts = Counter(feature_outside_projection=int((~fits).sum()))
    rows = np.flatnonzero(fits)
    return make_features(geometry, osm, tag_offset, tags.flatten(), taxonomy, rows, counts)


def _query(parquet: Path, lonlat: Bounds) -> pa.Table:
    """Features whose box meets a box of degrees (west > east: across 180 degrees), by OSM id."""
    west, south, east, north = lonlat
    columns = "xmax >= ? AND xmin <= ?" if west <= east else "(xmax >= ? OR xmin <= ?)"
    try:
        with _database().cursor() as con:
            return con.execute(
                f"SELECT osm, geometry, tags FROM read_parquet(?) WHERE {columns} "  # noqa: S608
                "AND ymax >= ? AND ymin <= ? ORDER BY osm",
                [str(parquet), west, east, south, north],
            ).to_arrow_table()
    except duckdb.Error as error:
        raise GeoLinkError(
            f"cannot read converted extract {parquet}: {str(error).splitlines()[0]}; delete it if "
            "it is there, and build again"
        ) from error


@lru_cache(maxsize=1)
def _database() -> duckdb.DuckDBPyConnection:
    """An empty database, opened once a process: that takes longer than most queries."""
    return duckdb.connect(config={"threads": 1})


def make_features(
    geometry: Geometries,
    osm: Ints,
    tag_offset: Ints,
    texts: pa.StringArray | Sequence[str],
    taxonomy: Taxonomy,
    rows: Ints,
    counts: Counter[str],
) -> Features:
    """Repair, split and classify the features `rows` of G whole ones.

    Invalid geometries go through `make_valid` (`invalid_repaired`). Pieces of lower dimension than
    the whole, such as the spike of a polygon, are left out (`repair_piece_dropped`).

    geometry: [G] in metres. osm: [G]. tag_offset: [G + 1] into texts, `key=value`. part numbers
    count the pieces of a row. counts: findings so far, added to.
    """
    whole = geometry[rows]
    dimension = shapely.get_dimensions(whole)
    invalid = ~_are_valid(whole)
    whole[invalid] = shapely.make_valid(whole[invalid])
    parts, of = split_parts(whole)
    kept = dimensions_of(parts) == dimension[of]
    counts["invalid_repaired"] += int(invalid.sum())
    counts["repair_piece_dropped"] += int((~kept).sum())
    parts, of = parts[kept], of[kept]
    row = rows[of]

    tags, tag = _distinct(texts)
    lengths = np.diff(tag_offset)[row]
    entries = np.repeat(tag_offset[:-1][row], lengths) + ranks(lengths)
    # Only tags that are left, in order of tag id.
    used, position = np.unique(tag[entries], return_inverse=True)
    of_entry = np.repeat(np.arange(len(row)), lengths)
    of_part = position[np.lexsort([position, of_entry])].astype(np.int32)
    tags = [tags[i] for i in used.tolist()]

    kind = dimensions_of(parts)
    osm_class, width_m = _classify(tags, of_part, of_entry, kind, taxonomy)
    return Features(
        geometry=parts,
        osm=osm[row],
        part=ranks(np.bincount(of, minlength=len(rows)).astype(np.int64)).astype(np.int32),
        kind=kind,
        osm_class=osm_class,
        width_m=width_m,
        tag_offset=np.r_[0, np.cumsum(lengths)].astype(np.int64),
        tag=of_part,
        tags=tags,
        counts={k: n for k, n in counts.items() if n},
    )


def _are_valid(geometry: Geometries) -> NDArray[np.bool_]:
    """Whether geometries [G] are valid; of very large ones it is remembered."""
    valid = np.zeros(len(geometry), bool)
    large = shapely.get_num_coordinates(geometry) > HUGE_VERTICES
    valid[~large] = shapely.is_valid(geometry[~large])
    valid[large] = [_is_valid(g) for g in geometry[large]]
    return valid


@lru_cache(maxsize=32)
def _is_valid(geometry: shapely.Geometry) -> bool:
    """A coast of 100,000 corners takes half a second, and each of its shards asks again."""
    return bool(shapely.is_valid(geometry))


def split_parts(geometry: Geometries) -> tuple[Geometries, Ints]:
    """Simple, non-empty parts of geometries, and the position each comes from, ascending."""
    parts, of = shapely.get_parts(geometry, return_index=True)
    while (shapely.get_type_id(parts) > 3).any():  # a collection may hold multiparts
        parts, inner = shapely.get_parts(parts, return_index=True)
        of = of[inner]
    full = ~shapely.is_empty(parts)
    return parts[full], of[full]


def dimensions_of(parts: Geometries) -> NDArray[np.uint8]:
    """Dimension of simple geometries, which is their `Kind`."""
    dimension: NDArray[np.uint8] = _DIMENSION[shapely.get_type_id(parts)]
    return dimension


def _distinct(texts: pa.StringArray | Sequence[str]) -> tuple[list[str], Ints]:
    """Distinct texts by tag id, and the position of every text among them."""
    coded = pa.array(texts, pa.string()).dictionary_encode()
    tags = coded.dictionary.to_pylist()
    order, _ = by_id(tags)
    position = np.empty(len(tags), np.int64)
    position[order] = np.arange(len(tags))
    return [tags[i] for i in order.tolist()], position[coded.indices.to_numpy()]


class _Rules(NamedTuple):
    """What each distinct tag means: class of polygons and points, class and width of lines."""

    any_class: NDArray[np.uint8]
    line_class: NDArray[np.uint8]
    line_width: NDArray[np.float32]


def _rules(tags: Sequence[str], taxonomy: Taxonomy) -> _Rules:
    by_rule = {
        rule: (number, c.widths.get(rule, c.width_m) or 0.0)
        for number, c in enumerate(taxonomy.classes, start=1)
        for rule in c.rules
    }
    n = len(tags)
    found = _Rules(np.zeros(n, np.uint8), np.zeros(n, np.uint8), np.zeros(n, np.float32))
    for i, tag in enumerate(tags):
        key, _, value = tag.partition("=")
        rules = [tag] if value == "no" else [f"{key}=*", tag]
        matches = [by_rule[rule] for rule in rules if rule in by_rule]
        found.any_class[i] = max((number for number, _ in matches), default=0)
        # The line class of the two that is drawn last, with the width of its own rule.
        found.line_class[i], found.line_width[i] = max((m for m in matches if m[1]), default=(0, 0))
    return found


def _classify(
    tags: Sequence[str],
    tag: NDArray[np.int32],
    of_entry: Ints,
    kind: NDArray[np.uint8],
    taxonomy: Taxonomy,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Class and drawn width (m) of features from their tags.

    Every rule of a class takes polygons and points; lines are taken by rules with a width only (an
    area class that has none takes no lines). `key=*` stands for any value but `no`. Where several
    rules hold, the class drawn last, which has the highest number, wins; where several rules of
    that class give a width, the widest.
    """
    rules = _rules(tags, taxonomy)
    line = kind[of_entry] == Kind.LINE
    candidate = np.where(line, rules.line_class[tag], rules.any_class[tag])
    osm_class = np.zeros(len(kind), np.uint8)
    np.maximum.at(osm_class, of_entry, candidate)
    winner = line & (candidate == osm_class[of_entry])
    width_m = np.zeros(len(kind), np.float32)
    np.maximum.at(width_m, of_entry, np.where(winner, rules.line_width[tag], np.float32(0)))
    return osm_class, width_m
