"""The order of an epoch: a function of (seed, epoch, lanes), whoever reads it.

The shards are permuted; their chips, one shard's after the other's, are a sequence that is cut into
*lanes*: equal contiguous spans of chips. Every lane goes through its span in *windows*, of a few
*pieces* each, a piece being what a lane has of a shard: the chips of a window are permuted. Every
batch takes as many chips from each lane. A rank that takes whole lanes reads its share of the
shards only; a shard on a border of lanes is read by both, each its chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from geolink.stream.sampling import Selection


class Piece(NamedTuple):
    """Some consecutive chips of a shard."""

    place: int
    """Of the shard in the epoch's permuted shards."""
    shard: int
    chips: NDArray[np.int64]
    """Places in the shard, rising; a chip may come several times."""


class Window(NamedTuple):
    """Pieces that are in memory together."""

    lane: int
    number: int
    """In its lane."""
    low: int
    high: int
    """First and last + 1 chip of the epoch's sequence."""
    first: int
    last: int
    """First and last + 1 place of its shards."""

    @property
    def size(self) -> int:
        """Chips."""
        return self.high - self.low

    @property
    def pieces(self) -> int:
        """Shards that are read."""
        return self.last - self.first


class Sequence:
    """The chips of an epoch, shard by shard; `seed` none: in stored order."""

    def __init__(self, selection: Selection, seed: int | None, epoch: int = 0) -> None:
        shards = len(selection.start) - 1
        self._selection, self._seed, self._epoch = selection, seed, epoch
        if seed is None:
            self.shards = np.arange(shards)
            times = np.ones(len(selection.chip), np.int64)
        else:
            rng = np.random.default_rng((seed, epoch))
            self.shards = rng.permutation(shards)
            times = selection.times(rng)
        self._chip = np.repeat(selection.chip, times)
        ends = np.concatenate([[0], np.cumsum(times)])
        self._low, self._high = ends[selection.start[:-1]], ends[selection.start[1:]]
        sizes = (self._high - self._low)[self.shards]
        self.start = np.concatenate([[0], np.cumsum(sizes)])
        """[S + 1], where in the sequence each shard's chips begin."""

    @property
    def total(self) -> int:
        """Chips."""
        return int(self.start[-1])

    def windows(self, lane: int, lanes: int, pieces: int) -> list[Window]:
        """The windows of a lane, of so many pieces each."""
        low, high = self.total * lane // lanes, self.total * (lane + 1) // lanes
        # Shards without chips are no pieces.
        places = np.flatnonzero((self.start[:-1] < high) & (self.start[1:] > low) & self._filled)
        found = []
        for n, at in enumerate(range(0, len(places), pieces)):
            part = places[at : at + pieces]
            first, last = int(part[0]), int(part[-1]) + 1
            found.append(
                Window(lane, n, max(low, int(self.start[first])), min(high, int(self.start[last])),
                       first, last)
            )  # fmt: skip
        return found

    @property
    def _filled(self) -> NDArray[np.bool_]:
        return np.diff(self.start) > 0

    def pieces(self, window: Window) -> list[Piece]:
        """What a window is made of."""
        found = []
        for place in range(window.first, window.last):
            low, high = np.clip(self.start[place : place + 2], window.low, window.high)
            if low < high:
                shard = int(self.shards[place])
                at = self._low[shard] - self.start[place]
                found.append(Piece(place, shard, self._chip[low + at : high + at]))
        return found

    def order(self, window: Window, pieces: list[Piece]) -> NDArray[np.int64]:
        """A permutation of the chips of a window's pieces.

        A chip that comes several times is spread evenly over the window, so that it comes once in
        a batch.
        """
        if self._seed is None:
            return np.arange(window.size)
        chips = np.concatenate([p.chips + (p.place << 32) for p in pieces])
        rng = np.random.default_rng((self._seed, self._epoch, window.lane, window.number))
        order = rng.permutation(len(chips))
        begins = np.flatnonzero(np.diff(chips, prepend=-1))
        if len(begins) == len(chips):
            return order
        times = np.diff(begins, append=len(chips))
        copy = np.arange(len(chips)) - np.repeat(begins, times)
        offset = np.repeat(rng.uniform(size=len(begins)), times)
        return np.lexsort((order, (copy + offset) / np.repeat(times, times)))

    def stand_ins(self, piece: Piece) -> Iterator[Piece]:
        """What may take the place of a piece that cannot be read, the best first: as many chips of
        shards from half an epoch away on."""
        count, start = len(self.shards), self._selection.start
        for step in range(1, count):
            place = (piece.place + count // 2 + step - 1) % count
            shard = int(self.shards[place])
            chips = self._selection.chip[start[shard] : start[shard + 1]]
            if len(chips) and place != piece.place:
                taken = np.sort(chips[np.arange(len(piece.chips)) % len(chips)])
                yield Piece(place, shard, taken)
