"""Streaming a dataset as packed batches, in a seeded order, read ahead in the background.

Shards are read whole and shuffled in memory. An epoch's order is a function of (seed, epoch): the
shards are permuted and cut into windows of several, and the chips of each window are permuted.
That sequence is cut into global batches, of which every rank takes its own part: the chips of a
step are the same however many ranks there are.

Threads do the work ahead of the consumer: some read the shards of the next window, one packs
batches of this one. At most two windows and a few batches are in memory; while one window gives
way to the next, shards of a third begin to come in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geolink.graph import GraphBatch, csr_take, normalise_tag_weight, pack
from geolink.reader import Arrays, Dataset, read_shard, tag_rows
from schemas.dataset import SnapshotRow
from schemas.errors import GeoLinkError
from schemas.training import Quality

_CHIP = ("valid", "chip_id", "center_lonlat", "time", "label_patch", "label_region")
_OBJECT = ("object_kind", "object_class", "object_osm", "object_size", "object_anchor")
_RAGGED = (
    "object_offset", "object_tag_offset", "object_tag", "tag", "edge_offset", "edge", "relation",
    "patch_offset", "patch", "patch_weight",
)  # fmt: skip
STREAMED = ("image", "finding", "bounds", *_CHIP, *_OBJECT, *_RAGGED)
"""Arrays of a shard that are read."""
LABELS = {"pixel": "label_pixel"}
"""What is read besides where it is asked for: label to array."""
_AHEAD = 2
"""Batches packed before they are asked for."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B chips: pixels, graphs, labels."""

    image: Tensor
    """[B, band, y, x] in the storage type of the sensor, uint8 or uint16."""
    graph: GraphBatch
    valid: Tensor
    """float32 [B], fraction of pixels neither nodata nor cloud."""
    weight: Tensor
    """float32 [B], how much each chip counts in a loss (`Quality.weights`)."""
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


