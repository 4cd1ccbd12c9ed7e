"""A shard's files, byte by byte as zarr-python writes them."""

import json
import threading
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from pipelines.encode import encode_shard
from schemas import cf
from schemas.layout import LAYOUT
from schemas.sensor import SENTINEL_2_L2A
from tests.shards import make_grid, make_info, random_arrays


def _by_zarr(arrays: dict[str, Any], attributes: dict[str, Any], info: Any) -> dict[str, bytes]:
    store: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(store), attributes=attributes, zarr_format=3)
    described = cf.array_attributes(arrays, info)

    def add(name: str, array: Any, chunks: list[int], codecs: Any, fill: Any, **more: Any) -> None:
        group.create_array(
            name, shape=array.shape, dtype=str if array.dtype == object else array.dtype,
            chunks=tuple(max(1, n) for n in chunks), filters=None, compressors=codecs,
            fill_value=fill, chunk_key_encoding={"name": "default", "separator": "."},
            config={"write_empty_chunks": True}, **more,
        )[...] = array  # fmt: skip

    def blosc(dtype: np.dtype[Any], cname: Any, clevel: int, shuffle: Any) -> BloscCodec:
        return BloscCodec(typesize=dtype.itemsize, cname=cname, clevel=clevel, shuffle=shuffle)

    def small(dtype: np.dtype[Any]) -> tuple[Any, ...]:
        shuffle = "shuffle" if dtype.itemsize > 1 else "noshuffle"
        return (blosc(dtype, "zstd", 1, shuffle), Crc32cCodec())

    for spec in LAYOUT:
        array = arrays[spec.name]
        chunks = list(array.shape)
        if spec.chunk_chips is not None:
            chunks[0] = min(chunks[0], spec.chunk_chips)
        codecs = small(array.dtype)
        if spec.dtype == "image":
            wide = array.dtype.itemsize > 1
            codecs = (blosc(array.dtype, "lz4", 5, "bitshuffle"),) if wide else ()
            codecs = (*codecs, Crc32cCodec())
        add(spec.name, array, chunks, codecs, spec.fill,
            dimension_names=spec.dims, attributes=described[spec.name])  # fmt: skip
    for name, (dims, values, about) in cf.coordinates(arrays, info).items():
        text = values.dtype.kind == "U"
        codecs = (Crc32cCodec(),) if text else small(values.dtype)
        add(name, values.astype(object) if text else values, list(values.shape), codecs,
            "" if text else 0, dimension_names=dims, attributes=about)  # fmt: skip
    return {name: buffer.to_bytes() for name, buffer in store.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objects": 0},
        {"sensor": SENTINEL_2_L2A},
        {"chips": 37, "grid": make_grid(shard_side=8)},
        {"chips": 64, "grid": make_grid(shard_side=8, size=64), "objects": 100},
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_the_bytes_are_those_of_zarr(options: dict[str, Any], named: bool) -> None:
    arrays = random_arrays(1, **options)
    info = make_info() if named else None
    expected = _by_zarr(arrays, {"n": 1, "name": "Köln"}, info)
    found = encode_shard(arrays, {"n": 1, "name": "Köln"}, info)
    assert found.keys() == expected.keys()
    group = json.loads(found.pop("zarr.json"))
    del expected["zarr.json"]
    assert found == expected
    # The group holds every array's metadata again.
    assert group["attributes"] == {"n": 1, "name": "Köln"}
    assert group["consolidated_metadata"]["metadata"] == {
        name.removesuffix("/zarr.json"): json.loads(data)
        for name, data in expected.items()
        if name.endswith("/zarr.json")
    }


def test_the_bytes_are_the_same_in_any_thread() -> None:
    arrays = random_arrays(2, chips=64, grid=make_grid(shard_side=8, size=128), objects=50)
    found = [encode_shard(arrays, {}, None)]
    threads = [
        threading.Thread(target=lambda: found.append(encode_shard(arrays, {}, None)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5
    assert all(files == found[0] for files in found)
