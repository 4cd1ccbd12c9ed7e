"""OSM extracts: found, fetched, merged and converted once, kept by content, asked by place."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from pipelines.download import download, remove_superseded
from pipelines.gc import GRACE
from pipelines.osm_convert import check_keys, check_pbf, convert_pbf, survey_pbf
from pipelines.osm_find import find_extracts
from pipelines.osm_merge import merge_pbfs
from pipelines.remote import public
from schemas.errors import GeoLinkError
from schemas.grid import Bounds
from schemas.sources import OsmSource, Region
from schemas.storage_local import locked

STAGE_VERSION = 4
"""Raise it when the converted file changes for the same input."""


@dataclass(frozen=True)
class Extract:
    """A converted OSM extract, or several merged into one.

    `parquet`: GeoParquet, one row a feature, along a Hilbert curve, wide ones after the others:
    `osm` int64 (id << 2 | type), `geometry` (WKB, lon/lat), `xmin`, `ymin`, `xmax`, `ymax`
    (degrees), `tags` (sorted list of `key=value`, filtered), `digest` uint64 (of id, tags and
    geometry). `tag_counts`: Parquet of key, value, objects.
    """

    source: str
    """Paths and addresses, as in the config or as found."""
    parquet: Path
    tag_counts: Path
    key: str
    sha256: str
    """Of the PBF file; of several, of their hashes in order."""
    osm_timestamp: str
    """Of the data, of several the oldest, ISO 8601 UTC; empty where a file does not tell."""
    objects: int
    bytes: int
    """Of the PBF files."""
    counts: dict[str, int]
    """Features left out or changed, and what was found of the extracts."""


def extract_of(source: OsmSource, region: Region, cache: Path) -> Extract:
    """The extract of a config: found for the region, downloaded, merged and converted as need be.

    Raises GeoLinkError: none found or fetched, and as `convert_extracts`.
    """
    names, counts = source.pbf, dict[str, int]()
    if source.find is not None:
        names, counts = find_extracts(region, source.find)
    fetched = cache / "osm" / "downloaded"
    pbfs = [download(n, fetched, ".osm.pbf") if "://" in n else Path(n) for n in names]
    extract = convert_extracts(pbfs, cache, source)
    remove_superseded(fetched, GRACE)
    return replace(extract, source=public(", ".join(names)), counts={**extract.counts, **counts})


def convert_extracts(pbfs: Sequence[Path], cache: Path, source: OsmSource) -> Extract:
    """Convert PBF files into one extract, or find it converted already under the same content.

    Several are merged: an element in two of them counts once, in its newest version. The result
    does not depend on their order. What a killed run left behind is removed.

    Raises GeoLinkError: file missing, empty, truncated, damaged or not PBF; nothing tagged in it; a
    kept key that does not occur; cache folder not writable; spatial extension not to be had.
    """
    for pbf in pbfs:
        check_pbf(pbf)
    by_hash = {_sha256(pbf): pbf for pbf in pbfs}
    hashes = sorted(by_hash)
    parts = [hashes, source.drop_keys, source.keep_keys, STAGE_VERSION, version("quackosm")]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = cache / "osm"
    parquet, tag_counts = folder / f"{key}.parquet", folder / f"{key}-tags.parquet"
    if not (parquet.exists() and tag_counts.exists()):
        _convert([by_hash[h] for h in hashes], source, parquet, tag_counts)
    joined = hashlib.sha256("".join(hashes).encode()).hexdigest()
    about = json.loads(pq.read_metadata(parquet).metadata[b"geolink"])
    return Extract(
        source=", ".join(str(p) for p in pbfs), parquet=parquet, tag_counts=tag_counts, key=key,
        sha256=hashes[0] if len(hashes) == 1 else joined,
        osm_timestamp=about["osm_timestamp"], objects=about["objects"],
        bytes=sum(p.stat().st_size for p in by_hash.values()), counts=about["counts"],
    )  # fmt: skip


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(pbfs: Sequence[Path], source: OsmSource, parquet: Path, tag_counts: Path) -> None:
    """Merge and convert in a working folder beside the results, then rename; the Parquet last.

    pbfs: in order of their hashes.
    """
    surveys = [survey_pbf(pbf, source) for pbf in pbfs]
    name = ", ".join(str(p) for p in pbfs)
    check_keys(name, source, frozenset[str]().union(*(s.keys for s in surveys)))
    oldest = min(s.osm_timestamp for s in surveys)  # an unknown time is empty, and comes first
    try:
        parquet.parent.mkdir(parents=True, exist_ok=True)
        with _working_folder(parquet.parent / f"converting-{parquet.stem}") as work:
            if parquet.exists() and tag_counts.exists():  # another process was faster
                return
            pbf, survey, counts = pbfs[0], surveys[0], dict[str, int]()
            if len(pbfs) > 1:
                newest_first = sorted(
                    range(len(pbfs)), key=lambda i: surveys[i].osm_timestamp, reverse=True
                )
                pbf = work / "merged.osm.pbf"
                counts = merge_pbfs([pbfs[i] for i in newest_first], pbf)
                survey = replace(survey_pbf(pbf, source), osm_timestamp=oldest)
            convert_pbf(pbf, source, survey, work, counts, name)
            os.replace(work / "tags.parquet", tag_counts)
            os.replace(work / "features.parquet", parquet)
    except (OSError, duckdb.Error) as error:
        raise GeoLinkError(
            f"cannot convert {name} in cache folder {parquet.parent}: {error}"
        ) from error


@contextmanager
def _working_folder(work: Path) -> Iterator[Path]:
    """An empty folder that no other process uses, removed at the end.

    It is locked while it is in use, and the system frees the lock of a process that dies: so
    folders that are not locked were left by killed runs, and are removed.
    """
    for other in work.parent.glob("converting-*"):
        if other != work:
            _remove_if_free(other)
    while True:
        work.mkdir(exist_ok=True)
        before = work.stat().st_ino
        with locked(work):
            # Who held it before has removed it at the end: then start over with a new one.
            if not work.exists() or work.stat().st_ino != before:
                continue
            for left in list(work.iterdir()):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
            return


def _remove_if_free(work: Path) -> None:
    try:
        with locked(work, wait=False) as free:
            if free:
                shutil.rmtree(work, ignore_errors=True)
    except FileNotFoundError:  # its user has just finished
        return


def age_findings(
    extract: Extract, max_age_days: float | None, images_until: datetime | None
) -> dict[str, int]:
    """`osm_extract_stale` if the data is older than so many days at the time of the images.

    The clock plays no part: the same inputs give the same findings at any time. `osm_age_unknown`
    where the extract does not tell its time, or nothing that of the images.
    """
    if max_age_days is None:
        return {}
    if not extract.osm_timestamp or images_until is None:
        return {"osm_age_unknown": 1}
    stated = datetime.fromisoformat(extract.osm_timestamp)
    age = images_until - (stated if stated.tzinfo else stated.replace(tzinfo=UTC))
    return {"osm_extract_stale": 1} if age.total_seconds() > max_age_days * 86400.0 else {}


def block_digests(extract: Extract, boxes: Sequence[Bounds]) -> list[str]:
    """Hash of the features whose bounding box meets each box of degrees, in any order of rows.

    `EMPTY_DIGEST` where there is none. A box with west > east crosses the antimeridian. Only row
    groups that meet a box are read; memory does not grow with the extract.
    """
    query, box_of = _split_at_antimeridian(boxes)
    count = np.zeros(len(boxes), np.int64)
    total = np.zeros(len(boxes), np.uint64)
    mixed = np.zeros(len(boxes), np.uint64)
    tree = shapely.STRtree(shapely.box(*query.T))
    columns = ["xmin", "ymin", "xmax", "ymax", "digest"]
    # Without its read-ahead, which would hold those columns of every row group at once.
    with pq.ParquetFile(extract.parquet, pre_buffer=False) as file:
        bounds = row_group_bounds(file.metadata)
        groups = np.unique(tree.query(shapely.box(*bounds.T), predicate="intersects")[0])
        for batch in file.iter_batches(65_536, row_groups=groups.tolist(), columns=columns):
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


def check_reach(extract: Extract, boxes: Sequence[Bounds], region: BaseGeometry) -> None:
    """Raises GeoLinkError if an extract reaches into none of some boxes, which cover the region."""
    bounds = row_group_bounds(pq.read_metadata(extract.parquet))
    query, _ = _split_at_antimeridian(
        [(w, s, (e + 180.0) % 360.0 - 180.0 if e > 180.0 else e, n) for w, s, e, n in boxes]
    )
    tree = shapely.STRtree(shapely.box(*query.T))
    if not len(tree.query(shapely.box(*bounds.T), predicate="intersects")[0]):
        raise GeoLinkError(no_object(extract, region))


def no_object(extract: Extract, region: BaseGeometry) -> str:
    """The message for a region (degrees) that no feature of an extract meets."""
    bounds = row_group_bounds(pq.read_metadata(extract.parquet))
    west, south = bounds[:, :2].min(axis=0).tolist()
    east, north = bounds[:, 2:].max(axis=0).tolist()
    there = shapely.box(west, south, east, north)
    swapped = shapely.transform(region, lambda xy: xy[:, ::-1])
    hint = (
        "the region would lie in it with longitude and latitude swapped: give longitude first"
        if shapely.intersects(there, swapped)
        else "give one that covers it"
    )
    return (
        f"the extract {extract.source} has no object in the region: it reaches from "
        f"({west:.4g}, {south:.4g}) to ({east:.4g}, {north:.4g}); {hint}"
    )


def row_group_bounds(metadata: pq.FileMetaData) -> NDArray[np.float64]:
    """Bounds of the features of each row group of an extract, [G, 4] degrees, by its statistics."""
    column = {metadata.schema.column(i).name: i for i in range(metadata.num_columns)}
    bounds = np.empty((metadata.num_row_groups, 4))
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        low = [group.column(column[c]).statistics.min for c in ("xmin", "ymin")]
        high = [group.column(column[c]).statistics.max for c in ("xmax", "ymax")]
        bounds[g] = low + high
    return bounds


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
