"""Shards in a dataset: written whole or not at all, and the same bytes for the same arrays.

A shard is encoded in memory and written so that its group's `zarr.json` is there only when all the
rest is. Its chunks carry checksums, so that damage is noticed when they are read, and a checksum of
all its files goes into the snapshot.

Encoding in memory with zarr-python alone, rather than by whichever codec pipeline is active, keeps
the bytes the same on every machine and leaves plain file writes, whose errors say what is wrong.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import xxhash
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from schemas import cf
from schemas.dataset import DatasetInfo, SnapshotRow, read_arrays, read_info
from schemas.errors import GeoLinkError
from schemas.layout import LAYOUT, ArraySpec, validate
from schemas.storage import Location, join, storage, writing

_log = logging.getLogger(__name__)


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
    differs = [field for field in new if old[field] != new[field]]
    if differs and not change:
        raise GeoLinkError(
            f"{dataset} holds a dataset with another {_difference(differs[0], old, new)}; set the "
            "config back, choose another folder, or rebuild what it changes with `geolink refresh`"
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
    except GeoLinkError as error:
        _log.warning("%s; it is built anew", error)
        return None
    return _stored(path, _read_files(dataset, path), attributes, sizes)


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
    kept = json.loads(json.dumps(attributes, sort_keys=True))
    files = _encode(arrays, kept, info)
    path = shard_path(shard, key)
    found = find_shard(dataset, shard, key)
    if found is not None:
        return found
    with writing(join(dataset, path)):
        storage(dataset).write_group(path, files, last="zarr.json")
    return _stored(path, files, kept, sizes)


def verify_shard(dataset: Location, row: SnapshotRow) -> None:
    """Compare a published shard's files with the checksum in its snapshot.

    Raises GeoLinkError naming the array that is missing or damaged.
    """
    try:
        files = _read_files(dataset, row.path)
    except OSError as error:
        raise GeoLinkError(f"cannot read {error.filename}: {error.strerror}") from error
    if files and checksum(files) == row.checksum:
        return
    read_arrays(dataset, row.path)
    raise GeoLinkError(
        f"shard {join(dataset, row.path)} reads well but is not the one that was published "
        f"(checksum {checksum(files)} instead of {row.checksum}); remove it and build again"
    )


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


def _encode(
    arrays: Mapping[str, NDArray[Any]], attributes: dict[str, Any], info: DatasetInfo | None
) -> dict[str, bytes]:
    """The files of a shard by relative name."""
    store: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(store), attributes=attributes, zarr_format=3)
    described = cf.array_attributes(arrays, info)
    for spec in LAYOUT:
        array = arrays[spec.name]
        chunks = [max(1, n) for n in array.shape]
        if spec.chunk_chips is not None:
            chunks[0] = min(chunks[0], spec.chunk_chips)
        _add(
            group, spec.name, array, spec.dims, described[spec.name], chunks,
            _codecs(spec, array.dtype), spec.fill,
        )  # fmt: skip
    for name, (dims, values, about) in cf.coordinates(arrays, info).items():
        text = values.dtype.kind == "U"
        array = values.astype(object) if text else values
        codecs = (Crc32cCodec(),) if text else (_small(values.dtype), Crc32cCodec())
        _add(group, name, array, dims, about, list(values.shape), codecs, "" if text else 0)
    files = {name: buffer.to_bytes() for name, buffer in store.items()}
    files["zarr.json"] = _consolidated(files)
    return files


def _add(
    group: zarr.Group,
    name: str,
    array: NDArray[Any],
    dims: tuple[str, ...],
    attributes: dict[str, Any],
    chunks: list[int],
    codecs: tuple[BloscCodec | Crc32cCodec, ...],
    fill: int | float | str,
) -> None:
    group.create_array(
        name,
        shape=array.shape,
        dtype=str if array.dtype == object else array.dtype,
        chunks=tuple(max(1, n) for n in chunks),
        filters=None,
        compressors=codecs,
        fill_value=fill,
        attributes=attributes,
        dimension_names=dims,
        # One folder an array, and every chunk a file: an absent one is damage.
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )[...] = array


def _consolidated(files: Mapping[str, bytes]) -> bytes:
    """The group's metadata with those of its arrays inline: opened in one read, without listing.

    As zarr-python, GDAL and others read it; the core of Zarr v3 does not know it yet.
    """
    group = json.loads(files["zarr.json"])
    names = sorted(name.partition("/")[0] for name in files if name.endswith("/zarr.json"))
    group["consolidated_metadata"] = {
        "kind": "inline",
        "must_understand": False,
        "metadata": {name: json.loads(files[f"{name}/zarr.json"]) for name in names},
    }
    return json.dumps(group, separators=(",", ":"), ensure_ascii=False).encode()


def _codecs(spec: ArraySpec, dtype: np.dtype[Any]) -> tuple[BloscCodec | Crc32cCodec, ...]:
    """How an array's chunks are stored.

    8-bit pixels hardly shrink (by 5-15 %) and are read 3-4 times faster as they are. 16-bit ones
    shrink by a quarter and more at two thirds of the speed. Labels and ragged arrays shrink to
    less than a tenth.
    """
    if spec.dtype == "image" and dtype.itemsize == 1:
        return (Crc32cCodec(),)
    if spec.dtype == "image":
        fast = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=dtype.itemsize)
        return (fast, Crc32cCodec())
    return (_small(dtype), Crc32cCodec())


def _small(dtype: np.dtype[Any]) -> BloscCodec:
    return BloscCodec(
        cname="zstd",
        clevel=1,
        shuffle="shuffle" if dtype.itemsize > 1 else "noshuffle",
        typesize=dtype.itemsize,
    )


def _read_files(dataset: Location, path: str) -> dict[str, bytes]:
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
