"""Images that are learnt from many times, held so that any can be taken at once."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geolink.tasks.contracts import TaskBatch, TaskData
from geolink.tasks.graphs import ImageGraphs

MEMORY = 2 << 30
"""Bytes of pixels that are held in memory; more lie in a temporary file."""


@dataclass(frozen=True, eq=False)
class Held:
    """N images of a split with their graphs and labels."""

    rows: NDArray[np.int64]
    """[N], places in the split, rising."""
    image: NDArray[Any]
    """[N, band, y, x]."""
    label: NDArray[Any] | None
    mask: NDArray[np.uint8] | None
    second: NDArray[Any] | None
    graphs: ImageGraphs | None
    folder: tempfile.TemporaryDirectory[str] | None
    """Where pixels lie that are not in memory; removed with this."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: NDArray[np.int64]) -> TaskBatch:
        """The images at these places of `rows`, in any order."""
        return TaskBatch(
            rows=self.rows[index],
            image=torch.from_numpy(self.image[index]),
            graph=None if self.graphs is None else self.graphs.take(index),
            label=None if self.label is None else self.label[index],
            mask=None if self.mask is None else torch.from_numpy(self.mask[index]),
            second=None if self.second is None else torch.from_numpy(self.second[index]),
        )


def hold(data: TaskData, split: str, rows: NDArray[np.int64] | None = None) -> Held:
    """Read images of a split (rows: only those, rising) and hold them.

    Raises GeoLinkError if one cannot be read, or the split is hidden.
    """
    part = data.part(split)
    rows = np.arange(len(part)) if rows is None else rows
    room = _Room(len(rows))
    graphs, done = [], 0
    for batch in data.batches(split, rows):
        here = slice(done, done + len(batch))
        room.put("image", here, batch.image)
        room.put("mask", here, batch.mask)
        room.put("second", here, batch.second)
        if batch.graph is not None:
            graphs.append(ImageGraphs.of(batch.graph))
        done = here.stop
    return Held(
        rows=rows,
        image=room.arrays["image"],
        label=None if part.label is None else part.label[rows],
        mask=room.arrays.get("mask"),
        second=room.arrays.get("second"),
        graphs=ImageGraphs.join(graphs) if graphs else None,
        folder=room.folder,
    )


class _Room:
    """Arrays of `count` items, in memory or, where they are large, in a temporary folder."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.arrays: dict[str, NDArray[Any]] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, name: str, here: slice, values: torch.Tensor | None) -> None:
        if values is None:
            return
        items = values.numpy()
        if name not in self.arrays:
            self.arrays[name] = self._empty(name, (self.count, *items.shape[1:]), items.dtype)
        self.arrays[name][here] = items

    def _empty(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        if prod(shape) * dtype.itemsize <= MEMORY:
            return np.empty(shape, dtype)
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="geolink-")
        path = Path(self.folder.name) / f"{name}.npy"
        return np.lib.format.open_memmap(path, "w+", dtype, shape)
