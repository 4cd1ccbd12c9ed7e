"""A static STAC 1.1 catalog of a dataset: a collection, and an item for each shard.

Extensions: projection 2.0 (places), label 1.0.1 and classification 2.0 (masks), table 1.2
(Parquet), raster 2.0 (scale and offset). The mlm extension describes models, not data, and is left
out. An item links to the shard itself and to the files of the other formats that were exported.
"""

import json
import os
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from pipelines.export.rasters import legend, transforms
from pipelines.export.tables import chip_table, object_table, relation_table
from schemas.chips import ShardPart
from schemas.dataset import DatasetInfo, Snapshot
from schemas.grid import to_lonlat
from schemas.storage import Location, join
from schemas.storage_local import LocalStorage

_VERSION = "1.1.0"
_EXTENSIONS = {
    name: f"https://stac-extensions.github.io/{name}/v{version}/schema.json"
    for name, version in (
        ("classification", "2.0.0"), ("label", "1.0.1"), ("projection", "2.0.0"),
        ("raster", "2.0.0"), ("table", "1.2.0"),
    )
}  # fmt: skip
_ALWAYS = ("0001-01-01T00:00:00Z", "9999-12-31T00:00:00Z")
_PARQUET = "application/vnd.apache.parquet"


def write_item(
    part: ShardPart, folder: Path, *, dataset: Location, formats: Collection[str]
) -> None:
    """Write `stac/items/<shard>.json`.

    formats: those whose files lie in the folder too.

    Raises GeoLinkError if the file cannot be written.
    """
    assets = {"shard": _shard_asset(part, folder, dataset)}
    if "geotiff" in formats:
        assets |= _images(part)
    if "png" in formats:
        assets |= _labels(part)
    if "geoparquet" in formats:
        assets |= _tables(part)
    if "webdataset" in formats:
        href = f"../../webdataset/{part.row.split}/{part.shard}.tar"
        assets["webdataset"] = {"href": href, "type": "application/x-tar", "roles": ["data"]}
    if "pyg" in formats:
        href = f"../../pyg/{part.row.split}/{part.shard}.pt"
        assets["pyg"] = {"href": href, "type": "application/octet-stream", "roles": ["data"]}
    geometry = footprint(part)
    item = {
        "type": "Feature",
        "stac_version": _VERSION,
        "stac_extensions": list(_EXTENSIONS.values()),
        "id": part.shard,
        "collection": _identifier(part.info),
        "geometry": json.loads(shapely.to_geojson(geometry)),
        "bbox": _bbox(geometry),
        "properties": _properties(part),
        "links": [
            _link("root", "../catalog.json"),
            _link("parent", "../collection.json"),
            _link("collection", "../collection.json"),
        ],
        "assets": assets,
    }
    _write(folder, f"stac/items/{part.shard}.json", item)


def write_collection(found: Snapshot, folder: Path) -> None:
    """Write `stac/catalog.json` and `stac/collection.json` over the items that are written.

    Raises GeoLinkError if a file cannot be written.
    """
    info, snapshot, name = found.info, found.number, _identifier(found.info)
    boxes, times, names = [], [], []
    for path in sorted((folder / "stac/items").glob("*.json")):
        item = json.loads(path.read_bytes())
        about = item["properties"]
        found_times = (about.get(t) for t in ("datetime", "start_datetime", "end_datetime"))
        times += [t for t in found_times if t and t not in _ALWAYS]
        boxes.append(item["bbox"])
        names.append(item["id"])
    edges = np.array(boxes)
    what = f"{info.name}: image chips aligned with OpenStreetMap objects (snapshot {snapshot})."
    catalog = {
        "type": "Catalog", "stac_version": _VERSION, "id": f"{name}-catalog",
        "title": info.name, "description": what,
        "links": [_link("root", "./catalog.json"), _link("child", "./collection.json")],
    }  # fmt: skip
    collection = {
        "type": "Collection",
        "stac_version": _VERSION,
        "stac_extensions": [_EXTENSIONS["raster"], _EXTENSIONS["classification"]],
        "id": name,
        "title": info.name,
        "description": f"{what} {info.licence}. {'; '.join(info.attribution)}.",
        "license": "other",
        "providers": [{"name": text, "roles": ["licensor"]} for text in info.attribution],
        "extent": {
            "spatial": {"bbox": [[*edges[:, :2].min(axis=0), *edges[:, 2:].max(axis=0)]]},
            "temporal": {"interval": [[min(times), max(times)] if times else [None, None]]},
        },
        "summaries": {"gsd": [info.grid.gsd_m], "bands": _bands(info)},
        "item_assets": {
            "label": {"roles": ["labels"], "classification:classes": _classes(info)},
        },
        "links": [
            _link("root", "./catalog.json"),
            _link("parent", "./catalog.json"),
            {"rel": "license", "href": "../LICENSE", "type": "text/plain"},
            *(
                {"rel": "item", "href": f"./items/{item}.json", "type": "application/geo+json"}
                for item in names
            ),
        ],
        "assets": {
            "attribution": {
                "href": "../ATTRIBUTION", "type": "text/plain", "roles": ["metadata"],
            }
        },
    }  # fmt: skip
    _write(folder, "stac/collection.json", collection)
    _write(folder, "stac/catalog.json", catalog)


