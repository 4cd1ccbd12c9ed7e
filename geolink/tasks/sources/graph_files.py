"""Files of graphs as samples of the published model hold them, without anything pickled.

<name>_graph.npz, in which K, A, B are point, line, polygon:
    x__K [M, D + positions]          text of D numbers, then x, y (0..1, y down) of a point 1, of a
                                     line 3 (centroid, first, last), of a polygon 4 (three inside,
                                     centroid)
    edge_index__A__to__B [2, E]      source, target
    edge_attr__A__to__B [E, code]    one-hot, the relation (`RELATIONS`)
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geolink.graph import KINDS
from geolink.reader import Arrays
from geolink.tasks.graphs import ImageGraphs
from schemas.errors import GeoLinkError
from schemas.layout import Relation

_ANCHORS = {"point": (0, 0, 0, 0), "line": (0, 1, 2, 2), "polygon": (0, 1, 2, 3)}
"""Which of a node's positions are its four anchors."""

_ALIKE = (
    Relation.SELF, Relation.TOUCHES, Relation.OVERLAPS, Relation.COVERS, Relation.COVERED_BY,
    Relation.EQUALS,
)  # fmt: skip
RELATIONS: dict[tuple[str, str], tuple[Relation, ...]] = {
    ("polygon", "polygon"): _ALIKE,
    ("line", "line"): _ALIKE,
    ("line", "polygon"): (Relation.TOUCHES, Relation.CROSSES, Relation.COVERED_BY),
    ("point", "line"): (Relation.TOUCHES, Relation.WITHIN),
    ("point", "polygon"): (Relation.TOUCHES, Relation.WITHIN),
    ("point", "point"): (Relation.SELF, Relation.NEAR),
    # Files give the way back the code of the way there.
    ("polygon", "line"): (Relation.TOUCHES, Relation.CROSSES, Relation.COVERS),
    ("line", "point"): (Relation.TOUCHES, Relation.CONTAINS_POINT),
    ("polygon", "point"): (Relation.TOUCHES, Relation.CONTAINS_POINT),
}
"""What each column of `edge_attr` says of source and target."""

_PICKLED = (".pt", ".pth", ".pkl", ".pickle")


@dataclass(frozen=True, eq=False)
class ReadGraph:
    """The graph of an image: M objects, E edges, V distinct texts."""

    text: NDArray[np.float32]
    """[V, D]."""
    row: NDArray[np.int64]
    """[M], of the text of each object."""
    kind: NDArray[np.uint8]
    """[M], rising."""
    anchor: NDArray[np.float32]
    """[M, 4, 2], as in `GraphBatch`."""
    edge: NDArray[np.int64]
    """[E, 2]."""
    relation: NDArray[np.uint8]
    """[E]."""


def graph_path(image: Path) -> Path:
    """Where the graph of an image lies."""
    path = image.with_name(f"{image.stem.removesuffix('_img')}_graph.npz")
    if not path.is_file():
        for ending in _PICKLED:
            if (pickled := path.with_suffix(ending)).is_file():
                raise GeoLinkError(
                    f"graph {pickled} is pickled, and reading it could run code that it holds: "
                    f"save its arrays as {path.name} (x__point, edge_index__line__to__polygon, ...)"
                )
    return path


