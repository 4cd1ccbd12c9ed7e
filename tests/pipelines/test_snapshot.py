"""Publishing snapshots, and reading them back."""

import json
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.snapshot import SnapshotExists, latest, latest_rows, publish
from schemas.dataset import SnapshotRow, read_snapshot, snapshot_name
from schemas.errors import GeoLinkError
from tests.shards import make_info

INFO = make_info()


def row(shard: str, key: str = "k", **changes: object) -> SnapshotRow:
    """A row that describes no real shard."""
    values: dict[str, object] = {
        "shard": shard, "path": f"shards/{shard}/{key}.zarr", "key": key, "checksum": "c",
        "split": "train", "chips": 3, "objects": 5, "edges": 7, "bytes": 1 << 40, "epsg": 32632,
        "bounds_lonlat": [9.0, 45.0, 9.1, 45.1], "scenes": ["a", "b"], "osm_timestamp": "",
        "pixels": [10, 10], "pixel_sum": [0.1, 1e15], "pixel_sum_squares": [0.2, 1e20],
        "qc": {"b": 1, "a": 2}, "chip_findings": [0, 5, 1 << 31],
    }  # fmt: skip
    return SnapshotRow(**{**values, **changes})  # type: ignore[arg-type]


def test_rows_come_back_by_shard_whatever_order_they_were_given_in(tmp_path: Path) -> None:
    rows = [row("b"), row("a", qc={}, scenes=[]), row("c")]
    assert latest(tmp_path) is None
    assert latest_rows(tmp_path) == []
    assert publish(tmp_path, rows, "v", INFO) == (1, True)
    assert latest_rows(tmp_path) == [rows[1], rows[0], rows[2]]
    publish(tmp_path / "other", rows[::-1], "v", INFO)
    one, two = ((d / snapshot_name(1)).read_bytes() for d in (tmp_path, tmp_path / "other"))
    assert one == two
    assert [p.name for p in (tmp_path / "snapshots").iterdir()] == ["00000001.parquet"]


def test_the_same_rows_are_not_published_twice(tmp_path: Path) -> None:
    publish(tmp_path, [row("a")], "v", INFO)
    assert publish(tmp_path, [row("a")], "v", INFO) == (1, False)
    assert publish(tmp_path, [row("a")], "w", INFO) == (2, True)
    assert publish(tmp_path, [row("a", "k2")], "w", INFO) == (3, True)
    assert read_snapshot(tmp_path, 1).rows == [row("a")]
    assert read_snapshot(tmp_path).vocabulary == "w"


def test_of_two_builds_on_one_snapshot_the_second_must_begin_again(tmp_path: Path) -> None:
    publish(tmp_path, [row("a")], "v", INFO, base=0)
    publish(tmp_path, [row("a"), row("b")], "v", INFO, base=1)
    with pytest.raises(SnapshotExists):
        publish(tmp_path, [row("a"), row("c")], "v", INFO, base=1)
    rows = [*latest_rows(tmp_path), row("c")]
    assert publish(tmp_path, rows, "v", INFO, base=2) == (3, True)


def test_of_many_builds_at_once_one_wins(tmp_path: Path) -> None:
    outcomes: list[object] = []

    def build(n: int) -> None:
        try:
            outcomes.append(publish(tmp_path, [row("a", f"k{n}")], "v", INFO, base=0))
        except SnapshotExists as error:
            outcomes.append(error)

    threads = [threading.Thread(target=build, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count((1, True)) == 1
    assert sum(isinstance(o, SnapshotExists) for o in outcomes) == 7
    assert [p.name for p in (tmp_path / "snapshots").iterdir()] == ["00000001.parquet"]


def test_a_shard_cannot_come_twice(tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match="a comes twice"):
        publish(tmp_path, [row("a", "x"), row("b"), row("a", "y")], "v", INFO)


def test_a_snapshot_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match="no snapshot yet"):
        read_snapshot(tmp_path)
    publish(tmp_path, [row("a")], "v", INFO)
    with pytest.raises(GeoLinkError, match="no snapshot 4; it has 1 to 1"):
        read_snapshot(tmp_path, 4)
    path = tmp_path / snapshot_name(1)
    table = pq.read_table(path)
    meta = json.loads(table.schema.metadata[b"geolink"])
    newer = json.dumps({**meta, "schema_version": 99}).encode()
    pq.write_table(table.replace_schema_metadata({b"geolink": newer}), path)
    with pytest.raises(GeoLinkError, match=r"schema 99.*upgrade"):
        read_snapshot(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(GeoLinkError, match=r"00000001\.parquet is damaged"):
        read_snapshot(tmp_path)