def footprint(part: ShardPart) -> BaseGeometry:
    """Where a shard's chips are, in degrees; cut in two where it crosses the 180th meridian."""
    whole = []
    for epsg in np.unique(part.arrays["epsg"]).tolist():
        rows = part.arrays["epsg"] == epsg
        squares = shapely.union_all(shapely.box(*part.arrays["bounds"][rows].T))
        middle = float(part.arrays["center_lonlat"][rows, 0].mean())
        transform = to_lonlat(epsg).transform

        def degrees(metres: Any, transform: Any = transform, middle: float = middle) -> Any:
            lon, lat = transform(*metres.T)
            return np.stack([(lon - middle + 180) % 360 - 180 + middle, lat], axis=1)

        whole.append(shapely.transform(squares, degrees))
    area = shapely.union_all(whole)
    if area.bounds[0] >= -180 and area.bounds[2] <= 180:
        return area
    turns = [
        shapely.transform(
            area & shapely.box(-180 + turn, -90, 180 + turn, 90), lambda xy, t=turn: xy - [t, 0]
        )
        for turn in (-360, 0, 360)
    ]
    return shapely.union_all([part for part in turns if not part.is_empty])


def _bbox(geometry: BaseGeometry) -> list[float]:
    """west, south, east, north; west > east where it crosses the 180th meridian (RFC 7946)."""
    west, south, east, north = geometry.bounds
    parts = shapely.get_parts(geometry)
    if west == -180 and east == 180 and len(parts) > 1:
        bounds = shapely.bounds(parts)
        middle = (bounds[:, 0] + bounds[:, 2]) / 2
        west, east = bounds[middle > 0, 0].min(), bounds[middle <= 0, 2].max()
    return [float(west), float(south), float(east), float(north)]


def _properties(part: ShardPart) -> dict[str, Any]:
    info, bounds = part.info, part.arrays["bounds"]
    times = sorted(t for t in part.times if t)
    zones = np.unique(part.arrays["epsg"]).tolist()
    one = len(set(times)) == 1 and len(times) == len(part.times)
    table = object_table(part)
    return {
        "datetime": _time(times[0]) if one else None,
        # STAC wants a range where there is no single time; chips of unknown time have any.
        **({} if one else {"start_datetime": _time(times[0]) if times else _ALWAYS[0],
                           "end_datetime": _time(times[-1]) if times else _ALWAYS[1]}),
        "license": "other",
        "gsd": info.grid.gsd_m,
        "proj:code": f"EPSG:{zones[0]}" if len(zones) == 1 else None,
        **({"proj:bbox": [*bounds[:, :2].min(axis=0), *bounds[:, 2:].max(axis=0)]}
           if len(zones) == 1 else {}),
        "label:type": "raster",
        "label:tasks": ["segmentation"],
        "label:methods": ["OpenStreetMap"],
        "label:description": "Land use and cover of OpenStreetMap objects, by drawing order.",
        "label:properties": None,
        "label:classes": [{"name": "class", "classes": ["none", *info.taxonomy.names]}],
        "table:columns": _columns(table),
        "table:primary_geometry": "geometry",
        "table:row_count": table.num_rows,
        "geolink:split": part.row.split,
        "geolink:content_key": part.row.key,
        "geolink:chips": len(part.names),
        "geolink:objects": len(part.arrays["object_kind"]),
        "geolink:scenes": part.row.scenes,
        "geolink:osm_timestamp": part.row.osm_timestamp or None,
        "geolink:licence": info.licence,
        "geolink:attribution": list(info.attribution),
    }  # fmt: skip


