"""Composites: which scene gives each pixel of a block.

`Layers` takes scenes one at a time, best first, and keeps one image in memory. `median` needs all
scenes at once and works through the block in strips.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.sensor import Sensor

_MEDIAN_BYTES = 384 << 20


@dataclass(frozen=True)
class Composite:
    """A block put together from scenes."""

    image: NDArray[Any]
    """[band, y, x]"""
    valid: NDArray[np.bool_]
    """[y, x]"""
    rank: NDArray[np.int32]
    """[y, x] rank of the scene of each pixel; -1: none."""


def data_of(
    image: NDArray[Any], clouded: NDArray[np.bool_] | None, nodata: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Pixels [y, x] of a scene with data in some band, and those that are valid.

    Valid: not clouded, and with data in all bands. 8-bit images use 0 for black too, so there a
    pixel is empty only if every band is.
    """
    filled = image != nodata
    has_data = filled.any(axis=0)
    good = has_data if image.dtype == np.uint8 else filled.all(axis=0)
    return has_data, good if clouded is None else good & ~clouded


class Layers:
    """What has been put together of scenes so far.

    patch: None, then a pixel comes from the first scene where it is valid, and where no scene is,
    from the first that has data. Else the side of a patch in pixels: all of a patch comes from the
    scene that has most valid pixels in it; of equals, from the first.
    """

    def __init__(self, sensor: Sensor, shape: tuple[int, int], patch: int | None) -> None:
        self.nodata = sensor.nodata
        self.image = np.full((len(sensor.bands), *shape), sensor.nodata, sensor.dtype)
        self.valid = np.zeros(shape, bool)
        self.rank = np.full(shape, -1, np.int32)
        self.patch = patch
        if patch is not None:
            # Valid pixels in each patch so far; -1: not even data.
            self.best = np.full((shape[0] // patch, shape[1] // patch), -1, np.int32)

    @property
    def complete(self) -> bool:
        """Whether no scene can give any more."""
        return bool(self.valid.all())

    def wants(self, clouded: NDArray[np.bool_] | None) -> bool:
        """Whether a scene with this mask can give a pixel."""
        if clouded is None:
            return True
        if self.patch is not None:
            return bool((self._in_patches(~clouded) > self.best).any())
        return bool(((self.rank < 0) | ~(self.valid | clouded)).any())

    def add(self, rank: int, image: NDArray[Any], clouded: NDArray[np.bool_] | None) -> bool:
        """Take from a scene what is missing; whether it gave a pixel."""
        has_data, good = data_of(image, clouded, self.nodata)
        if self.patch is None:
            take = (good & ~self.valid) | (has_data & (self.rank < 0))
        else:
            take = self._better(has_data, good)
        if not take.any():
            return False
        if (self.rank < 0).all():
            self.image = image
            self.rank[has_data] = rank
            self.valid = good
            return True
        np.copyto(self.image, image, where=take)
        self.rank[take] = np.where(has_data, rank, -1)[take]
        self.valid = np.where(take, good, self.valid)
        return True

    def _better(self, has_data: NDArray[np.bool_], good: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Pixels [y, x] of the patches of which a scene shows more than those before it."""
        assert self.patch
        seen = self._in_patches(good)
        seen[self._in_patches(has_data) == 0] = -1
        better = seen > self.best
        self.best = np.maximum(self.best, seen)
        return better.repeat(self.patch, axis=0).repeat(self.patch, axis=1)

    def _in_patches(self, flags: NDArray[np.bool_]) -> NDArray[np.int32]:
        assert self.patch
        rows, cols = self.best.shape
        parts = flags.reshape(rows, self.patch, cols, self.patch)
        counts: NDArray[np.int32] = np.count_nonzero(parts, axis=3).sum(axis=1).astype(np.int32)
        return counts

    def result(self) -> Composite:
        """The composite."""
        return Composite(self.image, self.valid, self.rank)


Part = tuple[NDArray[Any], NDArray[np.bool_] | None]
"""Image [band, y, x] and mask [y, x] (None: it has none) of a scene in some rows of a block."""


def median(
    sensor: Sensor,
    shape: tuple[int, int],
    scenes: int,
    read: Callable[[slice], Sequence[Part | None]],
) -> Composite:
    """Median of each band over the scenes where a pixel is valid.

    read: all scenes' parts in some rows; None: nothing.

    Of an even number, the mean of the two in the middle, halves rounded up. A pixel that is valid
    nowhere comes from the first scene with data. `rank` is the first scene with a valid pixel there
    (else with data), which is the scene whose time a chip gets.
    """
    bands = len(sensor.bands)
    image = np.full((bands, *shape), sensor.nodata, sensor.dtype)
    valid, rank = np.zeros(shape, bool), np.full(shape, -1, np.int32)
    for rows in _strips(shape, bands * scenes * image.itemsize):
        parts = read(rows)
        pixels = [p[0] for p in parts if p is not None]
        at = [k for k, p in enumerate(parts) if p is not None]
        if not pixels:
            continue
        has_data, good = map(
            np.stack,
            zip(*(data_of(p[0], p[1], sensor.nodata) for p in parts if p is not None)),
        )
        valid[rows] = good.any(axis=0)
        first = np.where(valid[rows], good.argmax(axis=0), has_data.argmax(axis=0))
        rank[rows] = np.where(has_data.any(axis=0), np.array(at, np.int32)[first], -1)
        count = np.count_nonzero(good, axis=0)
        for b in range(bands):
            values = np.stack([p[b] for p in pixels])
            alone = np.take_along_axis(values, first[None], axis=0)[0]
            image[b, rows] = np.where(count > 0, _middle(values, good, count), alone)
    return Composite(image, valid, rank)


def _middle(values: NDArray[Any], good: NDArray[np.bool_], count: NDArray[np.intp]) -> NDArray[Any]:
    """Median [y, x] of the good ones among values [scene, y, x]; overwrites `values`."""
    values[~good] = np.iinfo(values.dtype).max
    values.sort(axis=0)
    low = np.take_along_axis(values, (np.maximum(count, 1) - 1)[None] // 2, axis=0)[0]
    high = np.take_along_axis(values, np.minimum(count // 2, len(values) - 1)[None], axis=0)[0]
    apart = high - low
    middle: NDArray[Any] = low + apart // 2 + apart % 2
    return middle


def _strips(shape: tuple[int, int], bytes_per_pixel: int) -> Iterator[slice]:
    """Rows of a block, so many at a time as memory allows."""
    rows = max(1, _MEDIAN_BYTES // (bytes_per_pixel * shape[1]))
    return (slice(y, min(y + rows, shape[0])) for y in range(0, shape[0], rows))
