"""Splits that share something: nothing is scored before it is known that they do not."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from geolink.tasks.contracts import Leak, TaskData

_NAMED = 3


def check_leaks(data: TaskData) -> dict[str, Any]:
    """Check that no image is in two splits: by its name, its place or its pixels, of pairs those of
    either date.

    Images that are one colour all over may be alike. Pixels are read unless a source has their
    hashes (`Part.pixels`).
    Returns what was compared. Raises Leak naming images that two splits share.
    """
    hashes = {split: _hashes(data, split) for split in data.splits}
    for a, b in combinations(data.splits, 2):
        one, other = data.splits[a], data.splits[b]
        shared = np.intersect1d(one.ids, other.ids)
        if len(shared):
            _refuse(data, a, b, "are in", shared.tolist())
        alike = _alike(hashes[a], hashes[b])
        if alike:
            names = [f"{one.ids[n]} = {other.ids[m]}" for n, m in alike]
            _refuse(data, a, b, "have the same pixels in", names)
        overlap = _overlapping(one.bounds_lonlat, other.bounds_lonlat)
        if len(overlap):
            names = [f"{one.ids[n]} and {other.ids[m]}" for n, m in overlap.tolist()]
            _refuse(data, a, b, "lie on each other in", names)
    placed = {s: int(np.isfinite(p.bounds_lonlat).all(1).sum()) for s, p in data.splits.items()}
    return {
        "images": {split: len(part) for split, part in data.splits.items()},
        "compared": ["names", "pixels", *(["places"] if any(placed.values()) else [])],
        "with_place": placed,
        "shared": 0,
    }


def _refuse(data: TaskData, a: str, b: str, how: str, names: list[str]) -> None:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    raise Leak(
        f"{len(names):,} images of {data.name} {how} both {a} and {b}, so a score would be of what "
        f"was learnt by heart: {', '.join(names[:_NAMED])}{more}"
    )


def _hashes(data: TaskData, split: str) -> NDArray[np.uint64]:
    """Hash [N, date] of every image's pixels."""
    part = data.part(split)
    if part.pixels is not None:
        return part.pixels.reshape(len(part), -1)
    found = np.zeros((len(part), 2), np.uint64)
    for batch in data.batches(split):
        for date, images in enumerate((batch.image, batch.second)):
            if images is not None:
                found[batch.rows, date] = [image_hash(image) for image in images.numpy()]
    return found


def _alike(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Images of which a date's hash [N, date] is one of the other's dates' [M, date]."""
    both, here, there = np.intersect1d(one, other, return_indices=True)
    here, there = here[both != 0] // one.shape[1], there[both != 0] // other.shape[1]
    return sorted(set(zip(here.tolist(), there.tolist(), strict=True)))


def image_hash(image: NDArray[Any]) -> int:
    """Hash of the pixels of an image [band, y, x]; 0 if it is of one colour."""
    if (image == image[:, :1, :1]).all():
        return 0
    digest = xxhash.xxh3_64(f"{image.dtype}{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).tobytes())
    return digest.intdigest()


_TOUCH = 0.02
"""Share of a side that boxes may reach into each other: neighbours on a grid of metres do so in
degrees."""


def _overlapping(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.int64]:
    """Pairs [P, 2] of boxes (west, south, east, north) that overlap; unknown ones never do."""
    known = [np.flatnonzero(np.isfinite(boxes).all(1)) for boxes in (one, other)]
    if not len(known[0]) or not len(known[1]):
        return np.zeros((0, 2), np.int64)
    a, b = one[known[0]], other[known[1]]
    order = np.argsort(b[:, 0], kind="stable")
    b, names = b[order], known[1][order]
    widest = float((b[:, 2] - b[:, 0]).max())
    first = np.searchsorted(b[:, 0], a[:, 0] - widest, "left")
    last = np.searchsorted(b[:, 0], a[:, 2], "right")
    found = []
    for low in range(0, len(a), 4096):
        part = slice(low, low + 4096)
        count = last[part] - first[part]
        here = np.repeat(np.arange(low, low + len(count)), count)
        start = np.repeat(first[part] - np.cumsum(count) + count, count)
        there = np.arange(count.sum()) + start
        inside = np.ones(len(here), bool)
        for low_side, high_side in ((0, 2), (1, 3)):
            width = np.minimum(
                a[here, high_side] - a[here, low_side], b[there, high_side] - b[there, low_side]
            )
            common = np.minimum(a[here, high_side], b[there, high_side]) - np.maximum(
                a[here, low_side], b[there, low_side]
            )
            inside &= common > _TOUCH * width
        found.append(np.stack([known[0][here[inside]], names[there[inside]]], 1))
    return np.concatenate(found)
