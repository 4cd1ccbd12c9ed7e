"""What holds in every shard beyond its layout, told in sentences where it does not."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.plan import content_key
from pipelines.store import shard_path
from schemas.dataset import DatasetInfo, SnapshotRow
from schemas.grid import pack_chips
from schemas.layout import Relation, validate
from schemas.splits import split_of

Arrays = Mapping[str, NDArray[Any]]

_INVERSE = np.arange(len(Relation))
_INVERSE[[Relation.COVERS, Relation.COVERED_BY]] = [Relation.COVERED_BY, Relation.COVERS]
_INVERSE[[Relation.CONTAINS_POINT, Relation.WITHIN]] = [Relation.WITHIN, Relation.CONTAINS_POINT]

_STATED = (
    "epsg", "bounds_lonlat", "scenes", "pixels", "pixel_sum", "pixel_sum_squares", "qc",
    "chip_findings",
)  # fmt: skip
"""Fields of a snapshot's row that a shard's attributes hold too."""


def shard_faults(
    row: SnapshotRow, arrays: Arrays, attributes: Mapping[str, Any], info: DatasetInfo
) -> list[str]:
    """What is wrong with a shard, each as a sentence's end; empty: nothing.

    Raises GeoLinkError for arrays that break the layout.
    """
    sizes = validate(arrays)
    faults = [
        f"has {sizes[name]:,} {name}s, the snapshot says {stated:,}"
        for name, stated in (("chip", row.chips), ("object", row.objects), ("edge", row.edges))
        if sizes[name] != stated
    ]
    faults += [
        f"says otherwise of its {name} than the snapshot"
        for name in _STATED
        if attributes.get(name) != getattr(row, name)
    ]
    if "made_from" not in attributes:
        faults.append("does not say what it was made from")
    elif content_key(attributes["made_from"]) != row.key:
        faults.append("was made from other things than its key says")
    if row.path != shard_path(row.shard, row.key):
        faults.append("lies at another path than its key says")
    return faults + _image(arrays, row, info) + _places(arrays, row, info) + _graph(arrays)


def _image(arrays: Arrays, row: SnapshotRow, info: DatasetInfo) -> list[str]:
    """Pixels and labels against the sensor, the grid and the taxonomy."""
    faults = []
    image, grid, patches = arrays["image"], info.grid, info.grid.patches
    shape = (len(info.sensor.bands), grid.size, grid.size)
    if image.shape[1:] != shape or image.dtype != info.sensor.dtype:
        faults.append(
            f"has images {image.dtype} {image.shape[1:]}, not {info.sensor.dtype} {shape}"
        )
    lattice = (patches, patches, len(info.taxonomy.classes))
    if arrays["label_patch"].shape[1:] != lattice:
        faults.append(f"has patch labels {arrays['label_patch'].shape[1:]}, not {lattice}")
    if (image != info.sensor.nodata).sum(axis=(0, 2, 3)).tolist() != row.pixels:
        faults.append("has another number of valid pixels than the snapshot says")
    if arrays["finding"].tolist() != row.chip_findings:
        faults.append("has other findings of chips than the snapshot says")
    scene = arrays["scene"]
    if len(scene) and not (scene.min() >= -1 and scene.max() < len(row.scenes)):
        faults.append("has chips of scenes that it does not list")
    return faults


def _places(arrays: Arrays, row: SnapshotRow, info: DatasetInfo) -> list[str]:
    """Chips lie on the grid, where their ids say, in raster order, in their split."""
    if not len(arrays["epsg"]):
        return []
    faults = []
    bounds, epsg = arrays["bounds"], int(arrays["epsg"][0])
    if row.epsg != epsg:
        faults.append(f"is of zone {epsg}, the snapshot says {row.epsg}")
    if not info.aligned:
        return faults
    if np.any(arrays["epsg"] != epsg):
        faults.append("has chips of several zones")
    side = info.grid.chip_m
    col, line = np.rint(bounds[:, 0] / side), np.rint(bounds[:, 1] / side)
    square = np.stack([col, line, col + 1, line + 1], axis=1) * side
    if not np.allclose(square, bounds, rtol=0, atol=1e-6):
        faults.append("has chips off the grid")
    packed = pack_chips(epsg, info.grid, col.astype(np.int64), line.astype(np.int64))
    if not np.array_equal(packed, arrays["chip_id"]):
        faults.append("has chips whose ids are not those of their places")
    if np.any(np.lexsort((col, -line)) != np.arange(len(col))):
        faults.append("has chips out of raster order")
    x, y = bounds[0, :2] + side / 2
    if split_of(info.splits, info.grid, epsg, float(x), float(y)) != row.split:
        faults.append(f"is in split {row.split}, where its place is not")
    return faults


def _graph(arrays: Arrays) -> list[str]:
    """Objects and edges are ordered; every object has its self edge, every relation its inverse."""
    faults = []
    objects = np.diff(arrays["object_offset"])
    chip = np.repeat(np.arange(len(objects)), objects)
    order = np.lexsort((arrays["object_osm"], arrays["object_kind"], chip))
    if np.any(order != np.arange(len(order))):
        faults.append("has objects out of order (chip, kind, OSM id)")
    edge, relation = arrays["edge"].astype(np.int64), arrays["relation"].astype(np.int64)
    chip = np.repeat(np.arange(len(objects)), np.diff(arrays["edge_offset"]))
    rows = np.column_stack([chip, edge, relation])
    inverse = np.column_stack([chip, edge[:, ::-1], _INVERSE[relation]])
    if np.any(np.lexsort(rows.T[::-1]) != np.arange(len(rows))):
        faults.append("has edges out of order (chip, source, target, relation)")
    elif not np.array_equal(inverse[np.lexsort(inverse.T[::-1])], rows):
        faults.append("has relations without their inverse")
    own = relation == Relation.SELF
    if own.sum() != len(order) or np.any(edge[own, 0] != edge[own, 1]):
        faults.append("has objects without their self edge")
    return faults
