"""Shards in a dataset: written whole or not at all, and the same bytes for the same arrays.

A shard is encoded in memory and written so that its group's `zarr.json` is there only when all the
rest is. Its chunks carry checksums, so that damage is noticed when they are read, and a checksum of
all its files goes into the snapshot.

Encoding in memory (`pipelines.encode`) leaves plain file writes, whose errors say what is wrong.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import xxhash
from numpy.typing import NDArray

from pipelines.encode import encode_shard
from schemas import cf
from schemas.dataset import DatasetInfo, SnapshotRow, read_arrays, read_info
from schemas.errors import GeoLinkError, NetworkFault
from schemas.layout import validate
from schemas.storage import Location, join, storage, writing

_log = logging.getLogger(__name__)
_THREADS = 16


class StoredShard(NamedTuple):
    """A shard that lies complete in its dataset."""

    path: str
    """Relative to the dataset, with forward slashes."""
    checksum: str
    bytes: int
    """Size of all files."""
    attributes: dict[str, Any]
    sizes: dict[str, int]
    """Sizes of the layout's dimensions."""


def prepare_dataset(dataset: Location, info: DatasetInfo, *, change: bool = False) -> None:
    """Make the dataset with its `dataset.json`, and remove what killed builds left.

    change: whether a dataset that is there may get another contract.

    Raises GeoLinkError: the place cannot be written, or holds a dataset that differs.
    """
    files = storage(dataset)
    text = json.dumps(info.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    with writing(str(dataset)):
        if files.create("dataset.json", text.encode()):
            files.sweep("shards")
            return
    old, new = read_info(dataset).model_dump(mode="json"), info.model_dump(mode="json")
    # What newer scenes are licensed under is known by each snapshot; no shard depends on it.
    differs = [f for f in new if f != "licences" and old[f] != new[f]]
    if differs and not change:
        raise GeoLinkError(
            f"{dataset} holds a dataset with another {_difference(differs[0], old, new)}; set the "
            "config back, choose another folder, or rebuild all of it with `geolink refresh`"
        )
    files.sweep("shards")


def write_info(dataset: Location, info: DatasetInfo) -> None:
    """Write `dataset.json` of the snapshot that was just published, if it says something new."""
    if read_info(dataset) != info:
        text = json.dumps(info.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
        with writing(str(dataset)):
            storage(dataset).write("dataset.json", text.encode())


def find_shard(dataset: Location, shard: str, key: str) -> StoredShard | None:
    """The finished shard of a content key, read and validated; None if there is none.

    A damaged one counts as none: it is reported to the log and replaced when written again.
    """
    path = shard_path(shard, key)
    if not storage(dataset).exists(f"{path}/zarr.json"):
        return None
    try:
        arrays, attributes = read_arrays(dataset, path)
        sizes = validate(arrays)
    except NetworkFault:
        raise
    except GeoLinkError as error:
        _log.warning("%s; it is built anew", error)
        return None
    return _stored(path, read_files(dataset, path), attributes, sizes)


def adopt_shard(dataset: Location, shard: str, key: str) -> StoredShard | None:
    """`find_shard` of one that no snapshot may name: made young, so that `geolink gc` leaves it.

    Raises GeoLinkError if the dataset cannot be written.
    """
    marker = f"{shard_path(shard, key)}/zarr.json"
    with writing(join(dataset, marker)):
        try:
            storage(dataset).touch(marker)
        except FileNotFoundError:
            return None
    return find_shard(dataset, shard, key)


def lost_shards(dataset: Location, rows: Iterable[SnapshotRow]) -> set[str]:
    """Shards of some rows that are gone, as when `geolink gc` removed them during a build."""
    files = storage(dataset)
    rows = list(rows)
    with ThreadPoolExecutor(_THREADS) as pool:
        there = list(pool.map(lambda row: files.exists(f"{row.path}/zarr.json"), rows))
    return {row.shard for row, exists in zip(rows, there, strict=True) if not exists}


def write_shard(
    dataset: Location,
    shard: str,
    key: str,
    arrays: Mapping[str, NDArray[Any]],
    attributes: Mapping[str, Any],
    info: DatasetInfo | None = None,
) -> StoredShard:
    """Write a shard, or adopt the finished one of the same content key.

    arrays: all of `schemas.layout.LAYOUT`. attributes: anything that JSON can hold. info: names
    bands, units and classes for readers of CF conventions.

    Raises GeoLinkError: arrays that break the layout, or a place that cannot be written; nothing
    is left behind then.
    """
    sizes = validate(arrays)
    described = {**attributes, "Conventions": cf.CONVENTIONS}
    kept = json.loads(json.dumps(described, sort_keys=True))
    files = encode_shard(arrays, kept, info)
    path = shard_path(shard, key)
    found = find_shard(dataset, shard, key)
    if found is not None:
        return found
    with writing(join(dataset, path)):
        storage(dataset).write_group(path, files, last="zarr.json")
    return _stored(path, files, kept, sizes)


def shard_attributes(dataset: Location, path: str) -> dict[str, Any]:
    """Attributes of a stored shard.

    Raises GeoLinkError if it is missing or damaged.
    """
    try:
        attributes = json.loads(storage(dataset).read(f"{path}/zarr.json"))["attributes"]
    except (OSError, ValueError, KeyError) as error:
        raise GeoLinkError(f"shard {dataset}/{path} is missing or damaged: {error}") from error
    if not isinstance(attributes, dict) or "made_from" not in attributes:
        raise GeoLinkError(f"shard {dataset}/{path} does not say what it was made from")
    return attributes


def shard_path(shard: str, key: str) -> str:
    """Where the shard of a content key lies in a dataset."""
    return f"shards/{shard}/{key}.zarr"


def checksum(files: Mapping[str, bytes]) -> str:
    """xxh3-128 over the sorted names, lengths and bytes of a shard's files."""
    digest = xxhash.xxh3_128()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return digest.hexdigest()


def read_files(dataset: Location, path: str) -> dict[str, bytes]:
    """Every file of a shard by relative name; empty where there is none. Raises OSError."""
    files = storage(dataset)
    names = [e.name for e in files.entries(path)]
    return {name.removeprefix(f"{path}/"): files.read(name) for name in names}


def _stored(
    path: str, files: Mapping[str, bytes], attributes: dict[str, Any], sizes: dict[str, int]
) -> StoredShard:
    return StoredShard(
        path, checksum(files), sum(len(data) for data in files.values()), attributes, sizes
    )


def _difference(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The innermost field that differs, with both values."""
    a, b = old[name], new[name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        inner = next(key for key in a if a[key] != b[key])
        return f"{name}.{_difference(inner, a, b)}"
    return f"{name} ({_short(a)} instead of {_short(b)})"


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
