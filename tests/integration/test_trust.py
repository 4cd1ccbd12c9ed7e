"""A dataset that was built and refreshed, in a folder and in an object store: what can be known of
it, what of it may be removed, and what is noticed when it is damaged.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from geolink.cli import main
from geolink.reader import open_dataset, read_shard
from pipelines import build as build_module
from pipelines.build import build_dataset
from pipelines.diff import diff
from pipelines.gc import collect_garbage
from pipelines.history import history
from pipelines.verify import verify_dataset
from pipelines.world import World
from schemas import pins as pins_module
from schemas import storage_objects
from schemas.config import DatasetConfig
from schemas.dataset import read_arrays, read_snapshot, snapshot_name, snapshot_numbers
from schemas.errors import GeoLinkError
from schemas.load import load_config
from schemas.pins import read_pins, remove_pin, write_pin
from schemas.storage import Location, storage
from tests.integration.test_refresh import edited
from tests.servers.s3 import environment, s3

NONE = timedelta(0)


def _config(town: World, cache: Path, dataset: str, pbf: Path) -> dict[str, Any]:
    return {
        "name": "trusted", "dataset": dataset,
        "region": {"bbox": list(town.bounds_lonlat)},
        "grid": {"gsd_m": 10, "size": 32, "patch": 8, "shard_side": 3},
        "sensor": {"preset": "sentinel-2-l2a", "bands": ["blue", "green", "red"]},
        "scenes": {"stac": str(town.s2_catalog)},
        "osm": {"pbf": str(pbf)},
        "splits": {"block_km": 0.96, "train": 0.6, "val": 0.2, "test": 0.2},
        "cache": str(cache),
    }  # fmt: skip


@pytest.fixture(scope="module")
def edits() -> Counter[str]:
    """OSM ids that the newer extract lacks or tags otherwise."""
    return Counter()


@pytest.fixture(scope="module")
def built(
    town: World, cache: Path, tmp_path_factory: pytest.TempPathFactory, edits: Counter[str]
) -> tuple[Path, Path]:
    """A dataset of two snapshots, the second of a newer extract, and its config."""
    folder = tmp_path_factory.mktemp("trusted")
    seen: list[int] = []

    def change(entity: Any) -> Any:
        if not (entity.is_way() and "building" in entity.tags):
            return entity
        seen.append(entity.id)
        if len(seen) == 5:
            edits["gone"] = entity.id
            return None
        if len(seen) == 9:
            edits["tagged"] = entity.id
            return entity.replace(tags={"building": "church"})
        return entity

    newer = edited(town.pbf, folder / "newer.osm.pbf", change)
    path = folder / "trusted.yaml"
    for pbf in (town.pbf, newer):
        path.write_text(yaml.safe_dump(_config(town, cache, "dataset", pbf)))
        build_dataset(load_config(path, DatasetConfig))
    return folder / "dataset", path


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3() as address:
        yield address


@pytest.fixture(params=["folder", "bucket"])
def place(
    request: pytest.FixtureRequest,
    built: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Location:
    """A copy of the dataset to be changed at will."""
    if request.param == "folder":
        return Path(shutil.copytree(built[0], tmp_path / "copy"))
    for name, value in environment(request.getfixturevalue("endpoint")).items():
        monkeypatch.setenv(name, value)
    storage_objects._bucket.cache_clear()
    address = f"s3://data/{tmp_path.name}"
    source, target = storage(built[0]), storage(address)
    for entry in source.entries():
        target.write(entry.name, source.read(entry.name))
    return address


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


def files(dataset: Location) -> dict[str, bytes]:
    return {e.name: storage(dataset).read(e.name) for e in storage(dataset).entries()}


def settle(place: Location) -> None:
    """Wait until what was just written is older than nothing: stores tell time by the second."""
    time.sleep(0.05 if isinstance(place, Path) else 1.1)


# ---- verify


def test_what_was_built_is_verified(place: Location, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "verify", place, "--json")
    found = json.loads(out)
    assert (status, found["damages"], found["unknown"]) == (0, [], [])
    rows = read_snapshot(place).rows
    assert (found["shards"], found["chips"]) == (len(rows), sum(r.chips for r in rows))
    assert verify_dataset(place, 1).damages == []
    for number in (1, 2):
        assert verify_dataset(place, number).unreferenced == 0


def test_shards_built_anew_from_their_sources_are_the_same_to_the_byte(
    built: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "verify", built[0], "--deep", 2, "--config", built[1], "--json")
    found = json.loads(out)
    assert (status, len(found["recomputed"]), found["changed"]) == (0, 2, {})
    # The sources of the first snapshot are others by now.
    config = load_config(built[1], DatasetConfig)
    older = verify_dataset(built[0], 1, config=config, deep=99)
    assert older.damages == []
    assert set(older.changed) == set(diff((built[0], 1), (built[0], 2)).shards_rebuilt)
    assert run(capsys, "verify", built[0], "--deep")[0] == 2


def test_a_shard_that_its_sources_do_not_give_is_found(
    built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(built[1], DatasetConfig)
    real = build_module.build_labels

    def other(*arguments: Any) -> Any:
        arrays = real(*arguments)
        return {**arrays, "lee": arrays["lee"] + np.float32(1e-6)}

    monkeypatch.setattr(build_module, "build_labels", other)
    result = verify_dataset(built[0], config=config, deep=1)
    assert [d.what for d in result.damages] == [
        "has other bytes than when it is built from the same sources"
    ]


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_every_planted_damage_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [r for r in read_snapshot(place).rows if r.objects]
    damaged, missing, odd = (place / r.path for r in rows[:3])
    chunk = damaged / "label_pixel" / "c.0.0.0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    shutil.rmtree(missing)
    (odd / "note.txt").write_text("mine")
    (place / "tags" / "notes.md").write_text("mine")
    table = next((place / "tags").glob(f"{read_snapshot(place).vocabulary}-*.npy"))
    table.write_bytes(table.read_bytes()[:-7])
    (place / snapshot_name(1)).write_bytes(b"PAR1")
    write_pin(place, "mine", 2)
    pin = place / "pins" / "mine.json"
    pin.write_text(pin.read_text().replace('"snapshot": 2', '"snapshot": 7'))
    certificate = place / "snapshots" / "00000002-splits.json"
    certificate.write_text('{"snapshot_checksum": "0", "checks": {}}')
    status, out, _ = run(capsys, "verify", place)
    assert status == 1
    for words in (
        f"{rows[0].path}: array 'label_pixel' is missing or damaged",
        f"{rows[1].path}: is missing; build again",
        f"{rows[2].path}: reads well but is not the one that was published",
        f"tags/{table.name}: is missing or damaged",
        f"{snapshot_name(1)}: snapshot {place / snapshot_name(1)} is damaged",
        "pins/mine.json: pins snapshot 7, which is not there",
        "00000002-splits.json: was made of another snapshot",
        "unknown file tags/notes.md",
    ):
        assert words in out


# ---- history and diff


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_history_tells_what_each_snapshot_changed(
    place: Location, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pin(place, "paper", 1)
    first, second = history(place)
    assert (first.snapshot, first.built, first.rebuilt, first.removed) == (1, first.shards, 0, 0)
    assert second.built == second.removed == 0
    assert 1 <= second.rebuilt <= 8
    assert second.rebuilt == len(diff((place, 1), (place, 2)).shards_rebuilt)
    assert [p.partition(" ")[0] for p in first.pinned] == ["paper"]
    status, out, _ = run(capsys, "history", place)
    assert status == 0
    assert "pinned by paper" in out
    assert len(out.splitlines()) == 3


def test_diff_finds_the_objects_that_were_edited_and_no_other(
    place: Location, edits: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    gone, tagged = (edits[name] << 2 | 2 for name in ("gone", "tagged"))
    before = read_snapshot(place, 1)
    chips = Counter[int]()
    for row in before.rows:
        arrays, _ = read_arrays(place, row.path, ["object_osm", "object_offset"])
        chip = np.repeat(np.arange(row.chips), np.diff(arrays["object_offset"]))
        pairs = {*zip(chip.tolist(), arrays["object_osm"].tolist(), strict=True)}
        chips.update(osm for _, osm in pairs)
    result = diff((place, 1), (place, 2))
    assert result.objects.removed.total() == chips[gone] > 0
    assert result.objects.added.total() == 0
    assert result.objects.changed.total() == chips[tagged] > 0
    assert result.objects.changed_in["tags"] == chips[tagged]
    assert result.objects.changed_in["position"] == result.objects.changed_in["size"] == 0
    assert not result.same
    assert result.contract == {}
    assert all(r == ["OSM objects in or near it changed"] for r in result.shards_rebuilt.values())
    assert result.chips_changed["image"] == 0
    back = diff((place, 2), (place, 1))
    assert back.objects.added == result.objects.removed
    assert diff((place, 2), (place, None)).same
    status, out, _ = run(capsys, "diff", place, 1, 2)
    assert status == 0
    assert "OSM objects in or near it changed" in out
    assert json.loads(run(capsys, "diff", place, 1, "--json")[1])["after"] == [str(place), 2]


# ---- gc and pins


def test_gc_removes_what_no_kept_snapshot_names(place: Location) -> None:
    old, new = read_snapshot(place, 1), read_snapshot(place, 2)
    only_old = {r.path for r in old.rows} - {r.path for r in new.rows}
    before = files(place)
    assert collect_garbage(place, keep=1).shards == []  # all is younger than a day
    planned = collect_garbage(place, keep=1, grace=NONE, dry_run=True)
    assert files(place) == before
    done = collect_garbage(place, keep=1, grace=NONE)
    assert set(done.shards) == set(planned.shards) == only_old
    assert done.removed_snapshots == [1]
    assert {name for name in before if old.vocabulary in name} <= set(done.files)
    left = files(place)
    assert left == {k: v for k, v in before.items() if k in left}
    assert not [n for n in left if n.startswith(tuple(only_old))]
    assert verify_dataset(place).damages == []
    assert collect_garbage(place, keep=1, grace=NONE).shards == []
    assert [step.snapshot for step in history(place)] == [2]


def test_a_pinned_snapshot_and_its_reader_notice_nothing_of_gc(
    place: Location, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "pin", place, "thesis", "--snapshot", 1)[0] == 0
    settle(place)
    reader = open_dataset(place, 1)
    assert run(capsys, "gc", place, "--keep", 1, "--grace-hours", 0)[0] == 0
    assert snapshot_numbers(place) == [1, 2]
    for row in reader.rows:
        read_shard(reader, row)
    assert run(capsys, "pin", place, "thesis", "--remove")[0] == 0
    status, out, _ = run(capsys, "gc", place, "--keep", 1, "--grace-hours", 0, "--json")
    assert (status, json.loads(out)["removed_snapshots"]) == (0, [1])
    for words, message in (
        ((place, "thesis", "--remove"), "no pin 'thesis'"),
        ((place, "late", "--snapshot", 1), "no snapshot 1 to pin; it has 2"),
        ((place, "../x"), "cannot name a pin"),
    ):
        status, _, err = run(capsys, "pin", *words)
        assert (status, message in err) == (2, True)
    assert read_pins(place) == {}


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_the_pin_of_a_dead_program_keeps_nothing_for_ever(place: Location) -> None:
    write_pin(place, "run", 1, lasts=timedelta(hours=1))
    assert collect_garbage(place, keep=1, grace=NONE).kept_snapshots == [1, 2]
    write_pin(place, "run", 1, lasts=timedelta(seconds=-5))
    settle(place)
    done = collect_garbage(place, keep=1, grace=NONE)
    assert done.kept_snapshots == [2]
    assert "pins/run.json" in done.files


def test_a_pin_that_comes_while_its_snapshot_is_removed_brings_it_back(
    place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    files_of = type(storage(place))
    delete = files_of.delete
    once = [True]

    def late(self: Any, names: Any) -> None:
        names = list(names)
        if snapshot_name(1) in names and once:
            once.clear()
            write_pin(place, "late", 1)
        delete(self, names)

    monkeypatch.setattr(files_of, "delete", late)
    before = {r.path for r in read_snapshot(place, 1).rows}
    done = collect_garbage(place, keep=1, grace=NONE)
    assert (done.kept_snapshots, done.shards) == ([1, 2], [])
    assert verify_dataset(place, 1).damages == []
    assert {r.path for r in read_snapshot(place, 1).rows} == before


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_a_clock_that_was_set_back_removes_nothing(place: Path) -> None:
    later = (datetime.now(UTC) + timedelta(days=3)).timestamp()
    for path in place.rglob("*"):
        os.utime(path, (later, later))
    done = collect_garbage(place, keep=1, grace=NONE)
    assert (done.shards, done.files, done.removed_snapshots) == ([], [], [])


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_only_what_is_older_than_the_grace_is_removed(place: Path) -> None:
    only_old = sorted(
        {r.path for r in read_snapshot(place, 1).rows}
        - {r.path for r in read_snapshot(place, 2).rows}
    )
    long_ago = (datetime.now(UTC) - timedelta(hours=30)).timestamp()
    for path in place.rglob("*"):
        if path.is_file():
            os.utime(path, (long_ago, long_ago))
    os.utime(place / only_old[0] / "image" / "zarr.json")
    # Snapshot 1 was the latest until 12 hours ago: a build that began on it may be running.
    recent = long_ago + 18 * 3600
    os.utime(place / snapshot_name(2), (recent, recent))
    assert collect_garbage(place, keep=1).removed_snapshots == []
    os.utime(place / snapshot_name(2), (long_ago, long_ago))
    done = collect_garbage(place, keep=1)
    assert (done.removed_snapshots, done.shards) == ([1], only_old[1:])
    assert done.young >= 1


def test_leftovers_of_killed_builds_go_and_foreign_files_stay(place: Location) -> None:
    there = storage(place)
    row = read_snapshot(place).rows[0]
    unfinished = f"shards/{row.shard}/{'0' * 32}.zarr"
    there.write(f"{unfinished}/image/c.0.0.0.0", b"half a shard")
    there.write("notes.txt", b"mine")
    if isinstance(place, Path):
        (place / "shards" / row.shard / "x.zarr.partial").mkdir()
        (place / "tags" / "y.parquet.partial").write_bytes(b"")
    settle(place)
    done = collect_garbage(place, grace=NONE)
    assert done.shards == [unfinished]
    if isinstance(place, Path):
        assert {f"shards/{row.shard}/x.zarr.partial", "tags/y.parquet.partial"} <= set(done.files)
        assert not list(place.rglob("*.partial"))
    assert there.exists("notes.txt")
    assert verify_dataset(place).unknown == ["notes.txt"]


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_a_build_that_runs_beside_gc_loses_nothing(
    place: Path, built: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every old shard is adopted by a build, while gc removes whatever no snapshot names."""
    (place / snapshot_name(2)).unlink()
    (place / snapshot_name(1)).unlink()
    long_ago = (datetime.now(UTC) - timedelta(days=9)).timestamp()
    for path in place.rglob("*"):
        if path.is_file():
            os.utime(path, (long_ago, long_ago))
    config = load_config(built[1], DatasetConfig).model_copy(update={"dataset": place})
    real, removed = build_module.build_shard, Counter[str]()
    stop, seen = threading.Event(), []

    def collect() -> None:
        while not stop.is_set():
            # No snapshot names any shard, and each is days old until the build makes it young.
            seen.append(collect_garbage(place, grace=timedelta(hours=1)))

    def built_beside(task: Any) -> Any:
        row = real(task)
        if sum(removed.values()) < 3 and removed[task.shard] < 1:
            removed[task.shard] += 1
            shutil.rmtree(place / row.path)
        return row

    monkeypatch.setattr(build_module, "build_shard", built_beside)
    thread = threading.Thread(target=collect)
    thread.start()
    result = build_dataset(config)
    stop.set()
    thread.join()
    assert removed.total() == 3
    assert seen
    assert result.snapshot == 1
    assert verify_dataset(place).damages == []
    scratch = {r.shard: r.checksum for r in read_snapshot(built[0]).rows}
    assert {r.shard: r.checksum for r in result.rows} == scratch


