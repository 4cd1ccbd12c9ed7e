"""A dataset's bytes are a function of its inputs, not of the path that led there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest

from geolink.reader import open_dataset, read_shard
from pipelines import build as build_module
from pipelines.build import BuildResult, build_dataset
from pipelines.world import World
from schemas.config import DatasetConfig
from schemas.dataset import snapshot_numbers
from schemas.layout import validate
from schemas.load import load_config
from tests.integration.conftest import WriteConfig


def _build(path: Path, **options: Any) -> BuildResult:
    return build_dataset(load_config(path, DatasetConfig), **options)


def _files(dataset: Path) -> dict[str, bytes]:
    """Every file of a dataset but the catalog, which holds times."""
    return {
        str(f.relative_to(dataset)): f.read_bytes()
        for f in sorted(dataset.rglob("*"))
        if f.is_file() and not f.name.startswith("catalog.duckdb") and f.name != ".lock"
    }


def _shards(dataset: Path) -> dict[str, bytes]:
    return {name: data for name, data in _files(dataset).items() if name.startswith("shards/")}


def test_a_built_dataset_can_be_read_whole(satellite_config: WriteConfig) -> None:
    result = _build(satellite_config())
    assert (result.snapshot, result.published, result.failed) == (1, True, {})
    dataset = open_dataset(result.dataset)
    rows = [r for r in dataset.rows if r.chips]
    assert len(rows) >= 4
    for row in rows:
        sizes = validate(read_shard(dataset, row))
        assert (sizes["chip"], sizes["object"], sizes["edge"]) == (
            row.chips,
            row.objects,
            row.edges,
        )
    assert sum(r.objects for r in rows) > 500
    assert {r.split for r in rows} == {"train", "val", "test"}


def test_building_again_changes_nothing(satellite_config: WriteConfig) -> None:
    path = satellite_config()
    first = _build(path)
    before = _files(first.dataset)
    again = _build(path)
    assert (again.built, again.unchanged, again.published) == (0, len(first.rows), False)
    assert _files(first.dataset) == before
    assert snapshot_numbers(first.dataset) == [1]


def test_two_workers_write_the_same_bytes_as_one(satellite_config: WriteConfig) -> None:
    one = _build(satellite_config("one"))
    two = _build(satellite_config("two"), workers=2)
    assert _files(one.dataset) == _files(two.dataset)


def test_a_killed_build_goes_on_to_the_same_bytes(satellite_config: WriteConfig) -> None:
    whole = _build(satellite_config("whole"))
    path = satellite_config("killed")
    dataset = path.with_suffix("")
    for shards in (1, 3):
        process = subprocess.Popen(
            [sys.executable, "-m", "geolink.cli", "build", str(path)], stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(list(dataset.glob("shards/*/*.zarr"))) < shards:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert snapshot_numbers(dataset) == []
    resumed = _build(path)
    assert resumed.published
    assert _files(whole.dataset) == _files(dataset)


def test_an_interrupted_build_says_how_to_go_on(satellite_config: WriteConfig) -> None:
    code, errors = 0, ""
    # On a busy machine a build may end before the signal comes: then another is interrupted.
    for attempt in range(5):
        path = satellite_config(f"interrupted{attempt}")
        dataset = path.with_suffix("")
        process = subprocess.Popen(
            [sys.executable, "-m", "geolink.cli", "build", str(path)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while process.poll() is None and not list(dataset.glob("shards/*/*.zarr")):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        code = process.returncode
        if code:
            break
    assert code == 130
    assert "run the same command again to continue" in errors
    assert "Traceback" not in errors


def test_a_new_extract_rebuilds_only_the_shards_it_changes(
    satellite_config: WriteConfig, town: World, tmp_path: Path
) -> None:
    import osmium

    west, south, east, north = town.bounds_lonlat
    lon, lat = west + 0.31 * (east - west), south + 0.37 * (north - south)
    newer = tmp_path / "newer.osm.pbf"
    writer = osmium.SimpleWriter(str(newer))
    for entity in osmium.FileProcessor(str(town.pbf)):
        if entity.is_way():
            break
        writer.add(entity)
    writer.add_node(
        osmium.osm.mutable.Node(id=10**10, location=(lon, lat), tags={"amenity": "bank"})
    )
    for entity in osmium.FileProcessor(str(town.pbf)):
        if not entity.is_node():
            writer.add(entity)
    writer.close()

    _build(satellite_config("refreshed"))
    refreshed = _build(satellite_config("refreshed", osm={"pbf": str(newer)}))
    assert refreshed.built == 1
    assert refreshed.snapshot == 2
    scratch = _build(satellite_config("scratch", osm={"pbf": str(newer)}))
    current = {f"shards/{r.shard}/{r.key}.zarr" for r in scratch.rows}
    kept = {
        name: data
        for name, data in _shards(refreshed.dataset).items()
        if "/".join(name.split("/")[:3]) in current
    }
    assert kept == _shards(scratch.dataset)


def test_a_reader_keeps_its_snapshot_while_a_refresh_publishes(
    satellite_config: WriteConfig,
) -> None:
    first = _build(satellite_config("pinned"))
    reader = open_dataset(first.dataset)
    image = read_shard(reader, reader.rows[0])["image"].copy()
    _build(satellite_config("pinned", min_valid=0.99))
    assert (read_shard(reader, reader.rows[0])["image"] == image).all()
    assert open_dataset(first.dataset, 1).rows == reader.rows


def test_two_builds_at_once_end_in_one_dataset(satellite_config: WriteConfig) -> None:
    path = satellite_config("twice")
    command = [sys.executable, "-m", "geolink.cli", "build", "--json", str(path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    results = [json.loads(p.communicate()[0]) for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert {r["snapshot"] for r in results} == {1}
    assert _files(path.with_suffix("")) == _files(_build(satellite_config("once")).dataset)


def test_a_shard_that_fails_is_reported_and_the_rest_is_built(
    satellite_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = satellite_config("partial")
    whole = build_module.build_shard
    bad = "00"

    def failing(task: Any) -> Any:
        if task.shard == bad:
            raise RuntimeError("planted")
        return whole(task)

    from pipelines.plan import make_plan

    bad = make_plan(load_config(path, DatasetConfig)).tasks[1].shard
    monkeypatch.setattr(build_module, "build_shard", failing)
    result = _build(path)
    assert result.failed == {bad: "RuntimeError: planted"}
    assert (result.snapshot, result.published) == (None, False)
    monkeypatch.undo()
    again = _build(path)
    assert again.published
    assert _files(again.dataset) == _files(_build(satellite_config("whole")).dataset)


def test_the_catalog_answers_in_sql(satellite_config: WriteConfig) -> None:
    result = _build(satellite_config("catalog"))
    con = duckdb.connect(str(result.dataset / "catalog.duckdb"), read_only=True)

    def ask(sql: str) -> Any:
        return con.execute(sql).fetchone()

    assert ask("SELECT count(*), sum(chips) FROM shards WHERE state = 'built'") == (
        len(result.rows), sum(r.chips for r in result.rows),
    )  # fmt: skip
    assert ask("SELECT count(*) FROM scenes WHERE chosen")[0] >= len(result.rows)
    assert ask("SELECT state FROM builds") == ("published",)
    assert ask("SELECT objects > 100 FROM tag_counts WHERE key = 'building' AND value = 'yes'")[0]
    assert ask("SELECT count(*) FROM extracts")[0] == 1


def test_a_region_can_be_refreshed_alone(satellite_config: WriteConfig, town: World) -> None:
    import shapely

    first = _build(satellite_config("regional"))
    west, south, east, north = town.bounds_lonlat
    corner = shapely.box(west, south, west + 0.2 * (east - west), south + 0.2 * (north - south))
    path = satellite_config("regional", min_valid=0.9)
    second = _build(path, within=corner)
    assert 0 < second.built < len(first.rows)
    assert {r.shard for r in second.rows} == {r.shard for r in first.rows}


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk is made with a small tmpfs: needs root")
def test_a_full_disk_is_said_in_a_sentence(satellite_config: WriteConfig, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        path = satellite_config("full", dataset=str(disk / "dataset"))
        run = subprocess.run(
            [sys.executable, "-m", "geolink.cli", "build", str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode in (1, 2)
        assert "No space left" in run.stderr
        assert "Traceback" not in run.stderr
        leftovers = [f for f in disk.rglob("*") if ".tmp" in f.name]
        assert leftovers == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
