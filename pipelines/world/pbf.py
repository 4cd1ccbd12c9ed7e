"""Features to a real OSM PBF: shared nodes, closed ways, multipolygon relations.

A PBF written twice from the same features is the same bytes: ids follow from positions and order,
timestamps are fixed (pyosmium's `SimpleWriter`, https://docs.osmcode.org/pyosmium/).
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import osmium
import shapely
from numpy.typing import NDArray
from osmium.osm import mutable
from pyproj import Transformer

from pipelines.world.features import Features, Tags

TIMESTAMP = datetime(2022, 7, 1, tzinfo=UTC)
WAY_MAX_NODES = 2000  # the limit of the OSM API
_FIRST_ID = 1_000_001  # clear of any real object's id in small extracts


@dataclass(frozen=True)
class Written:
    """How much a PBF holds: nodes (tagged ones among them), ways, relations."""

    nodes: int
    tagged_nodes: int
    ways: int
    relations: int


def write_pbf(path: Path, features: Features, epsg: int) -> Written:
    """Writes what is mapped of `features` to `path`, replacing it.

    Points become nodes, and a point on a line's vertex that vertex; lines become ways; polygons
    closed ways, or multipolygon relations where they have holes or more than 2,000 vertices.
    Coordinates are rounded to 1e-7 degrees, and equal coordinates are one node. Ids count up
    from 1,000,001 by kind, nodes from south to north.
    """
    known = features.take(np.array([bool(m) for m in features.mapped]))
    lines, owner = _lines(known.geometry)
    nodes = _Nodes(lines, known, epsg)
    header = osmium.io.Header()
    header.set("generator", "geolink-world")
    stamp = TIMESTAMP.strftime("%Y-%m-%dT%H:%M:%SZ")
    header.set("osmosis_replication_timestamp", stamp)
    header.set("timestamp", stamp)
    corner = nodes.lonlat.min(axis=0).tolist(), nodes.lonlat.max(axis=0).tolist()
    header.add_box(osmium.osm.Box(*corner[0], *corner[1]))
    kinds = shapely.get_type_id(known.geometry)
    with osmium.SimpleWriter(str(path), header=header, overwrite=True) as writer:
        tagged = _write_nodes(writer, nodes, known)
        rings = _write_ways(writer, nodes, known, owner)
        relations = _write_relations(writer, known, kinds, rings)
    return Written(len(nodes.lonlat), tagged, sum(len(r) for r in rings.values()), relations)


def _lines(geometry: NDArray[np.object_]) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
    """Rings and lines in order of their feature, exterior rings first, cut to the node limit."""
    polygon = shapely.get_type_id(geometry) == 3
    whole = geometry.copy()
    whole[polygon] = shapely.boundary(geometry[polygon])
    line = shapely.get_dimensions(whole) == 1
    rows = np.flatnonzero(line)
    parts, owner = shapely.get_parts(whole[rows], return_index=True)
    return parts, rows[owner]


class _Nodes:
    """Every position once, and the nodes of each line."""

    def __init__(self, lines: NDArray[np.object_], known: Features, epsg: int) -> None:
        xy, self.line = shapely.get_coordinates(lines, return_index=True)
        point = np.flatnonzero(shapely.get_type_id(known.geometry) == 0)
        points = shapely.get_coordinates(known.geometry[point])
        to_lonlat = Transformer.from_crs(epsg, 4326, always_xy=True)
        degrees = np.column_stack(to_lonlat.transform(*np.vstack([xy, points]).T))
        fixed = np.round(degrees * 1e7).astype(np.int64)
        order = fixed[:, ::-1]  # by latitude first
        unique, inverse = np.unique(order, axis=0, return_inverse=True)
        inverse = inverse.ravel()
        self.of_line = inverse[: len(xy)]
        at_points = inverse[len(xy) :]
        # Two points at one place are two nodes: the second gets a node of its own.
        _, first = np.unique(at_points, return_index=True)
        repeated = np.ones(len(point), dtype=bool)
        repeated[first] = False
        at_points[repeated] = len(unique) + np.arange(int(repeated.sum()))
        extra = order[len(xy) :][repeated]
        self.lonlat = np.vstack([unique, extra])[:, ::-1] / 1e7
        self.feature = dict(zip(at_points.tolist(), point.tolist(), strict=True))


def _meta(tags: Tags) -> dict[str, object]:
    return {"tags": tags, "version": 1, "visible": True, "timestamp": TIMESTAMP, "changeset": 1,
        "uid": 1,
            "user": "geolink"}  # fmt: skip


def _write_nodes(writer: osmium.SimpleWriter, nodes: _Nodes, known: Features) -> int:
    nothing: Tags = {}
    for i, (lon, lat) in enumerate(nodes.lonlat.tolist()):
        feature = nodes.feature.get(i)
        tags = nothing if feature is None else known.mapped[feature]
        writer.add_node(mutable.Node(id=_FIRST_ID + i, location=(lon, lat), **_meta(tags)))
    return len(nodes.feature)


def _write_ways(
    writer: osmium.SimpleWriter, nodes: _Nodes, known: Features, owner: NDArray[np.int64]
) -> dict[int, list[tuple[int, str]]]:
    """Ways of every feature: id and role (outer, inner) by feature. Simple ones carry the tags."""
    starts = np.r_[0, np.flatnonzero(np.diff(nodes.line)) + 1, len(nodes.line)]
    polygon = shapely.get_type_id(known.geometry) == 3
    simple = shapely.get_num_interior_rings(known.geometry) == 0
    simple &= shapely.get_num_coordinates(known.geometry) <= WAY_MAX_NODES
    ways: dict[int, list[tuple[int, str]]] = {}
    way_id = _FIRST_ID
    for line, feature in enumerate(owner.tolist()):
        ids = _FIRST_ID + nodes.of_line[starts[line] : starts[line + 1]]
        keep = np.r_[True, ids[1:] != ids[:-1]]  # vertices that rounding made one
        refs = ids[keep].tolist()
        role = "inner" if feature in ways else "outer"
        whole = not polygon[feature] or bool(simple[feature])
        for k in range(0, max(1, len(refs) - 1), WAY_MAX_NODES - 1):
            tags = known.mapped[feature] if whole else {}
            writer.add_way(mutable.Way(id=way_id, nodes=refs[k : k + WAY_MAX_NODES], **_meta(tags)))
            ways.setdefault(feature, []).append((way_id, role))
            way_id += 1
    return ways


def _write_relations(
    writer: osmium.SimpleWriter,
    known: Features,
    kinds: NDArray[np.int64],
    ways: dict[int, list[tuple[int, str]]],
) -> int:
    simple = (shapely.get_num_interior_rings(known.geometry) == 0) & (
        shapely.get_num_coordinates(known.geometry) <= WAY_MAX_NODES
    )
    count = 0
    for feature in np.flatnonzero((kinds == 3) & ~simple).tolist():
        members = [("w", way, role) for way, role in ways[feature]]
        tags = {"type": "multipolygon", **known.mapped[feature]}
        writer.add_relation(mutable.Relation(id=_FIRST_ID + count, members=members, **_meta(tags)))
        count += 1
    return count