def test_what_is_published_while_gc_removes_it_is_put_back(
    place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gc has listed old shards, and a build that adopted them publishes before they are gone."""
    third = storage(place).read(snapshot_name(1))
    paths = {r.path for r in read_snapshot(place, 1).rows}
    storage(place).delete([snapshot_name(1)])
    files_of = type(storage(place))
    delete = files_of.delete
    once = [True]

    def late(self: Any, names: Any) -> None:
        names = list(names)
        if once and any(n.endswith(".zarr/zarr.json") for n in names):
            once.clear()
            storage(place).create(snapshot_name(3), third)
        delete(self, names)

    monkeypatch.setattr(files_of, "delete", late)
    done = collect_garbage(place, grace=NONE)
    assert done.shards == []
    assert set(done.spared) >= paths - {r.path for r in read_snapshot(place, 2).rows}
    assert {r.path for r in read_snapshot(place, 3).rows} == paths
    assert verify_dataset(place, 3).damages == []


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_gc_refuses_to_guess(place: Location) -> None:
    before = files(place)
    for options in ({"keep": 0}, {"grace": timedelta(hours=-1)}):
        with pytest.raises(GeoLinkError, match="keep at least one"):
            collect_garbage(place, **options)  # type: ignore[arg-type]
    storage(place).write("pins/odd.json", b"{")
    with pytest.raises(GeoLinkError, match=r"pins/odd\.json cannot be read"):
        collect_garbage(place, keep=1, grace=NONE)
    storage(place).delete(["pins/odd.json"])
    storage(place).write(snapshot_name(2), b"PAR1")
    with pytest.raises(GeoLinkError, match=r"00000002\.parquet is damaged"):
        collect_garbage(place, keep=1, grace=NONE)
    assert {k: v for k, v in files(place).items() if k != snapshot_name(2)} == {
        k: v for k, v in before.items() if k != snapshot_name(2)
    }


# ---- splits


def test_the_splits_of_a_town_without_a_buffer_leak(
    place: Location, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "splits", "check", place)
    assert status == 1
    assert "object: OSM way" in out
    assert not storage(place).exists("snapshots/00000002-splits.json")
    status, out, _ = run(capsys, "splits", "check", place, "--against", place, "--json")
    found = json.loads(out)
    assert (status, found["passed"]) == (1, False)
    assert found["found"]["pixels"] == sum(r.chips for r in read_snapshot(place).rows)


@pytest.mark.parametrize("place", ["folder"], indirect=True)
def test_pins_are_renewed_and_moved_under_their_name(
    place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_pin(place, "run", 1, lasts=timedelta(days=1))
    assert first.expires is not None
    assert write_pin(place, "run", 2).expires is None
    assert read_pins(place)["run"].snapshot == 2
    assert remove_pin(place, "run")
    assert not remove_pin(place, "run")
    monkeypatch.setattr(pins_module, "_user", lambda: "somebody")
    assert write_pin(place, "other", 1).by.startswith("somebody@")
