"""Threads that work ahead of a stream: some read windows, some pack batches.

The pixels of a batch are copied once from those of its shards, into memory that is page-locked on
request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from geolink.stream.batch import Batch, make_batch
from geolink.stream.chips import Chips, Ended, join
from geolink.stream.order import Sequence, Window
from geolink.stream.source import Source

AHEAD = 2
"""Batches packed before they are asked for."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What batches are made of."""

    sequence: Sequence
    lanes: list[list[Window]]
    """Windows of each lane that is read here."""
    part: int
    """Chips that a batch takes of each lane."""
    steps: range
    """Batches to make."""
    pad: bool
    """Whether the last batch is filled up with chips of weight 0."""
    shards_ahead: int
    """Shards that are read before they are needed, at most."""
    readers: int
    pin: bool


class _Part(NamedTuple):
    """Some chips of a window, in a batch."""

    chips: Chips
    low: int
    high: int
    padding: bool


def batches(source: Source, plan: Plan) -> Generator[Batch]:
    """Batches made ahead in threads, which end with this generator."""
    reader = ThreadPoolExecutor(plan.readers, "geolink-reader")
    planner = ThreadPoolExecutor(1, "geolink-planner")
    packer = ThreadPoolExecutor(1, "geolink-packer")
    planned = _plan_batches(source, plan, reader)

    def pack_next() -> Future[Batch] | None:
        parts = next(planned, None)
        return None if parts is None else packer.submit(_pack, source, parts, plan.pin)

    try:
        ahead = deque(planner.submit(pack_next) for _ in range(AHEAD))
        while (packed := ahead.popleft().result()) is not None:
            ahead.append(planner.submit(pack_next))
            yield packed.result()
    finally:
        # The readers first: the others may be waiting for what they will not read any more.
        for pool in (reader, planner, packer):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (planner, packer, reader):
            pool.shutdown()


def _plan_batches(source: Source, plan: Plan, reader: ThreadPoolExecutor) -> Iterator[list[_Part]]:
    """Which chips of which windows each batch takes, once they are in memory."""
    part, first = plan.part, plan.steps.start * plan.part
    ends = [np.cumsum([w.size for w in windows]) for windows in plan.lanes]
    if not plan.steps:
        return
    current = [int(np.searchsorted(end[:-1], first, side="right")) for end in ends]
    queue = _Ahead(source, plan, reader, current)
    held = [queue.next(lane) for lane in range(len(plan.lanes))]
    for step in plan.steps:
        parts = []
        queue.fill()
        for lane, windows in enumerate(plan.lanes):
            low, high = step * part, (step + 1) * part
            while low < high:
                end = int(ends[lane][current[lane]])
                if low >= end and current[lane] + 1 < len(windows):
                    del held[lane]
                    current[lane] += 1
                    held.insert(lane, queue.next(lane))
                    continue
                # Beyond the end of the lane, from the beginning of its last window on.
                padding = low >= end
                stop = high if padding else min(high, end)
                if padding and not plan.pad:
                    break
                begin = end - windows[current[lane]].size
                parts.append(_Part(held[lane], low - begin, stop - begin, padding))
                low = stop
        yield parts


class _Ahead:
    """Windows in the order in which they are needed, read ahead as far as memory allows."""

    def __init__(
        self, source: Source, plan: Plan, reader: ThreadPoolExecutor, current: list[int]
    ) -> None:
        self._source, self._plan, self._reader = source, plan, reader
        needed = [
            (begin // plan.part, lane, n)
            for lane, windows in enumerate(plan.lanes)
            for n, begin in enumerate(np.cumsum([0, *(w.size for w in windows[:-1])]).tolist())
            if n >= current[lane]
        ]
        self._waiting = deque((lane, n) for _, lane, n in sorted(needed))
        self._coming: list[deque[Future[Chips]]] = [deque() for _ in plan.lanes]
        self._room = plan.shards_ahead + sum(
            windows[n].pieces for windows, n in zip(plan.lanes, current, strict=True)
        )
        self._left = Ended()
        self.fill()

    def next(self, lane: int) -> Chips:
        """The next window of a lane."""
        while not self._coming[lane]:
            # Needed now, though more is in memory than there should be.
            self._submit(*self._waiting.popleft())
        chips = self._coming[lane].popleft().result()
        # It leaves memory when the last batch that takes of it is made, in whatever thread.
        self._left.keep(chips, chips.pieces)
        return chips

    def fill(self) -> None:
        """Read what there is room for."""
        self._room += sum(self._left.given_back())
        while self._waiting:
            lane, number = self._waiting[0]
            if self._plan.lanes[lane][number].pieces > self._room:
                return
            self._submit(*self._waiting.popleft())

    def _submit(self, lane: int, number: int) -> None:
        window = self._plan.lanes[lane][number]
        self._room -= window.pieces
        self._coming[lane].append(
            self._reader.submit(self._source.load, self._plan.sequence, window)
        )


def _pack(source: Source, parts: list[_Part], pin: bool) -> Batch:
    (shape, dtype), total = parts[0].chips.pixels, sum(p.high - p.low for p in parts)
    if pin:
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        image = torch.empty((total, *shape), dtype=kind, pin_memory=True)
    else:
        memory = source.batches.take((total, *shape), dtype)
        lent = memory.view()
        source.batches.lend(lent, [memory])
        image = torch.from_numpy(lent)
    pixels, at, taken = image.numpy(), 0, []
    for part in parts:
        count = part.high - part.low
        arrays = part.chips.take(part.low, part.high, pixels[at : at + count])
        if part.padding:
            arrays["weight"][:] = 0
        taken.append(arrays)
        at += count
    joined = taken[0] if len(taken) == 1 else join(taken)
    batch = make_batch(joined, image, source.number)
    return batch.pin_memory() if pin else batch
