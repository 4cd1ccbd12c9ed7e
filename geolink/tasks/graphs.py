"""Graphs of many images, of which any are taken out in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geolink.graph import GraphBatch, csr_take, pack
from geolink.reader import Arrays
from geolink.stream.chips import join

_PER_OBJECT = ("kind", "osm_class", "osm_id", "size", "anchor")


@dataclass(frozen=True, eq=False)
class ImageGraphs:
    """Graphs of N images as `geolink.graph.pack` takes them: objects come ordered by image."""

    arrays: Arrays

    def __len__(self) -> int:
        return len(self.arrays["object_offset"]) - 1

    @classmethod
    def of(cls, graph: GraphBatch) -> ImageGraphs:
        """The graphs of a batch on the CPU, which no crop has changed."""
        order = np.argsort(graph.chip.numpy(), kind="stable")
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        chip = graph.chip.numpy()[order]
        object_offset = np.searchsorted(chip, np.arange(graph.chips + 1))
        edge = place[graph.edge.numpy().T]
        owner = chip[edge[:, 1]]
        by_chip = np.argsort(owner, kind="stable")
        tags, tag_offset = csr_take(graph.tag_offset.numpy(), order)
        patches, patch_offset = csr_take(graph.patch_offset.numpy(), order)
        return cls({
            "object_offset": object_offset,
            "kind": graph.kind().numpy()[order].astype(np.uint8),
            "osm_class": graph.osm_class.numpy()[order],
            "osm_id": graph.osm_id.numpy()[order],
            "size": graph.size.numpy()[order],
            "anchor": graph.anchor.numpy()[order],
            "tag_offset": tag_offset,
            "tag": graph.tag.numpy()[tags],
            "tag_weight": graph.tag_weight.numpy()[tags],
            "edge_offset": np.searchsorted(owner[by_chip], np.arange(graph.chips + 1)),
            "edge": (edge - object_offset[owner][:, None])[by_chip],
            "relation": graph.relation.numpy()[by_chip],
            "patch_offset": patch_offset,
            "patch": graph.patch.numpy()[patches],
            "patch_weight": np.rint(graph.patch_weight.numpy()[patches] * 255).astype(np.uint8),
        })  # fmt: skip

    @classmethod
    def join(cls, parts: Sequence[ImageGraphs]) -> ImageGraphs:
        """The graphs of several one after another."""
        return cls(join([part.arrays for part in parts]))

    def take(self, rows: NDArray[np.int64]) -> GraphBatch:
        """The graphs of images, in the order of `rows` [B]; one may come several times."""
        a = self.arrays
        objects, object_offset = csr_take(a["object_offset"], rows)
        edges, edge_offset = csr_take(a["edge_offset"], rows)
        tags, tag_offset = csr_take(a["tag_offset"], objects)
        patches, patch_offset = csr_take(a["patch_offset"], objects)
        return pack(
            object_offset=object_offset,
            **{name: np.take(a[name], objects, axis=0) for name in _PER_OBJECT},
            tag_offset=tag_offset,
            tag=a["tag"][tags],
            tag_weight=a["tag_weight"][tags],
            edge_offset=edge_offset,
            edge=np.take(a["edge"], edges, axis=0),
            relation=a["relation"][edges],
            patch_offset=patch_offset,
            patch=a["patch"][patches],
            patch_weight=a["patch_weight"][patches],
        )
