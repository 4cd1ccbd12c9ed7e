"""The stream of one dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from geolink.reader import Dataset
from geolink.stream.batch import Batch
from geolink.stream.loader import Plan, batches
from geolink.stream.memory import window_that_fits
from geolink.stream.order import Sequence
from geolink.stream.sampling import Selection
from geolink.stream.source import Source
from schemas.errors import GeoLinkError
from schemas.training import Quality


class ShardStream:
    """Shuffled batches of a split, epoch by epoch.

    Iterating goes on from where the stream stands: from the beginning of the epoch at first, in
    its middle after `load_state_dict` or after a loop that was left early.

    Every rank makes the same number of steps, with `batch_size / world_size` chips in each.

    Args:
        split: `train`, `val`, `test`; none: all of them.
        batch_size: chips of one step, over all ranks together.
        seed: of the order, which is a function of (seed, epoch, lanes).
        window_shards: shards that are shuffled together, over all lanes; the more, the better
            mixed, and the more memory is needed.
        memory_mb: what all ranks together may hold of shards and batches, in MB (10^6 bytes):
            fewer shards are shuffled together where they would not fit. None: no limit but
            `window_shards`, of which twice as many shards are in memory.
        lanes: into how many equal spans the epoch's shards are cut, of which every batch takes
            equal parts (`geolink.stream.order`). Ranks take whole lanes, so it must be a multiple
            of `world_size`. None: the largest power of two that divides batch_size and does
            not exceed the shards that are shuffled together.
        readers: threads that read shards.
        rank, world_size: which part of every batch this process takes, of how many.
        drop_last: leave out the last chips of an epoch if they do not fill a batch; else it is
            filled up with other chips, whose weight is 0.
        min_valid: leave out chips with a smaller valid fraction.
        quality: which chips are left out, and how the others are weighed, by their findings.
        balance: classes on a smaller share of the chips than this are seen more often
            (`geolink.stream.sampling.repeat_factor`); 0: every chip once.
        labels: what batches hold besides: `pixel`.
        cache: folder where shards of a remote dataset are kept; none: read from the store.
        on_corrupt: whether a shard that is missing or damaged ends the stream, or is noted in
            `skipped`, and its place is taken by chips of other shards.
        pin: batches in page-locked memory.
        number: of the dataset in a mix.
        vocabulary: [V], where this dataset's tags are in the mix's (`mixed_vocabulary`).

    Raises GeoLinkError: a split without chips, sizes that do not divide, too little memory; while
    iterating: a missing or damaged shard.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        split: str | None,
        batch_size: int,
        seed: int,
        window_shards: int = 8,
        memory_mb: int | None = None,
        lanes: int | None = None,
        readers: int = 1,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        min_valid: float = 0.0,
        quality: Quality | None = None,
        balance: float = 0.0,
        labels: tuple[str, ...] = (),
        cache: Path | None = None,
        on_corrupt: Literal["fail", "skip"] = "fail",
        pin: bool = False,
        number: int = 0,
        vocabulary: NDArray[np.int64] | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise GeoLinkError(f"rank {rank} is none of the {world_size} ranks 0..{world_size - 1}")
        if batch_size % world_size:
            raise GeoLinkError(
                f"batch_size {batch_size} cannot be shared evenly by {world_size} ranks"
            )
        quality = quality or Quality()
        self._source = Source(
            dataset, split, min_valid, quality, balance, tuple(labels), cache,
            on_corrupt == "skip", number, vocabulary,
        )  # fmt: skip
        self._selection = self._source.select()
        window_shards = window_that_fits(
            self._source.rows, dataset.info, window_shards, lanes or 1, batch_size, memory_mb,
            label_pixel="pixel" in labels,
        )  # fmt: skip
        if lanes is None:
            lanes = _lanes(batch_size, min(window_shards, self._selection.total))
        if batch_size % lanes or lanes % world_size:
            raise GeoLinkError(
                f"{lanes} lanes cannot be shared evenly by {world_size} ranks, or batch_size "
                f"{batch_size} by the lanes: set lanes to a multiple of {world_size} that divides "
                f"{batch_size}"
            )
        if self._selection.total < lanes:
            raise GeoLinkError(f"{self._selection.total} chips cannot be cut into {lanes} lanes")
        self.epoch = 0
        self._step = 0
        self._seed, self._batch_size, self._drop_last = seed, batch_size, drop_last
        self._lanes, self._pieces = lanes, max(1, window_shards // lanes)
        self._mine = range(rank * lanes // world_size, (rank + 1) * lanes // world_size)
        self._readers, self._pin = readers, pin
        self._order = {
            "snapshot": dataset.snapshot, "split": split, "seed": seed, "batch_size": batch_size,
            "lanes": lanes, "window": self._pieces, "min_valid": min_valid,
            "drop_last": drop_last, "drop": sorted(set(quality.drop)) or None,
            "balance": balance, "chips": self._selection.total,
        }  # fmt: skip

    @property
    def chips(self) -> int:
        """Chips of an epoch; those seen several times are counted so often."""
        return self._selection.total

    @property
    def skipped(self) -> dict[str, str]:
        """Shards that could not be read so far, by id, and why."""
        return dict(self._source.skipped)

    def __len__(self) -> int:
        """Steps of an epoch."""
        size = self._batch_size
        return self.chips // size if self._drop_last else -(-self.chips // size)

    def __iter__(self) -> Iterator[Batch]:
        with closing(batches(self._source, self._plan())) as made:
            for batch in made:
                # Counted before it is handed out, so that a state taken while it is in use has it.
                self._step += 1
                yield batch
        self._step = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.set_step(epoch, 0)

    def set_step(self, epoch: int, step: int) -> None:
        """Go to where so many steps of an epoch are done."""
        self.epoch, self._step = epoch, step

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: plain values, the same on every rank."""
        return {"epoch": self.epoch, "step": self._step, "order": dict(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream stood, of any number of ranks.

        Raises GeoLinkError naming what differs if that one had another order.
        """
        check_order(state["order"], self._order)
        self.set_step(int(state["epoch"]), int(state["step"]))

    def _plan(self) -> Plan:
        sequence = Sequence(self._selection, self._seed, self.epoch)
        return Plan(
            sequence=sequence,
            lanes=[sequence.windows(lane, self._lanes, self._pieces) for lane in self._mine],
            part=self._batch_size // self._lanes,
            steps=range(self._step, len(self)),
            pad=not self._drop_last,
            shards_ahead=self._pieces * len(self._mine),
            readers=self._readers,
            pin=self._pin,
        )


def read_chips(
    dataset: Dataset,
    split: str | None,
    *,
    batch_size: int,
    readers: int = 1,
    min_valid: float = 0.0,
    labels: tuple[str, ...] = (),
    cache: Path | None = None,
    chips: list[NDArray[np.int64]] | None = None,
) -> Iterator[Batch]:
    """Every chip of a split once, in stored order (by shard id, then raster order).

    labels: what batches hold besides: `pixel`. cache: as `ShardStream`. chips: for each of
    `Dataset.split_rows`, the places of those that are read, rising; none: all.

    Raises GeoLinkError: a split without chips, a missing or damaged shard.
    """
    source = Source(dataset, split, min_valid, labels=tuple(labels), cache=cache)
    selection = source.select()
    if chips is not None:
        start = np.cumsum([0, *(len(c) for c in chips)])
        selection = Selection(start, np.concatenate([*chips, np.zeros(0, np.int64)]))
    sequence = Sequence(selection, None)
    steps = range(-(-sequence.total // batch_size))
    yield from batches(
        source,
        Plan(sequence, [sequence.windows(0, 1, 1)], batch_size, steps, False, 1, readers, False),
    )


def check_order(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises GeoLinkError naming the first thing in which two orders differ."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise GeoLinkError(
                f"cannot go on in the order of chips: {name} was {theirs.get(name)!r} and is "
                f"{value!r} now"
            )


def _lanes(batch_size: int, most: int) -> int:
    """The largest power of two that divides `batch_size` and is not above `most`."""
    lanes = 1
    while lanes * 2 <= most and batch_size % (lanes * 2) == 0:
        lanes *= 2
    return lanes
