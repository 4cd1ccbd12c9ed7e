"""Shards of a remote store, kept in a local folder.

The folder of a dataset is named by its address, and holds shards as the store does: `read_arrays`
reads both alike and tests the checksum of every chunk. Shards never change under their name, so
nothing in the cache goes out of date; what is damaged there is fetched again. Any number of
processes may share a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from geolink.reader import Arrays
from schemas.chunks import Empty, Rows, chunk_names
from schemas.dataset import read_arrays
from schemas.errors import GeoLinkError
from schemas.storage import Location, storage
from schemas.storage_local import LocalStorage

_GROUP = "zarr.json"


def cache_folder(cache: Path, dataset: Location) -> Path | None:
    """Where shards of a dataset are kept; None for one that is local already."""
    if isinstance(dataset, Path) or "://" not in dataset:
        return None
    return cache / xxhash.xxh3_64_hexdigest(dataset.rstrip("/").encode())


def read_cached(
    dataset: Location, path: str, names: Iterable[str], folder: Path, chips: Rows, empty: Empty
) -> Arrays:
    """`read_arrays` of a remote shard through the cache.

    Raises GeoLinkError: the shard is missing or damaged in the store, or the folder cannot be
    written; NetworkFault.
    """
    names = list(names)
    try:
        return read_arrays(folder, path, names, chips, empty)[0]
    except GeoLinkError:
        _fetch(dataset, path, names, folder)
    try:
        return read_arrays(folder, path, names, chips, empty)[0]
    except GeoLinkError:
        # Read where it lies, so that a damaged shard is named by its address.
        return read_arrays(dataset, path, names, chips, empty)[0]


def _fetch(dataset: Location, path: str, names: list[str], folder: Path) -> None:
    """Copy the arrays of a shard, all of their chunks, into the cache."""
    store = storage(dataset)
    try:
        group = store.read(f"{path}/{_GROUP}")
        metas: dict[str, Any] = json.loads(group)["consolidated_metadata"]["metadata"]
        keys = [key for name in names for key in chunk_names(f"{path}/{name}", metas[name])]
        files = store.ahead(keys)
        found = {key.removeprefix(f"{path}/"): files.read(key) for key in keys}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise GeoLinkError(
            f"shard {dataset}/{path} is missing or damaged: {type(error).__name__}: {error}"
        ) from error
    LocalStorage(folder).write_group(path, {**found, _GROUP: group}, last=_GROUP)
