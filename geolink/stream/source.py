"""Where the chips of a stream come from: shards of one dataset, filtered, weighed and read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geolink.graph import normalise_tag_weight
from geolink.reader import Arrays, Dataset, check_relations, tag_rows
from geolink.stream.cache import cache_folder, read_cached
from geolink.stream.chips import LABELS, STREAMED, Buffers, Chips, cut
from geolink.stream.order import Piece, Sequence, Window
from geolink.stream.sampling import Selection, select
from schemas.chunks import Rows
from schemas.dataset import SnapshotRow, read_arrays
from schemas.errors import GeoLinkError, NetworkFault
from schemas.layout import ARRAYS
from schemas.training import Quality

_THREADS = 8


@dataclass(eq=False)
class Source:
    """Shards of a dataset."""

    dataset: Dataset
    split: str | None
    min_valid: float = 0.0
    quality: Quality = field(default_factory=Quality)
    balance: float = 0.0
    labels: tuple[str, ...] = ()
    cache: Path | None = None
    skip_corrupt: bool = False
    number: int = 0
    """Of the dataset in a mix."""
    vocabulary: NDArray[np.int64] | None = None
    """[V], rows of the mix's vocabulary of this dataset's; none: the same."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.labels if name not in LABELS]:
            raise GeoLinkError(f"unknown label {unknown[0]!r}; known: {', '.join(LABELS)}")
        self.rows = self.dataset.split_rows(self.split)
        self.buffers, self.batches = Buffers(), Buffers()
        self.skipped: dict[str, str] = {}
        """Shards that could not be read, by id, and why."""
        self._folder = None if self.cache is None else cache_folder(self.cache, self.dataset.path)
        self._names = (*STREAMED, *(LABELS[name] for name in self.labels))

    def select(self) -> Selection:
        """Chips that are learnt from; arrays of shards are read only if `min_valid` or `balance`
        ask for it.

        Raises GeoLinkError if there are none, or if a shard is missing or damaged.
        """
        names = ["valid"] * (self.min_valid > 0) + ["label_region"] * (self.balance > 0)
        flags = [np.array(row.chip_findings, np.uint32) for row in self.rows]
        kept = [self.quality.kept(f) for f in flags]
        presence = None
        if names:
            with ThreadPoolExecutor(_THREADS) as pool:
                read = list(pool.map(lambda row: self._small(row, names), self.rows))
            if self.min_valid > 0:
                kept = [k & (a["valid"] >= self.min_valid) for k, a in zip(kept, read)]
            if self.balance > 0:
                presence = [a["label_region"] > 0 for a in read]
        sampled = self.quality.by == "sampling"
        weight = [self.quality.weight(f) for f in flags] if sampled else None
        selection = select(kept, weight, presence, self.balance)
        if selection.total == 0:
            raise GeoLinkError(
                f"every chip of {self.dataset.path} in split {self.split or 'any'} is left out by "
                "quality or min_valid"
            )
        return selection

    def load(self, sequence: Sequence, window: Window) -> Chips:
        """The chips of a window.

        Raises GeoLinkError naming the shard: it is missing or damaged.
        """
        pieces = sequence.pieces(window)
        order = sequence.order(window, pieces)
        shards, chips = [], []
        for piece in pieces:
            arrays, chosen = self._read_or_skip(sequence, piece)
            shards.append(arrays)
            chips.append(chosen)
        return Chips(shards, chips, order, self.buffers)

    def _read_or_skip(self, sequence: Sequence, piece: Piece) -> tuple[Arrays, NDArray[np.int64]]:
        """A piece's arrays, and its chips in them; of another piece where it cannot be read."""
        try:
            return self._read(piece)
        except NetworkFault:
            raise
        except GeoLinkError as error:
            if not self.skip_corrupt:
                raise
            self.skipped.setdefault(self.rows[piece.shard].shard, str(error))
            for other in sequence.stand_ins(piece):
                try:
                    return self._read(other)
                except NetworkFault:
                    raise
                except GeoLinkError as also:
                    self.skipped.setdefault(self.rows[other.shard].shard, str(also))
            raise GeoLinkError(f"no shard can be read: {error}") from None

    def _read(self, piece: Piece) -> tuple[Arrays, NDArray[np.int64]]:
        """Arrays of the chips between a piece's first and last, and its chips in them.

        Tags are rows of the vocabulary, with weights; each chip has its `weight` and `gsd_m`.
        """
        low, high = int(piece.chips[0]), int(piece.chips[-1]) + 1
        arrays = self._arrays(self.rows[piece.shard], self._names, (low, high))
        check_relations(arrays, self.rows[piece.shard].path)
        rows = tag_rows(self.dataset, arrays.pop("tag"))[arrays["object_tag"]]
        arrays["tag_weight"] = normalise_tag_weight(
            arrays["object_tag_offset"], self.dataset.key_weight[rows]
        )
        arrays["object_tag"] = rows if self.vocabulary is None else self.vocabulary[rows]
        size = np.array(arrays["image"].shape[:1:-1])
        sides = np.diff(arrays.pop("bounds").reshape(-1, 2, 2), axis=1)[:, 0]
        # An imported pair need not be square.
        arrays["gsd_m"] = np.sqrt((sides / size).prod(axis=1)).astype(np.float32)
        finding = arrays.pop("finding")
        sampled = self.quality.by == "sampling"
        arrays["weight"] = np.ones(len(finding), np.float32) if sampled else (
            self.quality.weight(finding)
        )  # fmt: skip
        parts = {n: arrays.pop(n) for n in self._names if ARRAYS[n].chunk_chips is not None}
        return {**cut(arrays, low, high), **parts}, piece.chips - low

    def _small(self, row: SnapshotRow, names: list[str]) -> Arrays:
        """Small arrays of a shard; of one that is skipped, such that none of its chips is kept."""
        try:
            return self._arrays(row, names, None)
        except NetworkFault:
            raise
        except GeoLinkError as error:
            if not self.skip_corrupt:
                raise
            self.skipped.setdefault(row.shard, str(error))
            classes = len(self.dataset.info.taxonomy.classes)
            return {
                "valid": np.full(row.chips, -1, np.float32),
                "label_region": np.zeros((row.chips, classes), np.float32),
            }

    def _arrays(self, row: SnapshotRow, names: Any, chips: Rows) -> Arrays:
        if self._folder is None:
            return read_arrays(self.dataset.path, row.path, names, chips, self.buffers.take)[0]
        return read_cached(
            self.dataset.path, row.path, names, self._folder, chips, self.buffers.take
        )
