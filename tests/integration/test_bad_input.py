"""Bad input ends in one clear sentence and a non-zero exit, or in a counted skip: no traceback."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import osmium
import pytest
import rasterio

from geolink.cli import main
from geolink.reader import open_dataset, read_shard
from pipelines.build import BuildResult, build_dataset
from pipelines.world import World
from schemas.config import DatasetConfig
from schemas.load import load_config
from tests.integration.conftest import WriteConfig

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def geolink(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line; returns exit status and stderr, which never holds a traceback."""

    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        return int(stopped.value.code or 0), errors

    return run


def _build(path: Path) -> BuildResult:
    return build_dataset(load_config(path, DatasetConfig))


def _refused(geolink: Run, path: Path, *parts: str) -> None:
    status, errors = geolink("build", path)
    assert status == 2, errors
    for part in parts:
        assert part in errors


# --- extracts ---------------------------------------------------------------------------------


def test_a_missing_extract(geolink: Run, satellite_config: WriteConfig) -> None:
    path = satellite_config(osm={"pbf": "nowhere.osm.pbf"})
    _refused(geolink, path, "nowhere.osm.pbf is missing")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"<osm version='0.6'></osm>" * 9, "not"), (b"\x00" * 500, "not")],
)
def test_an_extract_that_is_no_pbf(
    geolink: Run, satellite_config: WriteConfig, tmp_path: Path, content: bytes, message: str
) -> None:
    extract = tmp_path / "bad.osm.pbf"
    extract.write_bytes(content)
    _refused(geolink, satellite_config(osm={"pbf": str(extract)}), "bad.osm.pbf", message)


