"""The shard layout as data: one table from which writer, reader, validator and docs derive.

A shard is an immutable Zarr v3 group. N chips, M objects, E edges, T tag entries, U distinct
tags, P correspondences. Ragged parts are CSR: part n is `offset[n] .. offset[n + 1]`.
Chips are in raster order (north-west first), objects by (chip, kind, OSM id, part), edges by
(chip, source, target, relation).
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.errors import GeoLinkError

SCHEMA_VERSION = 2


class Kind(IntEnum):
    """Geometry of an object."""

    POINT = 0
    LINE = 1
    POLYGON = 2


class Relation(IntEnum):
    """Directed spatial relation of a source object to a target object (DE-9IM, within a chip)."""

    SELF = 0
    TOUCHES = 1
    OVERLAPS = 2
    COVERS = 3
    COVERED_BY = 4
    EQUALS = 5
    CROSSES = 6
    CONTAINS_POINT = 7
    WITHIN = 8
    NEAR = 9


class OsmType(IntEnum):
    """Low two bits of a typed OSM id: `object_osm = osm_id << 2 | type`; 0 where unknown."""

    UNKNOWN = 0
    NODE = 1
    WAY = 2
    RELATION = 3


class ArraySpec(NamedTuple):
    """One array of a shard."""

    name: str
    dims: tuple[str, ...]
    dtype: str
    """numpy dtype; ``image`` means the sensor's storage type."""
    meaning: str
    fill: int | float = 0
    chunk_chips: int | None = None
    """Chips in one chunk; None: the whole array is one chunk."""


LAYOUT: tuple[ArraySpec, ...] = (
    ArraySpec("image", ("chip", "band", "y", "x"), "image",
              "pixels, radiometric offset applied once; nodata as `dataset.json` states", 0, 16),
    ArraySpec("valid", ("chip",), "float32", "fraction of pixels neither nodata nor cloud"),
    ArraySpec("chip_id", ("chip", "word"), "uint64",
              "packed id: zone, GSD, size; column, row (imported pairs: 0, hash of the name)"),
    ArraySpec("epsg", ("chip",), "int32", "EPSG code of the chip's UTM zone"),
    ArraySpec("bounds", ("chip", "bound"), "float64",
              "x_min, y_min, x_max, y_max in metres of the chip's UTM zone"),
    ArraySpec("center_lonlat", ("chip", "lonlat"), "float64", "degrees: longitude, latitude"),
    ArraySpec("time", ("chip",), "int64",
              "acquisition of the main scene, seconds since 1970 UTC; int64 minimum: unknown",
              np.iinfo(np.int64).min),
    ArraySpec("scene", ("chip",), "int16",
              "index into the shard's scene ids of the scene with most pixels; -1: none", -1),
    ArraySpec("label_pixel", ("chip", "y", "x"), "uint8",
              "class by drawing order, majority of four half pixels; 0 = no OSM statement",
              0, 16),
    ArraySpec("label_patch", ("chip", "patch_y", "patch_x", "class"), "uint8",
              "area fraction of each class in each patch, x255 rounded", 0, 16),
    ArraySpec("label_region", ("chip", "class"), "float32", "area fraction of each class"),
    ArraySpec("line_density", ("chip", "class"), "float32", "length of lines of each class, m/ha"),
    ArraySpec("point_density", ("chip", "class"), "float32", "points of each class per ha"),
    ArraySpec("object_offset", ("chip_edge",), "int64", "CSR offsets of a chip's objects"),
    ArraySpec("object_kind", ("object",), "uint8", "point 0, line 1, polygon 2"),
    ArraySpec("object_class", ("object",), "uint8", "taxonomy class, 0 = none"),
    ArraySpec("object_osm", ("object",), "int64", "OSM id << 2 | type (node 1, way 2, relation 3)"),
    ArraySpec("object_size", ("object",), "float32",
              "m2 (polygons) or m (lines) after clipping; 0 for points"),
    ArraySpec("object_anchor", ("object", "anchor", "xy"), "float32",
              "chip-relative positions in [0, 1], x right, y down: polygon = 3 interior points and "
              "centroid; line = centroid, start, end, end; point = itself four times"),
    ArraySpec("object_tag_offset", ("object_edge",), "int64", "CSR offsets of an object's tags"),
    ArraySpec("object_tag", ("object_tag",), "int32", "index into `tag`"),
    ArraySpec("tag", ("tag",), "uint64", "sorted ids of the shard's distinct tags"),
    ArraySpec("tag_text_offset", ("tag_edge",), "int64", "CSR offsets of the tags' texts, bytes"),
    ArraySpec("tag_text", ("byte",), "uint8", "UTF-8 of `key=value`"),
    ArraySpec("edge_offset", ("chip_edge",), "int64", "CSR offsets of a chip's edges"),
    ArraySpec("edge", ("edge", "ends"), "int32", "source and target object, local to the chip"),
    ArraySpec("relation", ("edge",), "uint8", "relation code of source to target"),
    ArraySpec("patch_offset", ("object_edge",), "int64", "CSR offsets of an object's patches"),
    ArraySpec("patch", ("correspondence",), "uint16", "patch the object meets, row-major, y down"),
    ArraySpec("patch_weight", ("correspondence",), "uint8",
              "x255: polygons, share of the patch's area; lines, share of the object's length"),
    ArraySpec("moran", ("chip", "class"), "float32",
              "Moran's I of each class's patch fraction, queen weights; 0 for a constant field"),
    ArraySpec("lee", ("chip", "class"), "float32",
              "Lee's L between each class's patch fraction and the image's patch brightness; 0 for "
              "a constant field"),
    ArraySpec("shift", ("chip", "offset"), "float32",
              "how far the image's content lies off the objects: metres east, metres north, "
              "confidence in [0, 1] (0: nothing to go by)"),
    ArraySpec("finding", ("chip",), "uint32",
              "findings of the chip, one a bit (`docs/findings.md`)"),
)  # fmt: skip

