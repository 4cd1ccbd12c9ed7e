"""Chips of some shards in memory, of which any are taken out in one go."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geolink.graph import csr_take
from geolink.reader import Arrays

PER_CHIP = ("valid", "chip_id", "center_lonlat", "time", "label_patch", "label_region")
PER_OBJECT = ("object_kind", "object_class", "object_osm", "object_size", "object_anchor")
RAGGED = (
    "object_offset", "object_tag_offset", "object_tag", "tag", "edge_offset", "edge", "relation",
    "patch_offset", "patch", "patch_weight",
)  # fmt: skip
STREAMED = ("image", "finding", "bounds", *PER_CHIP, *PER_OBJECT, *RAGGED)
"""Arrays of a shard that are read."""
LABELS = {"pixel": "label_pixel"}
"""What is read besides where it is asked for: label to array."""


class Ended:
    """Values that are kept while objects live, and given back when they do not any more.

    Nothing of Python runs when an object dies, in whatever thread that is: an interrupt would be
    lost there, and a lock could be held already.
    """

    def __init__(self) -> None:
        self._values: dict[int, tuple[weakref.ref[Any], Any]] = {}
        self._dead: deque[weakref.ref[Any]] = deque()

    def keep(self, owner: object, value: Any) -> None:
        """Keep a value while `owner` lives."""
        ref = weakref.ref(owner, self._dead.append)
        self._values[id(ref)] = ref, value

    def given_back(self) -> list[Any]:
        """Values of owners that have died since the last time."""
        return [self._values.pop(id(self._dead.popleft()))[1] for _ in range(len(self._dead))]


class Buffers:
    """Memory for pixels that is used again: fresh memory costs as much as the copy, and the
    pieces that threads leave of it add up to several times as much.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self._ended = Ended()
        self._lock = Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of any content; its memory is used again when `lend` is told its owner."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            for arrays in self._ended.given_back():
                self._free += [_memory(array) for array in arrays]
            self._free.sort(key=len)
            fits = [n for n, buffer in enumerate(self._free) if len(buffer) >= size]
            # One that is too small gives way, so that there are never more than are in use at once.
            buffer = self._free.pop(fits[0] if fits else 0) if self._free else None
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
        return buffer[:size].view(dtype).reshape(shape)

    def lend(self, owner: object, arrays: Sequence[NDArray[Any]]) -> None:
        """Use the memory of arrays again when `owner` has died."""
        with self._lock:
            self._ended.keep(owner, arrays)


def _memory(array: NDArray[Any]) -> NDArray[np.uint8]:
    """All of the memory that an array is a part of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.reshape(-1).view(np.uint8)


class Chips:
    """The chips of a window.

    shards: arrays of its pieces (`Source.read`). chips: which of their chips the window holds,
    [n] places in a piece's arrays. order: a permutation of all of these.
    """

    def __init__(
        self, shards: list[Arrays], chips: list[NDArray[np.int64]], order: NDArray[np.int64],
        buffers: Buffers,
    ) -> None:  # fmt: skip
        self._images = [arrays.pop("image") for arrays in shards]
        self._first = np.cumsum([0, *(len(image) for image in self._images)])
        self._arrays = join(shards) if len(shards) > 1 else shards[0]
        rows = [first + chosen for first, chosen in zip(self._first, chips)]
        self._rows = np.concatenate(rows)[order]
        labels = [name for name in LABELS.values() if name in self._arrays]
        self._per_chip = (*PER_CHIP, "weight", "gsd_m", *labels)
        # Until the last batch that is made of them is made.
        buffers.lend(self, self._images)

    def take(self, low: int, high: int, image: NDArray[Any]) -> Arrays:
        """Arrays of the chips at places of the window's order (beyond its end: from its beginning
        on), as a shard holds them; within them in stored order. Their pixels go into `image`.
        """
        rows = np.sort(self._rows[np.arange(low, high) % len(self._rows)])
        a = self._arrays

        def pick(name: str, index: NDArray[np.int64]) -> NDArray[Any]:
            # Several times faster than indexing where an item is more than one number.
            return np.take(a[name], index, axis=0)

        self._take_images(rows, image)
        objects, object_offset = csr_take(a["object_offset"], rows)
        edges, edge_offset = csr_take(a["edge_offset"], rows)
        tags, tag_offset = csr_take(a["object_tag_offset"], objects)
        patches, patch_offset = csr_take(a["patch_offset"], objects)
        return {
            **{name: pick(name, rows) for name in self._per_chip},
            "object_offset": object_offset,
            **{name: pick(name, objects) for name in PER_OBJECT},
            "object_tag_offset": tag_offset,
            "object_tag": pick("object_tag", tags),
            "tag_weight": pick("tag_weight", tags),
            "edge_offset": edge_offset,
            "edge": pick("edge", edges),
            "relation": pick("relation", edges),
            "patch_offset": patch_offset,
            "patch": pick("patch", patches),
            "patch_weight": pick("patch_weight", patches),
        }

    @property
    def pieces(self) -> int:
        """Shards that are in memory for it."""
        return len(self._images)

    @property
    def pixels(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape (band, y, x) and dtype of an image."""
        return self._images[0].shape[1:], self._images[0].dtype

    def _take_images(self, rows: NDArray[np.int64], image: NDArray[Any]) -> None:
        """Shard by shard (rows rise), so that every pixel is copied once."""
        cuts = np.searchsorted(rows, self._first)
        for n, pixels in enumerate(self._images):
            part = slice(cuts[n], cuts[n + 1])
            # Any mode but the default writes into `out` without a buffer.
            np.take(pixels, rows[part] - self._first[n], axis=0, out=image[part], mode="clip")


def cut(arrays: Arrays, low: int, high: int) -> Arrays:
    """The chips low..high - 1 of a shard's arrays, pixels and labels of pixels apart."""
    objects = arrays["object_offset"][[low, high]]
    edges = arrays["edge_offset"][[low, high]]
    tags = arrays["object_tag_offset"][objects]
    patches = arrays["patch_offset"][objects]
    found = {}
    for name, array in arrays.items():
        if name == "object_offset":
            found[name] = array[low : high + 1] - objects[0]
        elif name == "edge_offset":
            found[name] = array[low : high + 1] - edges[0]
        elif name in ("object_tag_offset", "patch_offset"):
            part = array[objects[0] : objects[1] + 1]
            found[name] = part - part[0]
        elif name in PER_OBJECT:
            found[name] = array[slice(*objects)]
        elif name in ("edge", "relation"):
            found[name] = array[slice(*edges)]
        elif name in ("object_tag", "tag_weight"):
            found[name] = array[slice(*tags)]
        elif name in ("patch", "patch_weight"):
            found[name] = array[slice(*patches)]
        else:
            found[name] = array[low:high]
    return found


def join(parts: Sequence[Arrays]) -> Arrays:
    """Arrays of several sets of chips as of one: offsets go on where the part before ends."""
    joined = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        if name.endswith("_offset"):
            ends = np.cumsum([0, *(offset[-1] for offset in arrays)])
            arrays = [offset[1:] + end for offset, end in zip(arrays, ends)]
            arrays.insert(0, np.zeros(1, np.int64))
        joined[name] = np.concatenate(arrays)
    return joined
