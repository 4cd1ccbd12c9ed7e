"""Exports of a built dataset: their pixels are those of the pictures; TorchGeo reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
import yaml
from PIL import Image
from rasterio.windows import from_bounds

from flows.export import export
from pipelines.build import build_dataset
from pipelines.world import World
from schemas.config import DatasetConfig
from schemas.load import load_config
from tests.integration.torchgeo_there import torchgeo_folder

HERE = Path(__file__).parent
SIZE = 192


@pytest.fixture(scope="module")
def exported(town: World, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chips at 1 m of a part of the town."""
    folder = tmp_path_factory.mktemp("aerial")
    west, south, east, north = town.aerial_bounds_lonlat
    config: dict[str, Any] = {
        "name": "aerial",
        "dataset": "dataset",
        "region": {
            "bbox": [
                west + 0.3 * (east - west), south + 0.3 * (north - south),
                west + 0.7 * (east - west), south + 0.6 * (north - south),
            ]
        },
        "grid": {"gsd_m": 1, "size": SIZE, "patch": 16, "shard_side": 2},
        "sensor": "aerial-rgb",
        "scenes": {"stac": str(town.aerial_catalog)},
        "osm": {"pbf": str(town.pbf)},
        "splits": {"block_km": 0.384, "train": 0.6, "val": 0.2, "test": 0.2},
        "cache": str(cache),
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    build_dataset(load_config(path, DatasetConfig))
    export(folder / "dataset", folder / "export", ("geotiff", "png", "stac"))
    return folder / "export"


def test_pixels_of_a_geotiff_are_those_of_the_picture_at_that_place(
    exported: Path, town: World
) -> None:
    items = pystac.Catalog.from_file(str(town.aerial_catalog)).get_items(recursive=True)
    pictures = {i.id: i.assets["image"].get_absolute_href() for i in items}
    chips = sorted((exported / "images").rglob("*.tif"))
    assert len(chips) >= 6
    for path in chips:
        with rasterio.open(path) as chip, rasterio.open(pictures[chip.tags()["SCENE"]]) as picture:
            assert chip.crs == picture.crs
            assert chip.res == picture.res
            window = from_bounds(*chip.bounds, picture.transform)
            np.testing.assert_array_equal(chip.read(), picture.read(window=window))


def test_torchgeo_cuts_pairs_of_picture_and_mask_from_an_export(exported: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "read_with_torchgeo.py"), str(exported)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": str(torchgeo_folder())},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    expected = []
    for path in (exported / "images").rglob("*.tif"):
        mask = str(path).replace("/images/", "/labels/").removesuffix("tif") + "png"
        with rasterio.open(path) as chip:
            expected.append([int(chip.read().sum()), int(np.asarray(Image.open(mask)).sum())])
    assert seen["pairs"] == sorted(expected)
    assert seen["files"] == [len(expected)] * 3
    assert (seen["crs"], seen["resolution"]) == (32630, [1.0, 1.0])
    assert seen["shape"] == [1, 3, SIZE, SIZE]
    assert seen["first"].startswith("2021-08-24 10:30")
