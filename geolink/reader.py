"""Reading a dataset: snapshot, shards, tag vocabulary.

A `Dataset` is pinned to one snapshot: what is published later does not disturb it. Shards are read
whole; threads and forked processes may read side by side.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.dataset import (
    DatasetInfo,
    SnapshotRow,
    read_arrays,
    read_info,
    read_snapshot,
    tag_table_name,
    vocabulary_name,
)
from schemas.errors import GeoLinkError
from schemas.grid import printed_chip
from schemas.layout import Relation, validate
from schemas.parquet import read_parquet
from schemas.splits import SPLITS
from schemas.storage import Location, storage

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset at one snapshot."""

    path: Location
    info: DatasetInfo
    snapshot: int
    rows: list[SnapshotRow]
    """Shards by id; some may have no chips."""
    vocabulary: NDArray[np.uint64]
    """Ids [V] of every tag of the snapshot, ascending."""
    key_weight: NDArray[np.float32]
    """[V]: log of how many objects have a tag with the key of this one (0 where it is one)."""
    vocabulary_key: str
    tag_encoder: str

    def split_rows(self, split: str | None) -> list[SnapshotRow]:
        """Shards of a split that hold chips, by id; none: of all splits.

        Raises GeoLinkError for an unknown split, or one without chips.
        """
        if split not in (None, *SPLITS):
            raise GeoLinkError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        rows = [r for r in self.rows if r.chips and split in (None, r.split)]
        if not rows:
            there = {s: sum(r.chips for r in self.rows if r.split == s) for s in SPLITS}
            raise GeoLinkError(
                f"{self.path} has no chips in split {split or 'any'}: "
                + ", ".join(f"{name} {n:,}" for name, n in there.items())
            )
        return rows


def open_dataset(path: Location, snapshot: int | None = None) -> Dataset:
    """Open a dataset, in a folder or an object store, at a snapshot (none: the latest).

    Raises GeoLinkError: no dataset there, not published yet, damaged, or made by a newer version.
    """
    read_info(path)
    found = read_snapshot(path, snapshot)
    ids, weight = _read_vocabulary(path, found.vocabulary)
    encoder = found.info.tag_encoder
    return Dataset(
        path, found.info, found.number, found.rows, ids, weight, found.vocabulary, encoder
    )


def read_shard(dataset: Dataset, row: SnapshotRow, names: Iterable[str] | None = None) -> Arrays:
    """Arrays of a shard; none: all of the layout, checked against its invariants.

    Raises GeoLinkError naming shard and array if one is missing or damaged.
    """
    arrays, _ = read_arrays(dataset.path, row.path, names)
    if names is None:
        _check(arrays, row.path)
    return arrays


def check_relations(arrays: Arrays, path: str) -> None:
    """Raises GeoLinkError naming shard and chip if a relation code of a shard is unknown.

    For those who read some arrays only, without the checks of `read_shard`.
    """
    relation = arrays["relation"]
    if int(relation.max(initial=0)) < len(Relation):
        return
    edge = int(np.argmax(relation >= len(Relation)))
    chip = int(np.searchsorted(arrays["edge_offset"], edge, side="right")) - 1
    raise GeoLinkError(
        f"shard {path} is damaged: in chip {printed_chip(arrays['chip_id'][chip])} an edge has the "
        f"relation code {relation[edge]}, but codes go from 0 to {len(Relation) - 1}; build the "
        "shard again, or read it with the version of geolink that wrote it"
    )


def read_shard_at(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """All arrays of the shard at a path, checked, and its attributes.

    Raises GeoLinkError naming shard and array if one is missing or damaged.
    """
    arrays, attributes = read_arrays(path.parent, path.name)
    _check(arrays, str(path))
    return arrays, attributes


def tag_table(dataset: Dataset) -> NDArray[np.float16]:
    """Text embeddings [V, D] of the vocabulary, rows as in `Dataset.vocabulary`.

    Raises GeoLinkError if the table is missing or damaged.
    """
    name = tag_table_name(dataset.vocabulary_key, dataset.tag_encoder)
    path = f"{dataset.path}/{name}"
    try:
        data = storage(dataset.path).read(name)
        table: NDArray[np.float16] = np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise GeoLinkError(f"tag table {path} is missing or damaged: {error}") from error
    if table.ndim != 2 or len(table) != len(dataset.vocabulary) or table.dtype != np.float16:
        raise GeoLinkError(
            f"tag table {path} is {table.dtype} {list(table.shape)}, not float16 "
            f"[{len(dataset.vocabulary)}, D]"
        )
    return table


def tag_rows(dataset: Dataset, tag: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rows of the vocabulary for a shard's distinct tags [U].

    Raises GeoLinkError if one is not in the vocabulary.
    """
    rows = np.searchsorted(dataset.vocabulary, tag)
    last = max(len(dataset.vocabulary) - 1, 0)
    known = len(dataset.vocabulary) > 0 and bool(
        np.array_equal(dataset.vocabulary[np.minimum(rows, last)], tag)
    )
    if len(tag) and not known:
        raise GeoLinkError(
            f"a shard of {dataset.path} holds a tag that the vocabulary of snapshot "
            f"{dataset.snapshot} lacks; build the dataset again"
        )
    return rows


def band_statistics(
    dataset: Dataset, split: str | None = "train"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation [band] of the valid pixels of a split, in stored units.

    A band that is constant has standard deviation 0.

    Raises GeoLinkError if the split has no valid pixel.
    """
    rows = dataset.split_rows(split)
    count = np.sum([r.pixels for r in rows], axis=0, dtype=np.float64)
    if not np.all(count > 0):
        raise GeoLinkError(f"{dataset.path} has no valid pixel in split {split or 'any'}")
    mean = np.sum([r.pixel_sum for r in rows], axis=0) / count
    square = np.sum([r.pixel_sum_squares for r in rows], axis=0) / count
    return mean, np.sqrt(np.maximum(square - mean**2, 0.0))


def _check(arrays: Arrays, path: str) -> None:
    try:
        validate(arrays)
    except GeoLinkError as error:
        raise GeoLinkError(f"shard {path} is damaged: {error}") from None


def _read_vocabulary(dataset: Location, key: str) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    path = f"{dataset}/{vocabulary_name(key)}"
    try:
        data = storage(dataset).read(vocabulary_name(key))
        table = read_parquet(data, ["id", "key", "objects"])
    except (OSError, pa.ArrowException) as error:
        raise GeoLinkError(f"tag vocabulary {path} is missing or damaged: {error}") from error
    ids = table["id"].to_numpy().astype(np.uint64)
    if np.any(ids[1:] <= ids[:-1]):
        raise GeoLinkError(f"tag vocabulary {path} is damaged: its ids do not rise")
    keys = table["key"].combine_chunks().dictionary_encode()
    codes = keys.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    count = np.bincount(codes, table["objects"].to_numpy()) if len(codes) else np.zeros(0)
    weight = np.log(np.maximum(count, 1.0))[codes] if len(codes) else count
    return ids, weight.astype(np.float32)
