"""Chips, objects and relations as (Geo)Parquet.

A shard holds no outlines, so an object's geometry here is a point on it, in degrees (OGC:CRS84);
its kind says what it is, and its OSM id leads to the outline. This way an export needs the dataset
alone, wherever it lies, and says nothing that the dataset does not.
"""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from schemas.chips import ShardPart
from schemas.grid import to_lonlat
from schemas.layout import Kind, OsmType, Relation
from schemas.storage_local import LocalStorage


def write_tables(part: ShardPart, folder: Path) -> None:
    """Write `tables/chips/`, `tables/objects/`, `tables/relations/<shard>.parquet`.

    Raises GeoLinkError if a file cannot be written.
    """
    for name, table in (
        ("chips", chip_table(part)), ("objects", object_table(part)),
        ("relations", relation_table(part)),
    ):  # fmt: skip
        data = BytesIO()
        pq.write_table(table, data, compression="zstd")
        LocalStorage(folder).write(f"tables/{name}/{part.shard}.parquet", data.getvalue())


def chip_table(part: ShardPart) -> pa.Table:
    """One row a chip: footprint, identity, acquisition, share of each class."""
    a = part.arrays
    x0, y0, x1, y1 = a["bounds"].T
    ring = np.stack([[x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0]], axis=-1).transpose(1, 0, 2)
    lonlat = _degrees(ring.reshape(-1, 2), np.repeat(a["epsg"], 5)).reshape(-1, 5, 2)
    columns = {
        "chip": part.names,
        "shard": [part.shard] * len(x0),
        "split": [part.row.split] * len(x0),
        "file": part.stems,
        "scene": pa.array(part.scenes, pa.string()),
        "time": pa.array(part.times, pa.timestamp("s", "UTC")),
        "epsg": a["epsg"],
        "bounds_utm": _fixed(a["bounds"]),
        "valid": a["valid"],
        "objects": np.diff(a["object_offset"]),
        **{
            f"fraction_{name}": a["label_region"][:, n]
            for n, name in enumerate(part.info.taxonomy.names)
        },
    }
    return _geoparquet(columns, shapely.polygons(lonlat), part)


def object_table(part: ShardPart) -> pa.Table:
    """One row an object: a point on it, its place among the chip's objects, identity, size, tags.

    The point is the node itself, the centroid of a line, an interior point of a polygon.
    """
    a = part.arrays
    counts = np.diff(a["object_offset"])
    chip = np.repeat(np.arange(len(counts)), counts)
    x0, y0, x1, y1 = a["bounds"][chip].T
    anchor = a["object_anchor"].astype(np.float64)
    at = anchor[:, 0]
    metres = np.stack([x0 + at[:, 0] * (x1 - x0), y1 - at[:, 1] * (y1 - y0)], axis=1)
    classes = ("none", *part.info.taxonomy.names)
    columns = {
        "chip": _named(part.names, chip),
        "object": np.arange(len(chip)) - a["object_offset"][chip],
        "kind": _named([kind.name.lower() for kind in Kind], a["object_kind"]),
        "class": _named(classes, a["object_class"]),
        "osm_type": _named([t.name.lower() for t in OsmType], a["object_osm"] & 3),
        "osm_id": a["object_osm"] >> 2,
        "size": a["object_size"],
        "anchor": _fixed(a["object_anchor"].reshape(len(chip), 8)),
        "tags": _tags(part),
    }
    points = shapely.points(_degrees(metres, a["epsg"][chip]))
    return _geoparquet(columns, points, part)


def relation_table(part: ShardPart) -> pa.Table:
    """One row a directed relation: source and target count the chip's objects, as `object` does."""
    a = part.arrays
    counts = np.diff(a["edge_offset"])
    chip = np.repeat(np.arange(len(counts)), counts)
    return pa.table(
        {
            "chip": _named(part.names, chip),
            "source": a["edge"][:, 0],
            "target": a["edge"][:, 1],
            "relation": _named([r.name.lower() for r in Relation], a["relation"]),
        }
    )


def _degrees(metres: NDArray[np.float64], epsg: NDArray[np.int32]) -> NDArray[np.float64]:
    """(lon, lat) [N, 2] of (easting, northing) [N, 2] in the zones [N]."""
    found = np.empty_like(metres)
    for zone in np.unique(epsg).tolist():
        rows = epsg == zone
        found[rows] = np.stack(to_lonlat(zone).transform(*metres[rows].T), axis=1)
    return found


def _named(names: Any, codes: NDArray[Any]) -> pa.Array:
    indices = pa.array(codes.astype(np.int32))
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(names), pa.string())).cast(
        pa.string()
    )


def _fixed(values: NDArray[Any]) -> pa.Array:
    width = values.shape[1]
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), width)


def _tags(part: ShardPart) -> pa.Array:
    """Tags of each object as a map from key to value."""
    parts = [text.partition("=") for text in part.tag_texts()]
    keys = pa.array([key for key, _, _ in parts], pa.string())
    values = pa.array([value for _, _, value in parts], pa.string())
    rows = pa.array(part.arrays["object_tag"])
    offsets = pa.array(part.arrays["object_tag_offset"].astype(np.int32))
    return pa.MapArray.from_arrays(offsets, keys.take(rows), values.take(rows))


def _geoparquet(columns: dict[str, Any], geometry: NDArray[Any], part: ShardPart) -> pa.Table:
    """A table with a geometry column in degrees (GeoParquet 1.1: no `crs` means OGC:CRS84)."""
    table = pa.table({**columns, "geometry": pa.array(shapely.to_wkb(geometry), pa.binary())})
    about: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": sorted({g.geom_type for g in geometry[:1]}),
    }
    if len(geometry):
        about["bbox"] = shapely.total_bounds(geometry).tolist()
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": about}}
    return table.replace_schema_metadata(
        {
            "geo": json.dumps(geo),
            "licence": part.info.licence,
            "attribution": "; ".join(part.info.attribution),
        }
    )
