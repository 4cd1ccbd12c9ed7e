"""Several datasets as one stream."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geolink.reader import Dataset, tag_table
from geolink.stream.batch import Batch
from geolink.stream.shards import ShardStream, check_order
from schemas.errors import GeoLinkError


class MixedStream:
    """Batches of several streams, each of one of them.

    An epoch is one pass over the first stream; of each other one come `weight` batches for each of
    the first, passes over it following one another. The sequence of streams is a function of
    (seed, epoch). Batches say by `source` which stream they are of.

    Args:
        streams: made with the `number` of their place here.
        weights: of all streams but the first.
        seed: of the sequence.

    Raises GeoLinkError: a weight that is too small for a single batch an epoch.
    """

    def __init__(self, streams: Sequence[ShardStream], weights: Sequence[float], seed: int) -> None:
        self._streams, self._seed = list(streams), seed
        steps = len(streams[0])
        self._counts = np.array([steps, *(round(w * steps) for w in weights)], np.int64)
        if empty := [n for n, s in enumerate(streams) if not len(s) or not self._counts[n]]:
            raise GeoLinkError(
                f"dataset {empty[0]} of the mix gives no batch in an epoch of {steps} steps: use a "
                "smaller batch_size or a larger weight"
            )
        self.epoch = 0
        self._step = 0

    @property
    def chips(self) -> int:
        """Chips of the smallest dataset."""
        return min(stream.chips for stream in self._streams)

    @property
    def skipped(self) -> dict[str, str]:
        """Shards that could not be read so far, by id, and why."""
        return {k: v for stream in self._streams for k, v in stream.skipped.items()}

    def __len__(self) -> int:
        """Steps of an epoch."""
        return int(self._counts.sum())

    def __iter__(self) -> Iterator[Batch]:
        sources = self.sources(self.epoch)
        done = self.epoch * self._counts + np.bincount(
            sources[: self._step], minlength=len(self._counts)
        )
        with ExitStack() as stack:
            parts = []
            for stream, count in zip(self._streams, done.tolist(), strict=True):
                stream.set_step(*divmod(count, len(stream)))
                parts.append(stack.enter_context(closing(_endless(stream))))
            for source in sources[self._step :].tolist():
                batch = next(parts[source])
                self._step += 1
                yield batch
        self._step = 0

    def sources(self, epoch: int) -> NDArray[np.int64]:
        """Which stream each batch of an epoch is of: int64 [steps]."""
        each = np.repeat(np.arange(len(self._counts)), self._counts)
        return np.random.default_rng((self._seed, epoch)).permutation(each)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self._step = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: plain values, the same on every rank."""
        order = {
            "seed": self._seed, "batches": self._counts.tolist(),
            **{str(n): s.state_dict()["order"] for n, s in enumerate(self._streams)},
        }  # fmt: skip
        return {"epoch": self.epoch, "step": self._step, "order": order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another stream stood, of any number of ranks.

        Raises GeoLinkError naming what differs if that one had another order.
        """
        ours = self.state_dict()["order"]
        for n in range(len(self._streams)):
            check_order(state["order"].get(str(n), {}), ours[str(n)])
        check_order(state["order"], ours)
        self.epoch, self._step = int(state["epoch"]), int(state["step"])


def mixed_vocabulary(
    datasets: Sequence[Dataset],
) -> tuple[NDArray[np.float32], list[NDArray[np.int64]]]:
    """Text embeddings of every tag of some datasets, and where in them each dataset's are.

    Those of the first dataset come first, as they are there.

    Returns: float32 [V, D]; for each dataset int64 [its V], rows of these.

    Raises GeoLinkError if the tags were not encoded alike.
    """
    encoders = {d.tag_encoder for d in datasets}
    if len(encoders) > 1:
        raise GeoLinkError(
            f"the tags of a mix are of different encoders ({', '.join(sorted(encoders))}); build "
            "all of its datasets with one"
        )
    ids = datasets[0].vocabulary
    for dataset in datasets[1:]:
        ids = np.concatenate([ids, np.setdiff1d(dataset.vocabulary, ids)])
    order = np.argsort(ids)
    rows = [order[np.searchsorted(ids, d.vocabulary, sorter=order)] for d in datasets]
    tables = [tag_table(d) for d in datasets]
    table = np.zeros((len(ids), tables[0].shape[1]), np.float32)
    for place, part in zip(rows, tables, strict=True):
        table[place] = part
    return table, rows


def _endless(stream: ShardStream) -> Generator[Batch]:
    while True:
        yield from stream
        stream.set_epoch(stream.epoch + 1)
