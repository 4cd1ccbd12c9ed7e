"""Reading one array of a shard: that part of Zarr v3 which shards are written in.

Any Zarr library reads a shard. One made for all of Zarr spends about a millisecond of interpreter
time on each array, and a shard has some twenty that training wants, most of them small: read this
way they take a fifth of the time, and the pixels half. The lock of the interpreter is free while
files are read and decompressed, so that threads can read beside a trainer.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from schemas.storage import Files

_CHECKSUM = 4

Rows = tuple[int, int] | None
"""First and last + 1 along an array's first axis; none: all."""
Empty = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]


def chunk_names(name: str, meta: Mapping[str, Any], rows: Rows = None) -> list[str]:
    """Files of the chunks that hold rows of an array, in order; meta: its `zarr.json`."""
    shape, step = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"][0]
    if 0 in shape:
        return []
    low, high = rows or (0, shape[0])
    rest = ["0"] * (len(shape) - 1)
    return [
        f"{name}/{'.'.join(['c', str(n), *rest])}" for n in range(low // step, -(-high // step))
    ]


def read_array(
    files: Files,
    name: str,
    meta: Mapping[str, Any] | None = None,
    rows: Rows = None,
    empty: Empty = np.empty,
) -> NDArray[Any]:
    """Read a Zarr v3 array of a shard: chunks along the first axis, CRC-32C, Blosc or none.

    meta: its `zarr.json`, where it is known already. rows: the part that is read. empty: where the
    memory comes from.

    Raises OSError (no such array or chunk), KeyError or ValueError (damaged, or stored otherwise).
    """
    if meta is None:
        meta = json.loads(files.read(f"{name}/zarr.json"))
    shape, chunk = tuple(meta["shape"]), tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
    encoding = meta["chunk_key_encoding"]
    codecs = [codec["name"] for codec in meta["codecs"]]
    compressed = codecs == ["bytes", "blosc", "crc32c"]
    if (
        not (compressed or codecs == ["bytes", "crc32c"])
        or encoding != {"name": "default", "configuration": {"separator": "."}}
        or any(length > part for length, part in zip(shape[1:], chunk[1:], strict=True))
    ):
        raise ValueError("it is not stored as GeoLink stores arrays")
    low, high = rows or (0, shape[0])
    before = low // chunk[0] * chunk[0]
    length = min(-(-high // chunk[0]) * chunk[0], shape[0]) - before
    array = empty((length, *shape[1:]), np.dtype(meta["data_type"]).newbyteorder("<"))
    for n, key in enumerate(chunk_names(name, meta, (low, high))):
        part = array[n * chunk[0] : (n + 1) * chunk[0]]
        whole = part if part.shape == chunk else np.empty(chunk, array.dtype)
        (_read_compressed if compressed else _read_plain)(
            files, key, whole.reshape(-1).view(np.uint8)
        )
        if whole is not part:
            part[...] = whole[tuple(slice(length) for length in part.shape)]
    return array[low - before : high - before]


def _read_plain(files: Files, key: str, out: NDArray[np.uint8]) -> None:
    count, checksum = files.read_into(key, out)
    if count != len(out) or len(checksum) != _CHECKSUM:
        raise ValueError(f"{key} is not {len(out) + _CHECKSUM} bytes long")
    _check(key, out, checksum)


def _read_compressed(files: Files, key: str, out: NDArray[np.uint8]) -> None:
    data = files.read(key)
    body = data[:-_CHECKSUM]
    _check(key, body, data[-_CHECKSUM:])
    # Bytes 4 to 8 of a Blosc buffer are its length when decompressed.
    if int.from_bytes(body[4:8], "little") != len(out):
        raise ValueError(f"{key} does not hold {len(out)} bytes")
    blosc.decompress(body, out)


def _check(key: str, body: bytes | NDArray[np.uint8], checksum: bytes) -> None:
    if google_crc32c.value(body).to_bytes(_CHECKSUM, "little") != checksum:
        raise ValueError(f"{key} has another checksum than when it was written")