ARRAYS: dict[str, ArraySpec] = {spec.name: spec for spec in LAYOUT}

FIXED_DIMS = {"word": 2, "bound": 4, "lonlat": 2, "anchor": 4, "xy": 2, "ends": 2, "offset": 3}
_ONE_MORE = {"chip_edge": "chip", "object_edge": "object", "tag_edge": "tag"}

UNKNOWN_TIME = np.iinfo(np.int64).min


def dimensions(arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Sizes of the named dimensions of a set of shard arrays.

    Raises GeoLinkError naming the first array that is missing, of another rank or dtype, or that
    disagrees with another one.
    """
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise GeoLinkError(f"shard array {missing[0]!r} is missing")
    unknown = [name for name in arrays if name not in ARRAYS]
    if unknown:
        raise GeoLinkError(f"{unknown[0]!r} is no array of the shard layout")
    sizes = dict(FIXED_DIMS)
    for spec in LAYOUT:
        array = arrays[spec.name]
        allowed = ("uint8", "uint16") if spec.dtype == "image" else (spec.dtype,)
        if str(array.dtype) not in allowed:
            raise GeoLinkError(
                f"shard array {spec.name!r} is {array.dtype}, not {' or '.join(allowed)}"
            )
        if array.ndim != len(spec.dims):
            raise GeoLinkError(
                f"shard array {spec.name!r} has {array.ndim} dimensions, not {len(spec.dims)}"
            )
        for dim, length in zip(spec.dims, array.shape, strict=True):
            base, n = (_ONE_MORE[dim], length - 1) if dim in _ONE_MORE else (dim, length)
            if sizes.setdefault(base, n) != n:
                raise GeoLinkError(
                    f"shard array {spec.name!r} has {n} along {base!r}, others {sizes[base]}"
                )
    return sizes


_OFFSETS = {
    "object_offset": "object", "edge_offset": "edge", "object_tag_offset": "object_tag",
    "tag_text_offset": "byte", "patch_offset": "correspondence",
}  # fmt: skip


def validate(arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Check a shard's arrays against the layout and its invariants; returns `dimensions`.

    Raises GeoLinkError on the first thing that is wrong.
    """
    sizes = dimensions(arrays)
    for name, dim in _OFFSETS.items():
        offset = arrays[name]
        if offset[0] != 0 or offset[-1] != sizes[dim] or np.any(np.diff(offset) < 0):
            raise GeoLinkError(f"shard array {name!r} is no rising offset from 0 to {sizes[dim]}")
    objects = np.diff(arrays["object_offset"])
    chip_of_edge = np.repeat(np.arange(sizes["chip"]), np.diff(arrays["edge_offset"]))
    edge = arrays["edge"]
    limits = {
        "edge": (edge, objects[chip_of_edge][:, None] if len(edge) else 1),
        "object_kind": (arrays["object_kind"], len(Kind)),
        "object_class": (arrays["object_class"], sizes["class"] + 1),
        "label_pixel": (arrays["label_pixel"], sizes["class"] + 1),
        "relation": (arrays["relation"], len(Relation)),
        "object_tag": (arrays["object_tag"], sizes["tag"]),
        "patch": (arrays["patch"], sizes["patch_y"] * sizes["patch_x"]),
    }
    for name, (array, limit) in limits.items():
        if array.size and (np.any(array < 0) or np.any(array >= limit)):
            raise GeoLinkError(f"shard array {name!r} holds an index out of range")
    if np.any(arrays["tag"][1:] <= arrays["tag"][:-1]):
        raise GeoLinkError("shard array 'tag' is not sorted or has a duplicate")
    anchor = arrays["object_anchor"]
    if anchor.size and not bool(((anchor >= 0) & (anchor <= 1)).all()):
        raise GeoLinkError("shard array 'object_anchor' leaves [0, 1]")
    return sizes


def layout_table() -> str:
    """The layout as a Markdown table."""
    rows = ["| array | shape | dtype | meaning |", "|---|---|---|---|"]
    for s in LAYOUT:
        dtype = "uint8 or uint16" if s.dtype == "image" else s.dtype
        rows.append(f"| `{s.name}` | [{', '.join(s.dims)}] | {dtype} | {s.meaning} |")
    return "\n".join(rows)
