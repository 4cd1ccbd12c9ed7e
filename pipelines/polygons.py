"""Polygons of a map of classes, with mean probability and area: GeoParquet."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Geod, Transformer
from rasterio.errors import RasterioError
from rasterio.features import rasterize, shapes
from rasterio.windows import Window
from rasterio.windows import transform as part_transform

from schemas.cf import is_utm
from schemas.errors import GeoLinkError

_ROWS = 512
"""Rows of a map that are looked at together."""


class Polygons(NamedTuple):
    """Connected cells of one class."""

    geometry: NDArray[Any]
    """[N], in the CRS of the map."""
    value: NDArray[np.uint8]
    """[N], class."""


def row_area_m2(
    crs_wkt: str, transform: tuple[float, float, float, float], shape: tuple[int, int]
) -> NDArray[np.float64]:
    """Area in m2 of a pixel of each row: in UTM of the plane, elsewhere on the ellipsoid, in the
    middle of the row.

    transform: west, north, width and height of a pixel.
    """
    west, north, width, height = transform
    crs = CRS(crs_wkt)
    if is_utm(crs.to_epsg() or 0):
        return np.full(shape[0], width * height)
    row = np.arange(shape[0])
    x, y = np.full(shape[0], west + shape[1] / 2 * width), north - (row + 0.5) * height
    to_lonlat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    left, right = (to_lonlat.transform(x + d * width / 2, y) for d in (-1, 1))
    up, down = (to_lonlat.transform(x, y + d * height / 2) for d in (1, -1))
    geod = Geod(ellps="WGS84")
    across, along = geod.inv(*left, *right)[2], geod.inv(*up, *down)[2]
    area: NDArray[np.float64] = np.multiply(across, along)
    return area


def write_polygons(
    path: Path, classes: Path, probability: Path, names: Sequence[str],
    area_m2: NDArray[np.float64],
) -> int:  # fmt: skip
    """Write the polygons of a map, cells that share a side together; how many there are.

    Memory holds the polygons, and some rows of the map. Columns: `class`, `probability` (mean over
    its cells), `cells`, `area_m2`, `geometry` in the CRS of the map.

    Args:
        path: of the GeoParquet file.
        classes: map of uint8, nodata where nothing is.
        probability: map beside it, whose scale and offset make probabilities.
        names: of the classes, by value.
        area_m2: [rows] of a cell.

    Raises GeoLinkError if a file cannot be read or written.
    """
    try:
        with rasterio.open(classes) as file, rasterio.open(probability) as sure:
            found = _trace(file)
            cells, mean, area = _measure(file, sure, found, area_m2)
            crs = CRS(file.crs.to_wkt(version="WKT2_2019"))
        table = pa.table({
            "class": pa.array(np.array(names, dtype=object)[found.value], pa.string()),
            "probability": pa.array(mean.astype(np.float32)),
            "cells": pa.array(cells),
            "area_m2": pa.array(area),
            "geometry": pa.array(shapely.to_wkb(found.geometry), pa.binary()),
        })  # fmt: skip
        about: dict[str, Any] = {
            "encoding": "WKB", "geometry_types": ["Polygon"], "crs": crs.to_json_dict(),
        }  # fmt: skip
        if len(found.value):
            about["bbox"] = shapely.total_bounds(found.geometry).tolist()
        geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": about}}
        partial = path.with_name(path.name + ".partial")
        pq.write_table(table.replace_schema_metadata({"geo": json.dumps(geo)}), partial)
        partial.replace(path)
    except (RasterioError, OSError) as error:
        raise GeoLinkError(f"cannot write {path}: {error}") from error
    return len(found.value)


def _trace(file: Any) -> Polygons:
    """Polygons from north to south, as GDAL ends them."""
    geometry, value = [], []
    for shape, of in shapes(rasterio.band(file, 1), connectivity=4, transform=file.transform):
        if of != file.nodata:
            rings = [np.array(ring) for ring in shape["coordinates"]]
            geometry.append(shapely.Polygon(rings[0], rings[1:]))
            value.append(int(of))
    return Polygons(np.array(geometry, dtype=object), np.array(value, np.uint8))


def _measure(
    file: Any, sure: Any, found: Polygons, area_m2: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Cells, mean probability and area of each polygon, whose cells are burnt a strip at a time."""
    count = len(found.value)
    cells, total, area = np.zeros(count, np.int64), np.zeros(count), np.zeros(count)
    if not count:
        return cells, total, area
    bounds = shapely.bounds(found.geometry)
    scale, offset = sure.scales[0], sure.offsets[0]
    for row in range(0, file.height, _ROWS):
        window = Window(0, row, file.width, min(_ROWS, file.height - row))
        place = part_transform(window, file.transform)
        north, south = place.f, place.f + place.e * window.height
        inside = np.flatnonzero((bounds[:, 1] < north) & (bounds[:, 3] > south))
        if not len(inside):
            continue
        drawn = ((found.geometry[n], n + 1) for n in inside.tolist())
        number = rasterize(
            drawn, out_shape=(window.height, window.width), transform=place, dtype="int32"
        )
        there = number > 0
        n = number[there] - 1
        p = sure.read(1, window=window)[there] * scale + offset
        each = np.broadcast_to(area_m2[row : row + window.height, None], number.shape)[there]
        cells += np.bincount(n, minlength=count)
        total += np.bincount(n, p, count)
        area += np.bincount(n, each, count)
    return cells, total / np.maximum(cells, 1), area
