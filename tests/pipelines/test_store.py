"""Shards on disk, read back by zarr-python and xarray, and what happens when writing goes wrong."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr

from pipelines import store
from pipelines.store import find_shard, prepare_dataset, write_info, write_shard
from pipelines.verify import read_stored
from schemas.dataset import read_arrays, read_info
from schemas.errors import GeoLinkError
from schemas.grid import Block
from schemas.layout import ARRAYS
from schemas.sensor import SENTINEL_2_L2A
from schemas.storage import storage
from schemas.storage_local import locked
from tests.shards import make_grid, make_info, random_arrays, store_row

BLOCK = Block(32632, 10, 100)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


@pytest.mark.parametrize(
    "options", [{}, {"objects": 0}, {"sensor": SENTINEL_2_L2A}, {"chips": 16}, {"chips": 37}]
)
def test_zarr_and_xarray_read_a_shard_as_it_was_written(tmp_path: Path, options: dict) -> None:
    arrays = random_arrays(1, grid=make_grid(shard_side=8), **options)
    stored = write_shard(tmp_path, "a", "key", arrays, {"scenes": ["x"]})
    group = zarr.open_group(tmp_path / stored.path, mode="r", use_consolidated=False)
    ours, attributes = read_arrays(tmp_path, stored.path)
    assert set(group.array_keys()) == {*ARRAYS, "x", "y"}
    assert set(ours) == set(ARRAYS)
    for name, spec in ARRAYS.items():
        for read in (group[name][...], ours[name]):
            assert read.dtype == arrays[name].dtype
            np.testing.assert_array_equal(read, arrays[name], strict=True)
        assert group[name].metadata.dimension_names == spec.dims
    opened = xr.open_zarr(tmp_path / stored.path, consolidated=False)
    assert opened["image"].dims == ("chip", "band", "y", "x")
    np.testing.assert_array_equal(opened["label_patch"], arrays["label_patch"])
    assert attributes == {"scenes": ["x"], "Conventions": "CF-1.11"}
    assert opened.attrs["scenes"] == ["x"]
    assert stored.sizes["object"] == len(arrays["object_kind"])
    assert stored.bytes == sum(len(data) for data in files(tmp_path / stored.path).values())


def test_the_same_arrays_give_the_same_bytes(tmp_path: Path) -> None:
    arrays = random_arrays(2)
    reordered = dict(reversed(arrays.items()))
    one = write_shard(tmp_path / "one", "a", "key", arrays, {"x": 1, "y": {"b": 2, "a": 3}})
    two = write_shard(tmp_path / "two", "a", "key", reordered, {"y": {"a": 3, "b": 2}, "x": 1})
    assert one == two
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_finished_shard_is_adopted_untouched(tmp_path: Path) -> None:
    arrays = random_arrays(3)
    first = write_shard(tmp_path, "a", "key", arrays, {"n": 1})
    before = (tmp_path / first.path / "zarr.json").stat()
    assert find_shard(tmp_path, "a", "key") == first
    assert write_shard(tmp_path, "a", "key", arrays, {"n": 1}) == first
    after = (tmp_path / first.path / "zarr.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert find_shard(tmp_path, "a", "another key") is None


def test_a_damaged_shard_counts_as_none_and_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = random_arrays(4)
    stored = write_shard(tmp_path, "a", "key", arrays, {})
    (tmp_path / stored.path / "edge" / "c.0.0").unlink()
    assert find_shard(tmp_path, "a", "key") is None
    assert "'edge'" in caplog.text
    assert write_shard(tmp_path, "a", "key", arrays, {}) == stored
    assert find_shard(tmp_path, "a", "key") == stored
    assert [p.name for p in (tmp_path / "shards" / "a").iterdir()] == ["key.zarr"]


def test_arrays_that_break_the_layout_are_not_written(tmp_path: Path) -> None:
    arrays = random_arrays(5)
    arrays["relation"] = arrays["relation"] + np.uint8(100)
    with pytest.raises(GeoLinkError, match="'relation'"):
        write_shard(tmp_path, "a", "key", arrays, {})
    assert files(tmp_path) == {}


def test_any_changed_byte_of_a_shard_is_noticed(tmp_path: Path) -> None:
    row = store_row(tmp_path, BLOCK, random_arrays(6, chips=2, objects=3))
    assert read_stored(tmp_path, row)[2] == []
    rng = np.random.default_rng(0)
    for name, data in files(tmp_path / row.path).items():
        path = tmp_path / row.path / name
        named = f"'{path.parent.name}'|checksum|zarr.json"
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        for left in (bytes(changed), data[:-1], None):
            path.unlink()
            if left is not None:
                path.write_bytes(left)
            faults = read_stored(tmp_path, row)[2]
            assert re.search(named, " ".join(faults)), (name, faults)
            path.write_bytes(data)
    assert read_stored(tmp_path, row)[2] == []


def test_a_damaged_chunk_is_named_when_it_is_read(tmp_path: Path) -> None:
    row = store_row(tmp_path, BLOCK, random_arrays(7))
    path = tmp_path / row.path / "image" / "c.0.0.0.0"
    path.write_bytes(path.read_bytes()[:-5] + b"00000")
    with pytest.raises(GeoLinkError, match=r"'image' is missing or damaged .*c\.0\.0\.0\.0"):
        read_arrays(tmp_path, row.path, ["valid", "image"])
    assert set(read_arrays(tmp_path, row.path, ["valid"])[0]) == {"valid"}


def test_leftovers_of_killed_writers_are_removed_but_not_those_of_living_ones(
    tmp_path: Path,
) -> None:
    for shard in ("dead", "living"):
        (tmp_path / "shards" / shard / "key.partial" / "image").mkdir(parents=True)
    with locked(tmp_path / "shards" / "living"):
        assert storage(tmp_path).sweep("shards") == ["shards/dead/key.partial"]
    (tmp_path / "shards" / "dead" / "old.partial").mkdir()
    write_shard(tmp_path, "dead", "key", random_arrays(8), {})
    assert [p.name for p in (tmp_path / "shards" / "dead").iterdir()] == ["key.zarr"]


WRITER = """
import sys
from pathlib import Path
from pipelines.store import write_shard
from tests.shards import random_arrays
arrays = random_arrays(9, chips=16, objects=30)
print("ready", flush=True)
for n in range(10_000):
    write_shard(Path(sys.argv[1]), f"{n % 7}", f"key{n}", arrays, {})
