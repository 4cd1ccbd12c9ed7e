"""What a stream gives: chips with pixels, graphs and labels, packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geolink.graph import GraphBatch, pack
from geolink.reader import Arrays


@dataclass(frozen=True, eq=False)
class Batch:
    """B chips: pixels, graphs, labels."""

    image: Tensor
    """[B, band, y, x] in the storage type of the sensor, uint8 or uint16."""
    graph: GraphBatch
    valid: Tensor
    """float32 [B], fraction of pixels neither nodata nor cloud."""
    weight: Tensor
    """float32 [B], how much each chip counts in a loss (`Quality.weights`); 0 for chips that fill
    up the last batch of an epoch."""
    chip_id: NDArray[np.uint64]
    """[B, 2], packed chip ids (`schemas.grid.unpack_chip`)."""
    center_lonlat: Tensor
    """float64 [B, 2], degrees."""
    time: Tensor
    """int64 [B], acquisition in seconds since 1970 UTC; `schemas.layout.UNKNOWN_TIME`: unknown."""
    gsd_m: Tensor
    """float32 [B], side of a pixel in metres."""
    label_patch: Tensor
    """uint8 [B, patch_y, patch_x, class], area fraction x255."""
    label_region: Tensor
    """float32 [B, class], area fraction."""
    label_pixel: Tensor | None = None
    """uint8 [B, y, x], class, 0 = no OSM statement; None where it was not asked for."""
    source: int = 0
    """Which dataset of a mix all the chips are of."""

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device; asynchronous from pinned memory if `non_blocking`."""
        return self._map(
            lambda tensor: tensor.to(device, non_blocking=non_blocking),
            self.graph.to(device, non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; what is there already is not copied."""
        return self._map(
            lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory(),
            self.graph.pin_memory(),
        )

    def _map(self, function: Callable[[Tensor], Tensor], graph: GraphBatch) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: function(v) for k, v in values.items() if torch.is_tensor(v)}
        return replace(self, **moved, graph=graph)


def make_batch(a: Arrays, image: Tensor, source: int) -> Batch:
    """A batch of the arrays of its chips, as a shard holds them, and their pixels."""
    graph = pack(
        object_offset=a["object_offset"],
        kind=a["object_kind"],
        osm_class=a["object_class"],
        osm_id=a["object_osm"],
        size=a["object_size"],
        anchor=a["object_anchor"],
        tag_offset=a["object_tag_offset"],
        tag=a["object_tag"],
        tag_weight=a["tag_weight"],
        edge_offset=a["edge_offset"],
        edge=a["edge"],
        relation=a["relation"],
        patch_offset=a["patch_offset"],
        patch=a["patch"],
        patch_weight=a["patch_weight"],
    )
    return Batch(
        image=image,
        graph=graph,
        valid=torch.from_numpy(a["valid"]),
        weight=torch.from_numpy(a["weight"]),
        chip_id=a["chip_id"],
        center_lonlat=torch.from_numpy(a["center_lonlat"]),
        time=torch.from_numpy(a["time"]),
        gsd_m=torch.from_numpy(a["gsd_m"]),
        label_patch=torch.from_numpy(a["label_patch"]),
        label_region=torch.from_numpy(a["label_region"]),
        label_pixel=torch.from_numpy(a["label_pixel"]) if "label_pixel" in a else None,
        source=source,
    )