def read_graph(path: Path) -> ReadGraph:
    """Read a graph. Raises GeoLinkError if it is not there, or not as this module says."""
    arrays = _load(path)
    texts: list[NDArray[np.float32]] = []
    anchors: list[NDArray[np.float32]] = []
    first: dict[str, int] = {}
    width: int | None = None
    for kind in KINDS:
        nodes = arrays.get(f"x__{kind}")
        places = 2 * len(set(_ANCHORS[kind]))
        if nodes is None or nodes.ndim != 2 or nodes.shape[1] <= places:
            shape = "none" if nodes is None else str(list(nodes.shape))
            raise GeoLinkError(
                f"graph {path} needs nodes x__{kind} [objects, text + {places} positions], it has "
                f"{shape}"
            )
        if width not in (None, nodes.shape[1] - places):
            raise GeoLinkError(f"texts of graph {path} are of several lengths")
        width = nodes.shape[1] - places
        first[kind] = sum(len(t) for t in texts)
        texts.append(nodes[:, :width])
        anchors.append(nodes[:, width:].reshape(-1, places // 2, 2)[:, list(_ANCHORS[kind])])
    text, anchor = np.concatenate(texts), np.concatenate(anchors)
    if not np.isfinite(text).all() or not ((anchor > -0.01) & (anchor < 1.01)).all():
        raise GeoLinkError(f"graph {path} holds texts that are not finite, or places beyond 0 to 1")
    text, row = _distinct(text)
    kinds = np.repeat(np.arange(3, dtype=np.uint8), [len(t) for t in texts])
    edge, relation = _edges(arrays, dict(zip(KINDS, map(len, texts))), first, path)
    return ReadGraph(text, row, kinds, anchor.astype(np.float32), edge, relation)


def _load(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise GeoLinkError(
            f"there is no graph {path}: an image without objects has one without nodes"
        ) from error
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise GeoLinkError(f"graph {path} cannot be read: {error}") from error


def _edges(
    arrays: Arrays, count: dict[str, int], first: dict[str, int], path: Path
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    edges, relations = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.uint8)]
    for (a, b), codes in RELATIONS.items():
        ends, attr = arrays.get(f"edge_index__{a}__to__{b}"), arrays.get(f"edge_attr__{a}__to__{b}")
        if ends is None:
            continue
        if (
            attr is None
            or ends.shape != (2, len(attr))
            or attr.shape != (len(attr), len(codes))
            or ends.dtype.kind not in "iu"
        ):
            raise GeoLinkError(
                f"edges {a} to {b} of graph {path} need edge_index [2, E] and edge_attr [E, "
                f"{len(codes)}]"
            )
        if (ends < 0).any() or (ends >= np.array([[count[a]], [count[b]]])).any():
            raise GeoLinkError(f"an edge {a} to {b} of graph {path} ends at no node")
        if not ((attr == 1).sum(1) == 1).all():
            raise GeoLinkError(f"an edge {a} to {b} of graph {path} has not one relation")
        edges.append((ends + np.array([[first[a]], [first[b]]])).T.astype(np.int64))
        relations.append(np.array(codes, np.uint8)[attr.argmax(1)])
    return np.concatenate(edges), np.concatenate(relations)


def join_graphs(
    groups: Sequence[Sequence[ReadGraph]],
) -> tuple[list[ImageGraphs], NDArray[np.float32]]:
    """Graphs of groups of images, and the one table of texts [V, D] that their tags are rows of:
    an object has one tag of weight 1.

    Raises GeoLinkError if texts differ in length.
    """
    every = [graph for group in groups for graph in group]
    widths = {graph.text.shape[1] for graph in every}
    if len(widths) > 1:
        raise GeoLinkError(f"texts of graphs are of several lengths: {sorted(widths)}")
    table, place = _distinct(np.concatenate([graph.text for graph in every]))
    starts = np.cumsum([0, *(len(graph.text) for graph in every)])
    rows = iter(place[start + g.row] for start, g in zip(starts, every))
    return [_joined(group, [next(rows) for _ in group]) for group in groups], table


def _joined(group: Sequence[ReadGraph], rows: Sequence[NDArray[np.int64]]) -> ImageGraphs:
    objects = np.cumsum([0, *(len(g.kind) for g in group)])
    total = int(objects[-1])
    return ImageGraphs({
        "object_offset": objects,
        "kind": np.concatenate([g.kind for g in group]),
        "osm_class": np.zeros(total, np.uint8),
        "osm_id": np.zeros(total, np.int64),
        "size": np.zeros(total, np.float32),
        "anchor": np.concatenate([g.anchor for g in group]),
        "tag_offset": np.arange(total + 1),
        "tag": np.concatenate(rows),
        "tag_weight": np.ones(total, np.float32),
        "edge_offset": np.cumsum([0, *(len(g.edge) for g in group)]),
        "edge": np.concatenate([g.edge for g in group]),
        "relation": np.concatenate([g.relation for g in group]),
        "patch_offset": np.zeros(total + 1, np.int64),
        "patch": np.zeros(0, np.int32),
        "patch_weight": np.zeros(0, np.uint8),
    })  # fmt: skip


def _distinct(text: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Distinct rows [V, D], and which of them each row [M] is."""
    if not len(text):
        return text.astype(np.float32), np.zeros(0, np.int64)
    found, place = np.unique(text.astype(np.float32), axis=0, return_inverse=True)
    return found, place.ravel()