"""


def test_a_killed_writer_leaves_only_whole_shards(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], cwd=root, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("shards/*/*.zarr"))) < 3:
        assert writer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    shards = list(tmp_path.glob("shards/*/*.zarr"))
    assert {(s, find_shard(tmp_path, s.parent.name, s.stem) is None) for s in shards} == {
        (s, False) for s in shards
    }
    storage(tmp_path).sweep("shards")
    assert {p.suffix for p in tmp_path.glob("shards/*/*")} == {".zarr"}


def test_two_writers_of_one_shard_agree(tmp_path: Path) -> None:
    arrays = random_arrays(10)
    results: list[store.StoredShard] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(write_shard(tmp_path, "a", "key", arrays, {"n": 1}))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(set(map(repr, results))) == 1
    assert [p.name for p in (tmp_path / "shards" / "a").iterdir()] == ["key.zarr"]


def test_a_write_that_fails_says_where_and_leaves_nothing(tmp_path: Path) -> None:
    arrays = random_arrays(11)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(GeoLinkError, match=r"cannot write .*key.*File too large"):
            write_shard(tmp_path, "a", "key", arrays, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == {}
    assert list((tmp_path / "shards" / "a").iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_comes_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(GeoLinkError, match=f"key.zarr: {os.strerror(code)}; .*folder"):
        write_shard(tmp_path, "a", "key", random_arrays(12), {})
    assert list((tmp_path / "shards" / "a").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GeoLinkError, match=r"cannot write .*file"):
        store.prepare_dataset(tmp_path / "file" / "dataset", make_info())


def test_a_dataset_folder_keeps_its_description(tmp_path: Path) -> None:
    prepare_dataset(tmp_path, make_info())
    before = files(tmp_path)
    prepare_dataset(tmp_path, make_info())
    assert files(tmp_path) == before
    with pytest.raises(GeoLinkError, match=r"grid\.size \(32 instead of 64\).*another folder"):
        prepare_dataset(tmp_path, make_info(make_grid(size=64)))
    with pytest.raises(GeoLinkError, match="drop_keys"):
        prepare_dataset(tmp_path, make_info(drop_keys=("ref",)))
    prepare_dataset(tmp_path, make_info(drop_keys=("ref",)), change=True)
    # It changes when a snapshot of the new contract is published, not before.
    assert files(tmp_path) == before
    write_info(tmp_path, make_info(drop_keys=("ref",)))
    assert read_info(tmp_path).drop_keys == ("ref",)
