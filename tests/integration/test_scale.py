"""Many shards, few resources: dry runs, partial builds, bad disks, odd clocks, killed builds."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from geolink.reader import open_dataset, read_shard
from pipelines import build as build_module
from pipelines.build import BuildResult, build_dataset
from pipelines.estimate import Prices, estimate_build
from pipelines.gc import collect_garbage
from schemas.config import DatasetConfig
from schemas.dataset import read_snapshot, snapshot_numbers
from schemas.load import load_config
from tests.integration.conftest import WriteConfig
from tests.kills import kill_many

ROOT = Path(__file__).resolve().parents[2]


def _load(path: Path) -> DatasetConfig:
    return load_config(path, DatasetConfig)


def _build(path: Path, **options: Any) -> BuildResult:
    return build_dataset(_load(path), **options)


def _files(dataset: Path) -> dict[str, bytes]:
    """Every file of a dataset but the catalog, which holds times."""
    return {
        str(f.relative_to(dataset)): f.read_bytes()
        for f in sorted(dataset.rglob("*"))
        if f.is_file() and not f.name.startswith("catalog.duckdb")
    }


def _state(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every path below some folders, with size and time of change."""
    found = {}
    for folder in folders:
        for path in (folder, *folder.rglob("*")) if folder.exists() else ():
            stat = path.lstat()
            found[str(path)] = (stat.st_size, stat.st_mtime_ns)
    return found


def _geolink(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "geolink.cli", *arguments], cwd=ROOT, capture_output=True,
        text=True, check=False, **options,
    )  # fmt: skip


# Dry runs


def test_a_dry_run_says_what_a_build_then_does_and_touches_nothing(
    satellite_config: WriteConfig, cache: Path, tmp_path: Path
) -> None:
    path = satellite_config("dry")
    before = _state(tmp_path, cache)
    run = _geolink("build", "--dry-run", "--json", "--workers", "2", str(path))
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert _state(tmp_path, cache) == before
    assert set(told["shards"].values()) == {"new"}
    assert told["rates"].startswith("assumed")
    built = _build(path)
    assert sorted(told["shards"]) == [r.shard for r in built.rows]
    assert told["chips"] >= sum(r.chips for r in built.rows)

    again = estimate_build(_load(path))
    assert (again.shards, again.unchanged) == ({}, len(built.rows))
    assert (again.read_bytes, again.write_bytes, again.worker_hours) == (0, 0, 0.0)


def test_a_dry_run_says_why_each_shard_is_built_and_what_it_costs(
    satellite_config: WriteConfig, cache: Path, tmp_path: Path
) -> None:
    path = satellite_config("why")
    built = _build(path)
    dataset = Path(str(built.dataset))
    shutil.rmtree(dataset / built.rows[0].path)
    before = _state(tmp_path, cache)
    found = estimate_build(_load(path))
    assert found.shards == {
        built.rows[0].shard: "missing: the snapshot names it, its files are gone"
    }
    changed = estimate_build(
        _load(satellite_config("why", min_valid=0.9)), workers=4,
        prices=Prices(gb_month=2.0, requests_1000=0.0, worker_hour=3.0),
    )  # fmt: skip
    assert set(changed.shards.values()) == {
        "min valid changed", "changed; its predecessor cannot be read"
    }  # fmt: skip
    assert changed.rates == f"measured on {len([r for r in built.rows if r.chips])} shards"
    # By the earlier build's rates, all of it again costs what it cost.
    size = sum(r.bytes for r in built.rows)
    assert changed.write_bytes == pytest.approx(size, rel=0.15)
    assert changed.cost_month == pytest.approx(2.0 * changed.write_bytes / 1e9)
    assert changed.cost_once == pytest.approx(3.0 * changed.worker_hours)
    assert changed.hours == pytest.approx(changed.worker_hours / 4)
    shown = _state(tmp_path, cache)
    assert {k: v for k, v in shown.items() if "why.yaml" not in k and k != str(tmp_path)} == {
        k: v for k, v in before.items() if "why.yaml" not in k and k != str(tmp_path)
    }


# Partial builds


def test_what_there_is_is_published_only_if_asked(
    satellite_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = satellite_config("part")
    from geolink.cli.main import main
    from pipelines.plan import make_plan

    bad = make_plan(_load(path)).tasks[2].shard
    whole = build_module.build_shard

    def failing(task: Any) -> Any:
        if task.shard == bad:
            raise MemoryError("planted")
        return whole(task)

    monkeypatch.setattr(build_module, "build_shard", failing)
    with pytest.raises(SystemExit) as stopped:
        main(["build", "--json", str(path)])
    assert stopped.value.code == 1
    dataset = path.with_suffix("")
    assert snapshot_numbers(dataset) == []
    with pytest.raises(SystemExit) as stopped:
        main(["build", "--json", "--publish-partial", str(path)])
    assert stopped.value.code == 1
    assert bad not in {r.shard for r in read_snapshot(dataset).rows}
    monkeypatch.undo()
    result = _build(path)
    assert (result.built, result.snapshot) == (1, 2)
    assert bad in {r.shard for r in result.rows}


# Clocks, disks


def test_a_clock_that_jumps_back_changes_nothing(
    satellite_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _files(Path(str(_build(satellite_config("steady")).dataset)))
    real, calls = time.time, 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return real() - calls * 86_400.0

    monkeypatch.setattr(time, "time", jumping)
    path = satellite_config("jumping")
    result = _build(path)
    assert result.published
    assert calls > 1
    assert _files(Path(str(result.dataset))) == expected
    assert not _build(path).published
    assert collect_garbage(Path(str(result.dataset))).shards == []


@contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk is made with a small tmpfs: needs root")
def test_a_build_goes_on_when_a_full_disk_has_space_again(
    satellite_config: WriteConfig, tmp_path: Path
) -> None:
    expected = _files(Path(str(_build(satellite_config("ample")).dataset)))
    with _small_disk(tmp_path / "disk", "700k") as disk:
        path = satellite_config("full", dataset=str(disk / "dataset"))
        full = _geolink("build", str(path))
        assert full.returncode in (1, 2)
        assert "No space left" in full.stderr
        assert "Traceback" not in full.stderr
        assert not [f for f in disk.rglob("*") if ".partial" in f.name]
        assert snapshot_numbers(disk / "dataset") == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert _geolink("build", str(path)).returncode == 0
        assert _files(disk / "dataset") == expected
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        # Nothing can be written: readers and dry runs do not mind, a changed build says so.
        opened = open_dataset(disk / "dataset")
        assert len(read_shard(opened, opened.rows[0])["image"])
        assert _geolink("build", "--dry-run", str(path)).returncode == 0
        refused = _geolink("build", str(satellite_config("full", dataset=str(disk / "dataset"),
                                                         min_valid=0.9)))  # fmt: skip
        assert refused.returncode in (1, 2)
        assert "Read-only file system" in refused.stderr
        assert "Traceback" not in refused.stderr
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


# Kills


def test_five_kills_change_no_byte(satellite_config: WriteConfig) -> None:
    killed = kill_many(satellite_config, kills=5, seed=5)
    assert killed.coordinators + killed.workers == 5