def test_a_truncated_extract(
    geolink: Run, satellite_config: WriteConfig, tmp_path: Path, town: World
) -> None:
    whole = town.pbf.read_bytes()
    extract = tmp_path / "cut.osm.pbf"
    extract.write_bytes(whole[: len(whole) // 2])
    _refused(geolink, satellite_config(osm={"pbf": str(extract)}), "cut.osm.pbf")


def test_an_extract_without_an_object_in_the_region(
    geolink: Run, satellite_config: WriteConfig, tmp_path: Path
) -> None:
    extract = tmp_path / "elsewhere.osm.pbf"
    with osmium.SimpleWriter(str(extract)) as writer:
        for n in range(3):
            writer.add_node(
                osmium.osm.mutable.Node(
                    id=n + 1, location=(100.0 + n, 10.0), tags={"shop": "kiosk"}
                )
            )
    path = satellite_config(osm={"pbf": str(extract)})
    _refused(geolink, path, "elsewhere.osm.pbf", "no object in the region")


def test_a_kept_key_that_occurs_nowhere(
    geolink: Run, satellite_config: WriteConfig, town: World
) -> None:
    path = satellite_config(osm={"pbf": str(town.pbf), "keep_keys": ["buildng", "highway"]})
    _refused(geolink, path, "buildng", "building")


# --- scenes -----------------------------------------------------------------------------------


@pytest.fixture
def catalog(town: World, tmp_path: Path) -> Path:
    """A copy of the town's catalog that a test may damage."""
    shutil.copytree(town.s2_catalog.parent, tmp_path / "s2")
    return tmp_path / "s2" / town.s2_catalog.name


def _items(catalog: Path) -> list[Path]:
    return [
        f for f in sorted(catalog.parent.rglob("*.json"))
        if json.loads(f.read_text()).get("type") == "Feature"
    ]  # fmt: skip


def _change_items(catalog: Path, change: Callable[[dict[str, Any]], None]) -> None:
    for path in _items(catalog):
        item = json.loads(path.read_text())
        change(item)
        path.write_text(json.dumps(item))


def test_a_missing_catalog(geolink: Run, satellite_config: WriteConfig) -> None:
    _refused(geolink, satellite_config(scenes={"stac": "none/catalog.json"}), "none/catalog.json")


def test_no_scene_in_the_time_asked_for(
    geolink: Run, satellite_config: WriteConfig, town: World
) -> None:
    path = satellite_config(scenes={"stac": str(town.s2_catalog), "start": "2031-01-01"})
    _refused(geolink, path, "scene_outside_time 2", "2031")


def test_scenes_without_a_crs(geolink: Run, satellite_config: WriteConfig, catalog: Path) -> None:
    for tif in catalog.parent.rglob("*.tif"):
        with rasterio.open(tif) as whole:
            profile, values = whole.profile, whole.read()
        del profile["crs"]
        with rasterio.open(tif, "w", **profile) as without:
            without.write(values)

    def strip(item: dict[str, Any]) -> None:
        for part in (item["properties"], *item["assets"].values()):
            for key in [k for k in part if k.startswith("proj:")]:
                del part[key]

    _change_items(catalog, strip)
    _refused(geolink, satellite_config(scenes={"stac": str(catalog)}), "CRS")


def test_scenes_without_a_band(geolink: Run, satellite_config: WriteConfig, catalog: Path) -> None:
    _change_items(catalog, lambda item: item["assets"].pop("nir"))
    _refused(geolink, satellite_config(scenes={"stac": str(catalog)}), "nir")


def _damage(catalog: Path, n: int, band: str, change: Callable[[Path], object]) -> None:
    item = json.loads(_items(catalog)[n].read_text())
    change(_items(catalog)[n].parent / item["assets"][band]["href"])


@pytest.mark.parametrize(
    "change",
    [Path.unlink, lambda f: os.truncate(f, f.stat().st_size // 3), lambda f: f.write_bytes(b"")],
    ids=["missing", "truncated", "empty"],
)
def test_a_damaged_asset_is_counted_and_the_other_scene_used(
    satellite_config: WriteConfig, catalog: Path, change: Callable[[Path], object]
) -> None:
    _damage(catalog, 1, "red", change)
    result = _build(satellite_config(scenes={"stac": str(catalog)}, min_valid=0.0))
    assert result.failed == {}
    assert any("scene" in code or "asset" in code for code in result.qc), result.qc
    assert sum(r.chips for r in result.rows) > 0


def test_every_asset_damaged_leaves_nothing_to_publish(
    geolink: Run, satellite_config: WriteConfig, catalog: Path
) -> None:
    for n in range(len(_items(catalog))):
        _damage(catalog, n, "red", lambda f: os.truncate(f, 2000))
    status, errors = geolink("build", satellite_config(scenes={"stac": str(catalog)}))
    assert status == 2
    assert "no chip is left to publish" in errors or "can be used" in errors


def test_clouded_chips_are_dropped_and_counted(
    satellite_config: WriteConfig, catalog: Path
) -> None:
    with rasterio.open(next(catalog.parent.rglob("scl.tif"))) as scl:
        shape = scl.shape
    for path in catalog.parent.rglob("scl.tif"):
        with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as scl:
            values = scl.read(1)
            values[: shape[0] // 2] = 9
            scl.write(values, 1)
    # The checksums in the items speak of the files before.
    clear = _build(satellite_config("clear"))
    clouded = _build(satellite_config("clouded", scenes={"stac": str(catalog)}))
    chips = [sum(r.chips for r in b.rows) for b in (clear, clouded)]
    assert 0 < chips[1] < 0.7 * chips[0]
    dropped = [b.qc.get("chip_below_min_valid", 0) for b in (clear, clouded)]
    assert dropped[1] - dropped[0] == chips[0] - chips[1]


def test_a_scene_that_covers_part_of_the_region_gives_part_of_the_chips(
    satellite_config: WriteConfig, town: World
) -> None:
    west, south, east, north = town.bounds_lonlat
    wide = {"bbox": [west - (east - west), south, east, north]}
    result = _build(satellite_config(region=wide))
    chips = sum(r.chips for r in result.rows)
    assert chips > 0
    assert result.qc["chip_below_min_valid"] > 0.5 * chips


# --- config and region ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"splts": {}}, ("unknown key 'splts'", "did you mean 'splits'?", ".yaml:")),
        ({"grid": {"gsd_m": "ten", "size": 32}}, ("grid.gsd_m", "ten")),
        ({"grid": {"gsd_m": 10, "size": 32, "patch": 5}}, ("patch 5 does not divide size 32",)),
        ({"grid": {"gsd_m": 0.3333, "size": 32}}, ("whole number of millimetres",)),
        ({"region": {"bbox": [8, 84.5, 9, 86]}}, ("outside UTM", "-80", "84")),
        ({"region": {"bbox": [8, 45, 8, 46]}}, ("no area",)),
        ({"region": {"bbox": [8, 45, 7, 46]}}, ("no area",)),
        ({"region": {"file": "none.geojson"}}, ("none.geojson",)),
        ({"sensor": "sentinel-9"}, ("unknown sensor 'sentinel-9'", "sentinel-2-l2a")),
        ({"sensor": {"preset": "sentinel-2-l2a", "bands": ["redd"]}}, ("no band 'redd'",)),
        ({"splits": {"train": 0.9, "val": 0.3, "test": 0.1}}, ("add up to 1.3",)),
    ],
)
def test_a_config_error_names_file_field_and_remedy(
    geolink: Run, satellite_config: WriteConfig, change: dict[str, Any], parts: tuple[str, ...]
) -> None:
    _refused(geolink, satellite_config(**change), *parts)


def test_a_missing_config(geolink: Run, tmp_path: Path) -> None:
    status, errors = geolink("build", tmp_path / "none.yaml")
    assert status == 2
    assert "none.yaml" in errors


# --- targets ----------------------------------------------------------------------------------


def test_a_target_that_is_a_file(geolink: Run, satellite_config: WriteConfig) -> None:
    path = satellite_config("taken")
    path.with_suffix("").write_text("a file")
    _refused(geolink, path, "taken")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_target(geolink: Run, satellite_config: WriteConfig, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    _refused(geolink, satellite_config(dataset=str(folder / "dataset")), "locked")


def test_another_dataset_in_the_same_folder(
    geolink: Run, satellite_config: WriteConfig, town: World
) -> None:
    _build(satellite_config("same"))
    grid = {"gsd_m": 10, "size": 64, "patch": 8, "shard_side": 2}
    _refused(geolink, satellite_config("same", grid=grid), "grid")


# --- datasets ---------------------------------------------------------------------------------


@pytest.fixture
def dataset(satellite_config: WriteConfig) -> Path:
    return _build(satellite_config("whole")).dataset


def test_a_dataset_of_a_newer_schema(geolink: Run, dataset: Path) -> None:
    info = json.loads((dataset / "dataset.json").read_text())
    info["schema_version"] = 99
    (dataset / "dataset.json").write_text(json.dumps(info))
    status, errors = geolink("info", dataset)
    assert status == 2
    assert "99" in errors
    assert "upgrade" in errors


def test_a_missing_snapshot(geolink: Run, dataset: Path) -> None:
    status, errors = geolink("info", dataset, "--snapshot", 7)
    assert status == 2
    assert "7" in errors


def test_a_folder_that_is_no_dataset(geolink: Run, tmp_path: Path) -> None:
    status, errors = geolink("info", tmp_path)
    assert status == 2
    assert str(tmp_path) in errors


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_damaged_shard_array_is_named(geolink: Run, dataset: Path, damage: str) -> None:
    opened = open_dataset(dataset)
    row = max(opened.rows, key=lambda r: r.objects)
    array = dataset / row.path / "object_anchor"
    if damage == "missing":
        shutil.rmtree(array)
    else:
        chunk = max((f for f in array.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        data = np.frombuffer(chunk.read_bytes(), np.uint8).copy()
        data[len(data) // 2] ^= 0xFF
        chunk.write_bytes(data.tobytes())
    status, errors = geolink("info", dataset / row.path)
    assert status == 2
    assert "object_anchor" in errors
    with pytest.raises(Exception, match="object_anchor"):
        read_shard(opened, row)


# --- checkpoints ------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there(geolink: Run, tmp_path: Path) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text("checkpoint: nowhere\ndata: nowhere\n")
    status, errors = geolink("evaluate", config)
    assert status == 2
    assert "nowhere" in errors
