"""Every sensor preset read from files as its catalogs serve them: the right pixels and masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from rasterio.control import GroundControlPoint

from pipelines.imagery import BlockImage, load_block
from pipelines.items import Scene, scene_of_item
from pipelines.scenes import find_scenes
from pipelines.select import Rules
from schemas.grid import Bounds
from schemas.sensor import LANDSAT_C2_L2, NAIP, SENSORS, SENTINEL_2_L2A, Band, Mask, Sensor
from schemas.sources import SceneSource
from tests.pipelines.raster_fixtures import EPSG, X0, Y0, random_dn, write_tif

BLOCK: Bounds = (X0 + 600, Y0 - 1560, X0 + 1560, Y0 - 600)
"""96 x 96 pixels of 10 m, on every grid up to 60 m."""
SOURCE = SceneSource(stac="unused", max_cloud=100)


def item(name: str, assets: dict[str, dict[str, Any]], **properties: Any) -> dict[str, Any]:
    """Item as JSON around files in a folder."""
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "assets": assets,
        "bbox": [10.34, 47.82, 10.38, 47.85],
        "properties": {"datetime": "2024-06-01T10:00:00Z", "proj:epsg": EPSG, **properties},
    }  # fmt: skip


def scene(folder: Path, made: Any, sensor: Sensor) -> Scene:
    found = scene_of_item(made, sensor, SOURCE, str(folder / "x.json"), {})
    assert found.problem is None, found.problem
    return found


def load(scenes: list[Scene], sensor: Sensor, bounds: Bounds = BLOCK) -> BlockImage:
    return load_block(scenes, sensor, EPSG, bounds, 10.0)


@pytest.mark.parametrize("catalog", ["earth-search", "planetary-computer", "copernicus"])
def test_sentinel_2_is_the_same_under_the_names_of_every_catalog(
    tmp_path: Path, catalog: str
) -> None:
    assets, expected = {}, []
    for n, band in enumerate(SENTINEL_2_L2A.bands):
        assert band.gsd_m
        side = round(2400 / band.gsd_m)
        pixels = random_dn(n, (side, side))
        write_tif(tmp_path / f"{band.name}.tif", pixels, band.gsd_m)
        # The same band at a coarser size, as Copernicus serves it too: not to be taken.
        write_tif(tmp_path / "coarse.tif", pixels[::4, ::4] // 2, 4 * band.gsd_m)
        short, long, sized = band.asset.split("|")
        key = {"earth-search": short, "planetary-computer": long, "copernicus": sized}[catalog]
        assets[key] = {"href": f"./{band.name}.tif"}
        if catalog == "copernicus":
            assets[f"{long}_{2 * round(band.gsd_m)}m"] = {"href": "./coarse.tif"}
            assets[key]["raster:offset"], assets[key]["raster:scale"] = -0.1, 1e-4
        with rasterio.open(tmp_path / f"{band.name}.tif") as file:
            window = rasterio.windows.from_bounds(*BLOCK, file.transform)
            expected.append(
                file.read(
                    1, window=window, out_shape=(96, 96),
                    resampling=rasterio.enums.Resampling.bilinear,
                )
            )  # fmt: skip
    scl = np.full((120, 120), 4, np.uint8)
    scl[:60, :60] = 9
    write_tif(tmp_path / "scl.tif", scl, 20)
    mask = {"earth-search": "scl", "planetary-computer": "SCL", "copernicus": "SCL_20m"}[catalog]
    assets[mask] = {"href": "./scl.tif"}
    made = item(catalog, assets, **{"s2:processing_baseline": "05.10"})
    block = load([scene(tmp_path, made, SENTINEL_2_L2A)], SENTINEL_2_L2A)
    np.testing.assert_array_equal(block.image, np.maximum(np.array(expected, int) - 1000, 1))
    clouded = np.repeat(np.repeat(scl == 9, 2, axis=0), 2, axis=1)[60:156, 60:156]
    np.testing.assert_array_equal(block.valid, ~clouded)
    assert block.considered[0]["cloud"] == pytest.approx(clouded.mean(), abs=0.02)


@pytest.mark.parametrize("usgs", [False, True])
def test_landsat_masks_by_bits_and_keeps_scale_and_offset(tmp_path: Path, usgs: bool) -> None:
    assets = {}
    for n, band in enumerate(LANDSAT_C2_L2.bands):
        write_tif(tmp_path / f"{band.name}.tif", random_dn(n, (100, 100), 7000), 30)
        assets[band.asset.split("|")[2 if usgs else 0]] = {"href": f"./{band.name}.tif"}
    # USGS' table of QA_PIXEL: clear land 21824, clear water 21952, cloud 22280, high-confidence
    # cirrus over land 54596, cloud shadow 23888, snow 30048, dilated cloud 21826, fill 1.
    values = np.array([21824, 21952, 30048, 22280, 54596, 23888, 21826, 1], np.uint16)
    qa = np.repeat(values, 13)[:100][None].repeat(100, axis=0)
    write_tif(tmp_path / "qa.tif", qa, 30, nodata=1)
    assets["QA_PIXEL.TIF" if usgs else "qa_pixel"] = {"href": "./qa.tif"}
    sensor = LANDSAT_C2_L2
    block = load_block(
        [scene(tmp_path, item("l8", assets), sensor)], sensor, EPSG,
        (X0, Y0 - 3000, X0 + 3000, Y0), 30.0,
    )  # fmt: skip
    np.testing.assert_array_equal(block.valid, np.isin(qa, (21824, 21952, 30048)))
    with rasterio.open(tmp_path / "red.tif") as file:
        np.testing.assert_array_equal(block.image[3], file.read(1))
    assert 18000 * sensor.scale + sensor.offset == pytest.approx(0.295)
    filled = qa != 1
    assert block.considered[0]["coverage"] == pytest.approx(filled.mean(), abs=0.01)


def test_naip_is_four_bands_of_one_asset(tmp_path: Path) -> None:
    data = random_dn(1, (4, 240, 240)).astype(np.uint8)
    write_tif(tmp_path / "naip.tif", data, 10, nodata=None, driver="GTiff", interleave="pixel")
    made = item("naip", {"image": {"href": "./naip.tif"}})
    block = load([scene(tmp_path, made, NAIP)], NAIP)
    np.testing.assert_array_equal(block.image, data[:, 60:156, 60:156])


def test_sentinel_1_grd_is_placed_by_its_control_points(tmp_path: Path) -> None:
    sensor, assets = SENSORS["sentinel-1-grd"], {}
    there = Transformer.from_crs(EPSG, 4326, always_xy=True)
    points = [
        GroundControlPoint(r, c, *there.transform(X0 + 10 * c, Y0 - 10 * r))
        for r in range(0, 241, 60)
        for c in range(0, 241, 60)
    ]
    pixels = {n: random_dn(k, (240, 240), 1) for k, n in enumerate(("vv", "vh"))}
    for name, dn in pixels.items():
        path = tmp_path / f"{name}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", width=240, height=240, count=1, dtype="uint16"
        ) as file:
            file.write(dn, 1)
            file.gcps = (points, rasterio.CRS.from_epsg(4326))
        assets[name] = {"href": f"./{name}.tif"}
    made = item("grd", assets, **{"proj:epsg": None})
    found = scene(tmp_path, made, sensor)
    assert (found.bands[0].epsg, found.bands[0].transform) == (4326, None)
    block = load_block([found], sensor, EPSG, BLOCK, 10.0, Rules(resampling="nearest"))
    for n, dn in enumerate(pixels.values()):
        np.testing.assert_array_equal(block.image[n], dn[60:156, 60:156])


def test_sentinel_1_rtc_is_stored_as_decibels(tmp_path: Path) -> None:
    sensor, assets = SENSORS["sentinel-1-rtc"], {}
    power = np.exp(np.random.default_rng(0).normal(-3, 1.5, (240, 240))).astype(np.float32)
    power[100, 100:105] = [0.0, -32768.0, np.nan, 1e-9, 1e9]
    for name in ("vv", "vh"):
        write_tif(tmp_path / f"{name}.tif", power, 10, nodata=-32768)
        assets[name] = {"href": f"./{name}.tif"}
    block = load([scene(tmp_path, item("rtc", assets), sensor)], sensor)
    decibels = block.image[0] * sensor.scale + sensor.offset
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = 10 * np.log10(power[60:156, 60:156].astype(float))
    odd = np.s_[40, 40:45]
    # Nothing, nothing, nothing; too weak and too strong are kept off "no data" and clipped.
    assert block.image[0][odd].tolist() == [0, 0, 0, 1, 65535]
    assert block.counts["pixel_out_of_range"] == 4
    decibels[odd] = expected[odd] = 0
    np.testing.assert_allclose(decibels, expected, atol=0.0006)


def test_a_sensor_of_ones_own_reads_by_its_band_table(tmp_path: Path) -> None:
    sensor = Sensor(
        name="mine", dtype="uint16", nodata=65535, scale=0.01, units="K",
        bands=(Band(name="b", asset="data", index=2), Band(name="a", asset="data")),
        mask=Mask(asset="qa", invalid=(7,), invalid_bits=(5,), nodata=255),
    )  # fmt: skip
    data = random_dn(1, (2, 240, 240))
    data[:, 70, 70] = 65535
    write_tif(tmp_path / "d.tif", data, 10, nodata=65535)
    qa = np.random.default_rng(0).choice(np.array([0, 7, 32, 40, 6], np.uint8), (240, 240))
    write_tif(tmp_path / "q.tif", qa, 10, nodata=255)
    made = item("m", {"data": {"href": "./d.tif"}, "qa": {"href": "./q.tif"}})
    block = load([scene(tmp_path, made, sensor)], sensor)
    np.testing.assert_array_equal(block.image, data[::-1, 60:156, 60:156])
    expected = np.isin(qa, (0, 6))[60:156, 60:156]
    expected[10, 10] = False
    np.testing.assert_array_equal(block.valid, expected)


def test_a_folder_of_rasters_is_read_with_any_preset(tmp_path: Path) -> None:
    dn = random_dn(1, (12, 240, 120))
    write_tif(tmp_path / "west.tif", dn, 10)
    write_tif(tmp_path / "east.tif", dn[:, ::-1], 10, x0=X0 + 1200)
    source = SceneSource(rasters=(str(tmp_path / "*.tif"),))
    scenes, _ = find_scenes(source, (10.3, 47.8, 10.4, 47.86), SENTINEL_2_L2A)
    block = load(scenes, SENTINEL_2_L2A)
    whole = np.concatenate([dn, dn[:, ::-1]], axis=2)
    np.testing.assert_array_equal(block.image, whole[:, 60:156, 60:156])
    json.dumps(block.considered)