def _shard_asset(part: ShardPart, folder: Path, dataset: Location) -> dict[str, Any]:
    where = join(dataset, part.row.path)
    if isinstance(where, Path):
        where = Path(os.path.relpath(where.resolve(), (folder / "stac/items").resolve())).as_posix()
    return {
        "href": where,
        "type": "application/vnd.zarr; version=3",
        "roles": ["data"],
        "title": "The whole shard: pixels, labels, objects, relations",
        "description": "Arrays as `geolink schema shard` says; opens in xarray.",
    }


def _images(part: ShardPart) -> dict[str, Any]:
    return {
        f"{stem}.image": {
            "href": f"../../images/{part.shard}/{stem}.tif",
            "type": "image/tiff; application=geotiff",
            "roles": ["data"],
            "bands": _bands(part.info),
            **place,
        }
        for stem, place in zip(part.stems, _places(part), strict=True)
    }


def _labels(part: ShardPart) -> dict[str, Any]:
    return {
        f"{stem}.label": {
            "href": f"../../labels/{part.shard}/{stem}.png",
            "type": "image/png",
            "roles": ["labels"],
            "classification:classes": _classes(part.info),
            **place,
        }
        for stem, place in zip(part.stems, _places(part), strict=True)
    }


def _tables(part: ShardPart) -> dict[str, Any]:
    tables = {
        "chips": chip_table(part), "objects": object_table(part), "relations": relation_table(part),
    }  # fmt: skip
    return {
        name: {
            "href": f"../../tables/{name}/{part.shard}.parquet",
            "type": _PARQUET,
            "roles": ["data"],
            "table:columns": _columns(table),
            "table:row_count": table.num_rows,
            **({"table:primary_geometry": "geometry"} if "geometry" in table.column_names else {}),
        }
        for name, table in tables.items()
    }


def _places(part: ShardPart) -> list[dict[str, Any]]:
    height, width = part.arrays["label_pixel"].shape[1:]
    return [
        {
            "proj:code": f"EPSG:{epsg}",
            "proj:bbox": bounds,
            "proj:shape": [height, width],
            "proj:transform": list(transform)[:6],
        }
        for epsg, bounds, transform in zip(
            part.arrays["epsg"].tolist(), part.arrays["bounds"].tolist(), transforms(part),
            strict=True,
        )
    ]  # fmt: skip


def _bands(info: DatasetInfo) -> list[dict[str, Any]]:
    sensor = info.sensor
    return [
        {
            "name": band.name,
            "data_type": sensor.dtype,
            "nodata": sensor.nodata,
            "unit": sensor.units,
            "raster:scale": sensor.scale,
            "raster:offset": sensor.offset,
            "raster:spatial_resolution": info.grid.gsd_m,
        }
        for band in sensor.bands
    ]


def _classes(info: DatasetInfo) -> list[dict[str, Any]]:
    return [
        {
            "value": entry["value"],
            "name": entry["name"],
            "description": f"OpenStreetMap: {entry['name']}",
            "color_hint": str(entry["color"]).removeprefix("#").upper(),
        }
        for entry in legend(info.taxonomy)
    ]


def _columns(table: Any) -> list[dict[str, str]]:
    return [{"name": field.name, "type": str(field.type)} for field in table.schema]


def _identifier(info: DatasetInfo) -> str:
    return info.name.strip().lower().replace(" ", "-")


def _link(rel: str, href: str) -> dict[str, str]:
    return {"rel": rel, "href": href, "type": "application/json"}


def _time(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"


def _write(folder: Path, name: str, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    LocalStorage(folder).write(name, text.encode())