class ShardStream:
    """Shuffled batches of a split, epoch by epoch.

    Iterating goes on from where the stream stands: from the beginning of the epoch at first, in
    its middle after `load_state_dict` or after a loop that was left early.

    Args:
        split: `train`, `val`, `test`; none: all of them.
        batch_size: chips of one step, over all ranks together.
        seed: of the order.
        window_shards: shards that are shuffled together; the more, the better mixed, and the more
            memory is needed.
        readers: threads that read shards.
        rank, world_size: which part of every batch this process takes, of how many.
        drop_last: leave out the last batch of an epoch if it is not full.
        min_valid: leave out chips with a smaller valid fraction.
        quality: which chips are left out, and how the others are weighed, by their findings.
        labels: what batches hold besides: `pixel`.

    Raises GeoLinkError: a split without chips, sizes that do not divide; while iterating: a
    missing or damaged shard.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        split: str | None,
        batch_size: int,
        seed: int,
        window_shards: int = 8,
        readers: int = 1,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        min_valid: float = 0.0,
        quality: Quality | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        if not 0 <= rank < world_size:
            raise GeoLinkError(f"rank {rank} is none of the {world_size} ranks 0..{world_size - 1}")
        if batch_size % world_size:
            raise GeoLinkError(
                f"batch_size {batch_size} cannot be shared evenly by {world_size} ranks"
            )
        self.epoch = 0
        self._step = 0
        quality = quality or Quality()
        self._source = _Source(dataset, dataset.split_rows(split), min_valid, quality, labels)
        self._counts = self._source.counts()
        self._batch_size, self._drop_last = batch_size, drop_last
        self._window_shards, self._readers = window_shards, readers
        self._rank, self._world_size = rank, world_size
        self._order = {
            "snapshot": dataset.snapshot, "split": split, "seed": seed, "batch_size": batch_size,
            "window_shards": window_shards, "min_valid": min_valid, "drop_last": drop_last,
            "drop": sorted(set(quality.drop)) or None,
        }  # fmt: skip
        self._seed = seed

    @property
    def chips(self) -> int:
        """Chips of an epoch."""
        return int(self._counts.sum())

    def __len__(self) -> int:
        """Steps of an epoch."""
        chips = self.chips
        return chips // self._batch_size if self._drop_last else -(-chips // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        spans = self._spans()[self._step :]
        share = self._rank, self._world_size
        for batch in _batches(self._source, self._windows(), spans, self._readers, share):
            # Counted before it is handed out, so that a state taken while it is in use has it.
            self._step += 1
            yield batch
        self._step = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self._step = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: plain values, the same on every rank."""
        return {"epoch": self.epoch, "step": self._step, "order": dict(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream stood, of any number of ranks.

        Raises GeoLinkError naming what differs if that one had another order.
        """
        theirs = dict(state["order"])
        for name, value in self._order.items():
            if theirs.get(name) != value:
                raise GeoLinkError(
                    f"cannot go on in the order of chips: {name} was {theirs.get(name)!r} and is "
                    f"{value!r} now"
                )
        self.epoch, self._step = int(state["epoch"]), int(state["step"])

    def _windows(self) -> list[_Window]:
        """The epoch's windows: their shards and the order of their chips."""
        rng = np.random.default_rng((self._seed, self.epoch))
        shards = rng.permutation(len(self._counts))
        parts = [
            shards[n : n + self._window_shards]
            for n in range(0, len(shards), self._window_shards)
        ]  # fmt: skip
        return [_Window(part, rng.permutation(int(self._counts[part].sum()))) for part in parts]

    def _spans(self) -> NDArray[np.int64]:
        """First and last + 1 position in the epoch's order of each batch of all ranks."""
        start = np.arange(len(self)) * self._batch_size
        return np.stack([start, np.minimum(start + self._batch_size, self._counts.sum())], axis=1)


def read_chips(
    dataset: Dataset,
    split: str | None,
    *,
    batch_size: int,
    readers: int = 1,
    min_valid: float = 0.0,
    labels: Sequence[str] = (),
) -> Iterator[Batch]:
    """Every chip of a split once, in stored order (by shard id, then raster order).

    labels: what batches hold besides: `pixel`.

    Raises GeoLinkError: a split without chips, a missing or damaged shard.
    """
    source = _Source(dataset, dataset.split_rows(split), min_valid, Quality(), labels)
    counts = source.counts()
    windows = [_Window(np.array([n]), np.arange(count)) for n, count in enumerate(counts)]
    start = np.arange(0, int(counts.sum()), batch_size)
    spans = np.stack([start, np.minimum(start + batch_size, counts.sum())], axis=1)
    yield from _batches(source, windows, spans, readers)


@dataclass(frozen=True, eq=False)
class _Window:
    """Shards that are in memory together."""

    shards: NDArray[np.int64]
    order: NDArray[np.int64]
    """A permutation of their chips."""


@dataclass(frozen=True, eq=False)
class _Source:
    """Where shards come from."""

    dataset: Dataset
    rows: Sequence[SnapshotRow]
    min_valid: float
    quality: Quality
    labels: Sequence[str]

    def counts(self) -> NDArray[np.int64]:
        """Chips of each shard; shards are read only if `min_valid` asks for it."""
        if self.min_valid <= 0 and not self.quality.drop:
            return np.array([row.chips for row in self.rows], np.int64)
        return np.array([np.count_nonzero(self._kept(row)) for row in self.rows], np.int64)

    def _kept(self, row: SnapshotRow) -> NDArray[np.bool_]:
        kept = self.quality.kept(np.array(row.chip_findings, np.uint32))
        if self.min_valid > 0:
            kept &= read_shard(self.dataset, row, ("valid",))["valid"] >= self.min_valid
        return kept

    def read(self, shard: int) -> Arrays:
        """A shard's arrays with its tags as rows of the vocabulary, and weights for them.

        Also which chips are `kept`, and the `weight` of each.
        """
        arrays = read_shard(
            self.dataset, self.rows[shard], (*STREAMED, *(LABELS[n] for n in self.labels))
        )
        rows = tag_rows(self.dataset, arrays.pop("tag"))[arrays["object_tag"]]
        arrays["object_tag"] = rows
        arrays["tag_weight"] = normalise_tag_weight(
            arrays["object_tag_offset"], self.dataset.key_weight[rows]
        )
        sides = np.diff(arrays.pop("bounds").reshape(-1, 2, 2), axis=1)[:, 0]
        # An imported pair need not be square.
        pixels = np.array(arrays["image"].shape[:1:-1])
        arrays["gsd_m"] = np.sqrt((sides / pixels).prod(axis=1)).astype(np.float32)
        finding = arrays.pop("finding")
        arrays["weight"] = self.quality.weight(finding)
        arrays["kept"] = self.quality.kept(finding) & (arrays["valid"] >= self.min_valid)
        return arrays


def _batches(
    source: _Source,
    windows: Sequence[_Window],
    spans: NDArray[np.int64],
    readers: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Batches made ahead in threads, which end with this generator.

    spans: [S, 2] positions, in the windows' order of chips, of the batches to make; ascending.
    share: which part of every batch is made, of how many: chips that follow one another in it.
    """
    reader = ThreadPoolExecutor(readers, "geolink-reader")
    packer = ThreadPoolExecutor(1, "geolink-packer")
    made = _make_batches(source, windows, spans, reader, share)
    try:
        ahead = deque(packer.submit(next, made, None) for _ in range(_AHEAD))
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(packer.submit(next, made, None))
            yield batch
    finally:
        # The readers first: the packer may be waiting for what they will not read any more.
        for pool in (reader, packer):
            pool.shutdown(wait=False, cancel_futures=True)
        packer.shutdown()
        reader.shutdown()


def _make_batches(
    source: _Source,
    windows: Sequence[_Window],
    spans: NDArray[np.int64],
    reader: ThreadPoolExecutor,
    share: tuple[int, int],
) -> Iterator[Batch]:
    if len(spans) == 0:
        return
    start = np.concatenate([[0], np.cumsum([len(w.order) for w in windows])])
    window = int(np.searchsorted(start, spans[0, 0], side="right")) - 1
    loaded = _load(source, windows[window:], reader)
    chips = next(loaded)
    for low, high in spans.tolist():
        parts: list[Arrays] = []
        # What is made of the batch, counted from where the loop stands in it.
        first, end = ((high - low) * n // share[1] for n in (share[0], share[0] + 1))
        while low < high:
            if low >= start[window + 1]:
                del chips
                chips, window = next(loaded), window + 1
                continue
            last = min(high, int(start[window + 1]))
            mine = slice(max(first, 0), max(min(end, last - low), 0))
            if mine.start < mine.stop:
                order = windows[window].order[low - start[window] : last - start[window]]
                parts.append(chips.take(order, mine))
            first, end, low = first - (last - low), end - (last - low), last
        # A rank may have no part in a last batch of fewer chips than ranks.
        parts = parts or [chips.take(np.zeros(0, np.int64))]
        yield _batch(parts[0] if len(parts) == 1 else _join(parts))


def _load(
    source: _Source, windows: Sequence[_Window], reader: ThreadPoolExecutor
) -> Iterator[_Chips]:
    """The windows' chips, the shards of the next window being read meanwhile."""
    reading = [reader.submit(source.read, int(n)) for n in windows[0].shards]
    for following in (*windows[1:], None):
        shards = [future.result() for future in reading]
        reading = [] if following is None else [
            reader.submit(source.read, int(n)) for n in following.shards
        ]  # fmt: skip
        yield _Chips(shards)


class _Chips:
    """The chips of a window."""

    def __init__(self, shards: list[Arrays]) -> None:
        self._images = [arrays.pop("image") for arrays in shards]
        self._first = np.cumsum([0, *(len(image) for image in self._images)])
        self._arrays = _join(shards)
        self._per_chip = (*_CHIP, "weight", "gsd_m", *(set(LABELS.values()) & set(self._arrays)))
        self._kept = np.flatnonzero(self._arrays.pop("kept"))

    def take(self, chips: NDArray[np.int64], part: slice = slice(None)) -> Arrays:
        """Arrays of some chips, as a shard holds them; in stored order, and of that a part."""
        rows = np.sort(self._kept[chips])[part]
        a = self._arrays

        def pick(name: str, index: NDArray[np.int64]) -> NDArray[Any]:
            # Several times faster than indexing where an item is more than one number.
            return np.take(a[name], index, axis=0)

        objects, object_offset = csr_take(a["object_offset"], rows)
        edges, edge_offset = csr_take(a["edge_offset"], rows)
        tags, tag_offset = csr_take(a["object_tag_offset"], objects)
        patches, patch_offset = csr_take(a["patch_offset"], objects)
        return {
            "image": self._take_images(rows),
            **{name: pick(name, rows) for name in self._per_chip},
            "object_offset": object_offset,
            **{name: pick(name, objects) for name in _OBJECT},
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

    def _take_images(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Shard by shard (rows rise), so that every pixel is copied once."""
        taken = np.empty((len(rows), *self._images[0].shape[1:]), self._images[0].dtype)
        cuts = np.searchsorted(rows, self._first)
        for n, image in enumerate(self._images):
            part = slice(cuts[n], cuts[n + 1])
            # Any mode but the default writes into `out` without a buffer.
            np.take(image, rows[part] - self._first[n], axis=0, out=taken[part], mode="clip")
        return taken


def _join(parts: Sequence[Arrays]) -> Arrays:
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


def _batch(a: Arrays) -> Batch:
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
        image=torch.from_numpy(a["image"]),
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
    )
