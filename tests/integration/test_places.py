"""Datasets of sites and of samples: the same chips as in a dataset of the whole region."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from click.testing import CliRunner
from pyproj import Geod

from flows.report import write_report
from geolink.cli.main import cli
from geolink.reader import open_dataset, read_shard
from pipelines.build import BuildResult, build_dataset
from pipelines.world import World
from schemas.config import DatasetConfig
from schemas.grid import to_lonlat, to_utm
from schemas.load import load_config
from tests.integration.conftest import WriteConfig

SAME = ("image", "valid", "bounds", "label_pixel", "label_patch", "label_region")


def _build(path: Path) -> BuildResult:
    return build_dataset(load_config(path, DatasetConfig))


def _chips(result: BuildResult) -> dict[tuple[int, ...], dict[str, Any]]:
    """Every chip by id: its scene, objects, place, and arrays."""
    dataset = open_dataset(result.dataset)
    chips = {}
    for row in result.rows:
        shard = read_shard(dataset, row)
        for i, chip in enumerate(shard["chip_id"].tolist()):
            chips[tuple(chip)] = {
                "scene": row.scenes[shard["scene"][i]],
                "objects": np.diff(shard["object_offset"])[i],
                "lonlat": shard["center_lonlat"][i],
                **{name: shard[name][i] for name in SAME},
            }
    return chips


def _same(part: dict[Any, Any], whole: dict[Any, Any]) -> int:
    """Check that chips are those of the whole; how many have their pixels from one scene."""
    compared = 0
    for key, chip in part.items():
        other = whole[key]
        assert chip["objects"] == other["objects"]
        names = set(SAME) - (set() if chip["scene"] == other["scene"] else {"image", "valid"})
        compared += chip["scene"] == other["scene"]
        for name in names:
            assert (chip[name] == other[name]).all(), name
    return compared


def test_chips_of_sites_and_samples_are_those_of_the_whole_region(
    satellite_config: WriteConfig, town: World
) -> None:
    grid = {"gsd_m": 10, "size": 32, "patch": 8, "shard_side": 4}
    splits = {"block_km": 1.28, "train": 0.6, "val": 0.2, "test": 0.2}
    options = {"grid": grid, "splits": splits, "min_valid": 0.0}
    whole = _chips(_build(satellite_config("whole", **options)))

    west, south, east, north = town.bounds_lonlat
    share = [(0.3, 0.4), (0.8, 0.8)]
    sites = [(west + x * (east - west), south + y * (north - south)) for x, y in share]
    region: dict[str, Any] = {"points": sites, "radius_m": 350}
    near = _chips(_build(satellite_config("sites", region=region, **options)))
    geod = Geod(ellps="WGS84")
    expected = {
        key
        for key, chip in whole.items()
        if min(geod.inv(*chip["lonlat"], *site)[2] for site in sites) <= 350
    }
    assert set(near) == expected
    assert 4 <= len(near) < len(whole) / 2
    assert _same(near, whole) > 0

    region = {"bbox": list(town.bounds_lonlat), "sample": {"chips": 12, "by": "land-use"}}
    result = _build(satellite_config("sample", region=region, **options))
    sample = _chips(result)
    assert len(sample) == 12
    assert _same(sample, whole) > 0
    again = _build(satellite_config("again", region=region, **options))
    assert [r.checksum for r in again.rows] == [r.checksum for r in result.rows]


def test_a_site_that_gets_no_chip_is_named(satellite_config: WriteConfig, town: World) -> None:
    path = satellite_config("whole")
    dataset = load_config(path, DatasetConfig)
    west, south, east, north = town.bounds_lonlat
    x, y = to_utm(32630).transform((west + east) / 2, (south + north) / 2)
    side = dataset.grid.chip_m
    corner = to_lonlat(32630).transform(x // side * side, y // side * side)
    centre = to_lonlat(32630).transform((x // side + 0.5) * side, (y // side + 0.5) * side)
    region: dict[str, Any] = {"points": [list(centre), list(corner)], "radius_m": 200}
    path = satellite_config("sites", region=region)
    shown = CliRunner().invoke(cli, ["build", str(path)])
    assert shown.exit_code == 0, shown.output
    name = f"({corner[0]:.8g}, {corner[1]:.8g})"
    assert "point_without_chip" in shown.output
    assert name in shown.output
    result = _build(path)
    assert result.skipped["point_without_chip"] == 1
    assert result.named == {"point_without_chip": [name]}
    assert sum(row.chips for row in result.rows) == 1
    with duckdb.connect(str(Path(result.dataset) / "catalog.duckdb"), read_only=True) as con:
        (message,) = con.execute(
            "SELECT DISTINCT message FROM findings WHERE code = 'point_without_chip'"
        ).fetchall()
    assert message == (name,)
    page = write_report(result.dataset, path.with_suffix(".html"))
    assert name in page.read_text(encoding="utf-8")


def test_a_sample_of_more_chips_than_there_are_is_a_finding(
    satellite_config: WriteConfig, town: World
) -> None:
    region = {"bbox": list(town.bounds_lonlat), "sample": {"chips": 10_000}}
    result = _build(satellite_config("short", region=region))
    assert result.skipped["sample_short"] > 9000
    assert result.qc["sample_short"] == result.skipped["sample_short"]
