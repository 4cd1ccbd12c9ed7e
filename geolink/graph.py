"""The packed batch of OSM graphs: one concatenated graph for B chips, no padding, no lists.

A *node* is an OSM object of a chip. Nodes are ordered by kind, then chip, so that everything of a
kind is one slice and everything of a (kind, chip) is one run. Edges are ordered by target, so that
the edges that enter a node are one run. Ragged parts are CSR (`offset[n] .. offset[n + 1]`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from schemas.layout import Kind, Relation

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch_geometric.data import HeteroData

KINDS = tuple(kind.name.lower() for kind in Kind)
"""Names of the kinds in code order: point, line, polygon."""


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """Graphs of B chips: M nodes, E edges, T tag entries, P node-patch correspondences."""

    kind_ptr: tuple[int, int, int, int]
    """Nodes of kind k are `kind_ptr[k]:kind_ptr[k + 1]` (point 0, line 1, polygon 2)."""
    chip: Tensor
    """int64 [M], chip of each node, 0..B-1, rising within a kind."""
    osm_class: Tensor
    """uint8 [M], taxonomy class, 0 = none."""
    osm_id: Tensor
    """int64 [M], typed OSM id (`schemas.layout.OsmType`)."""
    size: Tensor
    """float32 [M], m2 (polygons) or m (lines) after clipping, 0 for points."""
    anchor: Tensor
    """float32 [M, 4, 2], chip-relative (x right, y down) in [0, 1]; polygon: three interior points
    and the centroid; line: centroid, start, end, end; point: itself four times."""
    tag_offset: Tensor
    """int64 [M + 1]."""
    tag: Tensor
    """int64 [T], rows of the tag vocabulary."""
    tag_weight: Tensor
    """float32 [T], sums to 1 over the tags of a node (a node without tags has none)."""
    edge: Tensor
    """int64 [2, E], source and target node, ordered by target; every node has a self edge."""
    relation: Tensor
    """uint8 [E], `schemas.layout.Relation` of source to target."""
    patch_offset: Tensor
    """int64 [M + 1]."""
    patch: Tensor
    """int32 [P], patches that the node's object meets, row-major, y down."""
    patch_weight: Tensor
    """float32 [P]; polygons: share of the patch's area; lines: share of the object's length. After
    a crop (`alive` is there) a node may meet a patch in several entries, whose shares add up, and
    entries of weight 0 say nothing."""
    chips: int
    """B, chips without any node included."""
    most: int | None = None
    """At least as many as the nodes of any one chip; none: not known on the host."""
    alive: Tensor | None = None
    """bool [M], False for nodes that a crop left outside. They keep their place, so that sizes stay
    known on the host, but are no part of the graph, nor are their edges; none: all are."""

    @property
    def nodes(self) -> int:
        """M."""
        return self.kind_ptr[3]

    def kind_slice(self, kind: int) -> slice:
        """Where the nodes of a kind are."""
        return slice(self.kind_ptr[kind], self.kind_ptr[kind + 1])

    def kind(self) -> Tensor:
        """Kind of each node: int64 [M]."""
        kind = torch.zeros(self.nodes, dtype=torch.int64, device=self.chip.device)
        kind[self.kind_slice(1)] = 1
        kind[self.kind_slice(2)] = 2
        return kind

    def living(self) -> Tensor:
        """Which nodes are part of the graph: bool [M]."""
        if self.alive is None:
            return torch.ones_like(self.chip, dtype=torch.bool)
        return self.alive

    def compact(self) -> GraphBatch:
        """The graph without its dead nodes, their edges and entries of weight 0.

        The host waits for the device here: for looking at and for exports, not for a step.
        """
        if self.alive is None:
            return self
        number = self.alive.cumsum(0) - 1
        edges = self.alive[self.edge].all(0)
        ptr = [int(self.alive[: self.kind_ptr[k]].sum()) for k in range(4)]
        tags = _runs(self.tag_offset, self.alive)
        met = _runs(self.patch_offset, self.alive) & (self.patch_weight > 0)
        per_node = ("chip", "osm_class", "osm_id", "size", "anchor")
        return replace(
            self,
            kind_ptr=(ptr[0], ptr[1], ptr[2], ptr[3]),
            **{name: getattr(self, name)[self.alive] for name in per_node},
            tag_offset=_kept_offset(self.tag_offset, tags, self.alive),
            tag=self.tag[tags],
            tag_weight=self.tag_weight[tags],
            edge=number[self.edge[:, edges]],
            relation=self.relation[edges],
            patch_offset=_kept_offset(self.patch_offset, met, self.alive),
            patch=self.patch[met],
            patch_weight=self.patch_weight[met],
            alive=None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GraphBatch:
        """The batch on a device; asynchronous from pinned memory if `non_blocking`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> GraphBatch:
        """The batch in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def to_pyg(self) -> HeteroData:
        """As `torch_geometric.data.HeteroData`, on the same device.

        Node types `point`, `line`, `polygon`, each with `batch` (the chip), `osm_class`, `osm_id`,
        `size`, `anchor`, and its tags and patches as CSR (`tag_ptr`, `tag`, `tag_weight`,
        `patch_ptr`, `patch`, `patch_weight`). Edge types (source kind, relation, target kind) for
        those that occur, with `edge_index` local to the kinds. Dead nodes are left out.
        """
        from torch_geometric.data import HeteroData

        if self.alive is not None:
            return self.compact().to_pyg()
        data = HeteroData()
        for kind, name in enumerate(KINDS):
            nodes = self.kind_slice(kind)
            store = data[name]
            store.num_nodes = nodes.stop - nodes.start
            store.batch = self.chip[nodes]
            for key in ("osm_class", "osm_id", "size", "anchor"):
                store[key] = getattr(self, key)[nodes]
            for csr in ("tag", "patch"):
                offset = getattr(self, f"{csr}_offset")[nodes.start : nodes.stop + 1]
                entries = slice(int(offset[0]), int(offset[-1]))
                store[f"{csr}_ptr"] = offset - offset[0]
                store[csr] = getattr(self, csr)[entries]
                store[f"{csr}_weight"] = getattr(self, f"{csr}_weight")[entries]
        kind_of = self.kind()
        source, target = kind_of[self.edge[0]], kind_of[self.edge[1]]
        edge_type = (source * len(Relation) + self.relation) * 3 + target
        start = torch.tensor(self.kind_ptr[:3], device=self.edge.device)
        local = self.edge - start[torch.stack([source, target])]
        for code in torch.unique(edge_type).tolist():
            name = Relation(code // 3 % len(Relation)).name.lower()
            ends = KINDS[code // 3 // len(Relation)], KINDS[code % 3]
            data[ends[0], name, ends[1]].edge_index = local[:, edge_type == code]
        return data

    def _map(self, function: Callable[[Tensor], Tensor]) -> GraphBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: function(v) for k, v in values.items() if torch.is_tensor(v)}
        return replace(self, **moved)


def _runs(offset: Tensor, chosen: Tensor) -> Tensor:
    """Which entries of a CSR array are of the chosen rows (bool [R]): bool [entries]."""
    return torch.repeat_interleave(chosen, offset.diff())


def _kept_offset(offset: Tensor, kept: Tensor, rows: Tensor) -> Tensor:
    """Offsets of the chosen rows (bool [R]) of a CSR array, of which some entries are kept."""
    before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    count = before[offset[1:]] - before[offset[:-1]]
    return torch.cat([offset[:1], count[rows].cumsum(0)])


def csr_take(
    offset: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Select rows of a CSR array: (index of their entries [..], offsets of the result [R + 1]).

    `values[index]` are the entries of `rows` in their order.
    """
    length = offset[rows + 1] - offset[rows]
    taken = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(length, out=taken[1:])
    index = np.arange(taken[-1]) + np.repeat(offset[rows] - taken[:-1], length)
    return index, taken


def normalise_tag_weight(
    tag_offset: NDArray[np.int64], weight: NDArray[np.floating[Any]]
) -> NDArray[np.float32]:
    """Scale weights [T] to sum 1 over each node's tags; equal weights where all are 0."""
    count = np.diff(tag_offset)
    node = np.repeat(np.arange(len(count)), count)
    total = np.bincount(node, weight, minlength=len(count))
    plain = (total == 0)[node]
    return np.where(plain, 1 / count[node], weight / np.where(plain, 1, total[node])).astype(
        np.float32
    )


def pack(
    *,
    object_offset: NDArray[np.int64],
    kind: NDArray[np.uint8],
    osm_class: NDArray[np.uint8],
    osm_id: NDArray[np.int64],
    size: NDArray[np.float32],
    anchor: NDArray[np.float32],
    tag_offset: NDArray[np.int64],
    tag: NDArray[np.integer[Any]],
    tag_weight: NDArray[np.float32],
    edge_offset: NDArray[np.int64],
    edge: NDArray[np.integer[Any]],
    relation: NDArray[np.uint8],
    patch_offset: NDArray[np.int64],
    patch: NDArray[np.integer[Any]],
    patch_weight: NDArray[np.uint8],
) -> GraphBatch:
    """Pack the graphs of B chips, given as a shard holds them (`schemas.layout`), into one batch.

    Objects come ordered by chip: `object_offset` [B + 1] are a chip's objects, `edge_offset`
    [B + 1] its edges, whose ends (`edge` [E, 2]: source, target) count from the chip's first
    object. `tag_offset`, `patch_offset` [M + 1] are an object's tags (rows of the vocabulary, with
    weights that sum to 1: `normalise_tag_weight`) and patches (shares x255). The inputs are left
    as they are.
    """
    chips = len(object_offset) - 1
    order = np.argsort(kind, kind="stable")
    packed = np.empty(len(kind), np.int64)
    packed[order] = np.arange(len(kind))
    chip = np.repeat(np.arange(chips), np.diff(object_offset))
    ends = packed[edge + np.repeat(object_offset[:-1], np.diff(edge_offset))[:, None]]
    # numpy sorts 16 bits by radix, several times faster than 64.
    target = ends[:, 1].astype(np.uint16) if len(kind) <= 1 << 16 else ends[:, 1]
    by_target = np.argsort(target, kind="stable")
    tags, tag_offset = csr_take(tag_offset, order)
    patches, patch_offset = csr_take(patch_offset, order)
    point, line, polygon = np.bincount(kind, minlength=3).tolist()
    return GraphBatch(
        kind_ptr=(0, point, point + line, point + line + polygon),
        chip=torch.from_numpy(chip[order]),
        osm_class=torch.from_numpy(osm_class[order]),
        osm_id=torch.from_numpy(osm_id[order]),
        size=torch.from_numpy(size[order]),
        anchor=torch.from_numpy(np.take(anchor, order, axis=0)),
        tag_offset=torch.from_numpy(tag_offset),
        tag=torch.from_numpy(tag[tags].astype(np.int64)),
        tag_weight=torch.from_numpy(tag_weight[tags]),
        edge=torch.from_numpy(np.ascontiguousarray(np.take(ends, by_target, axis=0).T)),
        relation=torch.from_numpy(relation[by_target]),
        patch_offset=torch.from_numpy(patch_offset),
        patch=torch.from_numpy(patch[patches].astype(np.int32)),
        patch_weight=torch.from_numpy(patch_weight[patches].astype(np.float32) / 255),
        chips=chips,
        most=int(np.diff(object_offset).max(initial=0)),
    )
