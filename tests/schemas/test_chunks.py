"""Arrays written by zarr-python, read directly."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec

from schemas.chunks import read_array
from schemas.storage_local import LocalStorage

BLOSC = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=8)
KEYS = {"name": "default", "separator": "."}


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    first=st.integers(1, 10),
    dtype=st.sampled_from(["uint8", "uint16", "int32", "int64", "uint64", "float32", "float64"]),
    compressed=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_an_array_is_read_as_zarr_reads_it(
    shape: list[int], first: int, dtype: str, compressed: bool, seed: int
) -> None:
    values = np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)
    with tempfile.TemporaryDirectory() as scratch:
        array = zarr.create_array(
            Path(scratch) / "a", shape=values.shape, dtype=dtype, filters=None,
            chunks=(first, *(max(1, n) for n in shape[1:])), chunk_key_encoding=KEYS,
            compressors=(BLOSC, Crc32cCodec()) if compressed else (Crc32cCodec(),),
            config={"write_empty_chunks": True},
        )  # fmt: skip
        array[...] = values
        np.testing.assert_array_equal(
            read_array(LocalStorage(Path(scratch)), "a"), array[...], strict=True
        )


@pytest.mark.parametrize(
    "options",
    [
        {"compressors": (GzipCodec(), Crc32cCodec())},
        {"compressors": None},
        {"chunk_key_encoding": {"name": "default", "separator": "/"}},
        {"chunks": (4, 2)},
    ],
)
def test_an_array_stored_in_another_way_is_refused(tmp_path: Path, options: dict) -> None:
    plain = {
        "chunks": (4, 4), "chunk_key_encoding": KEYS, "compressors": (Crc32cCodec(),),
        "filters": None, "shape": (4, 4), "dtype": "int32",
    }  # fmt: skip
    zarr.create_array(tmp_path / "a", **{**plain, **options})[...] = 1
    with pytest.raises(ValueError, match="not stored as"):
        read_array(LocalStorage(tmp_path), "a")
