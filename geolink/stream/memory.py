"""What shards and batches take in memory, by what a snapshot says of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geolink.stream.loader import AHEAD
from schemas.dataset import DatasetInfo, SnapshotRow
from schemas.errors import GeoLinkError

_OBJECT, _EDGE = 250, 25
"""Bytes of an object with its tags and patches, and of an edge, while a window is made: generous,
since a snapshot does not say how many tags and patches there are."""
_BESIDE = 32e6
"""Bytes that the threads, and what is small, take."""
_HANDED_OUT = 2
"""Batches beside those ahead: one being packed, one in use."""


def shard_bytes(row: SnapshotRow, info: DatasetInfo, *, label_pixel: bool = False) -> int:
    """What a shard takes in memory, about."""
    chip = _chip_bytes(info) + (info.grid.size**2 if label_pixel else 0)
    return row.chips * chip + row.objects * _OBJECT + row.edges * _EDGE


def window_that_fits(
    rows: Sequence[SnapshotRow],
    info: DatasetInfo,
    window_shards: int,
    lanes: int,
    batch_size: int,
    memory_mb: int | None,
    *,
    label_pixel: bool = False,
) -> int:
    """Shards that are shuffled together so that twice as many, and the batches, fit in memory_mb.

    Raises GeoLinkError if not even one of each lane does.
    """
    if memory_mb is None:
        return window_shards
    sizes = [shard_bytes(row, info, label_pixel=label_pixel) for row in rows]
    shard, batch = max(sizes), batch_size * sum(sizes) / sum(row.chips for row in rows)
    beside = _BESIDE + (AHEAD + _HANDED_OUT) * batch
    fits = int((memory_mb * 1e6 - beside) // (2 * shard))
    if fits < lanes:
        least = int(np.ceil((2 * lanes * shard + beside) / 1e6))
        raise GeoLinkError(
            f"memory_mb {memory_mb} is too little for shards of {shard / 1e6:.0f} MB and batches "
            f"of {batch / 1e6:.0f} MB: set it to {least} at least, or use fewer lanes or a smaller "
            "batch_size"
        )
    return min(window_shards, fits)


def _chip_bytes(info: DatasetInfo) -> int:
    grid, classes = info.grid, len(info.taxonomy.classes)
    image = len(info.sensor.bands) * grid.size**2 * np.dtype(info.sensor.dtype).itemsize
    return image + grid.patches**2 * classes + 4 * classes
