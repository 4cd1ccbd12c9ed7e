"""Pixels of a block equal what rasterio reads one window at a time, and the composite its rule."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import odc.stac
import pyproj
import pystac
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, Resampling
from rasterio.env import get_gdal_config
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT
from rasterio.windows import from_bounds

from pipelines.files import open_files
from pipelines.imagery import BlockImage, cut_chips, load_block
from pipelines.items import Scene, scene_of_item
from pipelines.loader import Place, open_loader
from pipelines.plan import STAGES
from pipelines.rasters import to_storage
from pipelines.scenes import find_scenes
from pipelines.select import Rules, SceneIndex, choose
from schemas.errors import GeoLinkError
from schemas.grid import Bounds
from schemas.layout import UNKNOWN_TIME
from schemas.sensor import AERIAL_RGB, NAIP, Band, Sensor
from schemas.sources import SceneSource
from tests.pipelines.raster_fixtures import (
    EPSG,
    PLAIN,
    SENSOR,
    X0,
    Y0,
    random_dn,
    serve_files,
    write_scene,
    write_tif,
)  # fmt: skip

GOLDEN = (2, "c0ec6e2470ed2361")
BLOCK: Bounds = (X0 + 640, Y0 - 1920, X0 + 1920, Y0 - 640)
"""128 x 128 pixels of 10 m inside a test scene."""
SOURCE = SceneSource(stac="unused", max_cloud=100)
RED = SENSOR.model_copy(update={"bands": SENSOR.bands[:1], "mask": None, "radiometry": "none"})


def scene_in(folder: Path, item: dict[str, Any], sensor: Sensor = SENSOR) -> Scene:
    """The scene of an item of `write_scene`."""
    base = str(folder / item["id"] / "item.json")
    scene = scene_of_item(item, sensor, SOURCE, base, {})
    assert scene.problem is None, scene.problem
    return scene


def load(
    scenes: list[Scene], sensor: Sensor = SENSOR, bounds: Bounds = BLOCK, **fields: Any
) -> BlockImage:
    return load_block(scenes, sensor, fields.pop("epsg", EPSG), bounds, 10.0, **fields)


def windows(folder: Path, name: str, bounds: Bounds) -> NDArray[np.uint16]:
    """Red and near infrared by rasterio, one window each."""
    bands = []
    for band in ("red", "nir"):
        with rasterio.open(folder / name / f"{band}.tif") as file:
            window = from_bounds(*bounds, file.transform)
            bands.append(file.read(1, window=window, boundless=True, fill_value=0))
    return np.stack(bands)


def warped(path: Path, bounds: Bounds, epsg: int, method: Resampling, band: int = 1) -> Any:
    """A block by GDAL's warper, opened and resampled independently of the product."""
    width, height = round((bounds[2] - bounds[0]) / 10), round((bounds[3] - bounds[1]) / 10)
    with (
        rasterio.open(path) as file,
        WarpedVRT(
            file, crs=f"EPSG:{epsg}", transform=from_origin(bounds[0], bounds[3], 10, 10),
            width=width, height=height, resampling=method,
        ) as vrt,
    ):  # fmt: skip
        return vrt.read(band)


def test_pixels_on_the_grid_are_those_of_the_file(tmp_path: Path) -> None:
    scene = scene_in(tmp_path, write_scene(tmp_path, "a"), PLAIN)
    block = load([scene], PLAIN)
    assert block.image.dtype == np.uint16
    np.testing.assert_array_equal(block.image[:2], windows(tmp_path, "a", BLOCK))
    assert block.valid.all()
    assert (block.scene == 0).all()
    assert (block.scenes, block.counts) == (["a"], {})


def test_the_offset_is_applied_once_and_recorded(tmp_path: Path) -> None:
    new = scene_in(tmp_path, write_scene(tmp_path, "new", seed=1, baseline="04.00"))
    old = scene_in(tmp_path, write_scene(tmp_path, "old", seed=1, baseline="03.01"))
    raw = windows(tmp_path, "new", BLOCK).astype(int)
    after, before = load([new]), load([old])
    np.testing.assert_array_equal(after.image[:2], np.maximum(raw - 1000, 1))
    np.testing.assert_array_equal(before.image[:2], raw)
    assert after.radiometry == {"new": "-1000: baseline 04.00 stores DN +1000"}
    assert before.radiometry == {"old": "+0: baseline 03.01 has no offset"}


@pytest.mark.parametrize("method", ["nearest", "bilinear", "cubic"])
def test_coarser_bands_equal_gdals_warper(tmp_path: Path, method: str) -> None:
    scene = scene_in(tmp_path, write_scene(tmp_path, "a"), PLAIN)
    for bounds in (BLOCK, (X0 + 10, Y0 - 1290, X0 + 1290, Y0 - 10)):
        block = load([scene], PLAIN, bounds, rules=Rules(resampling=method))
        expected = warped(tmp_path / "a" / "swir.tif", bounds, EPSG, Resampling[method])
        np.testing.assert_array_equal(block.image[2], expected)


def test_holes_in_a_coarser_band_stay_holes(tmp_path: Path) -> None:
    item = write_scene(tmp_path, "a")
    swir = random_dn(5, (128, 128))
    swir[40:60, 50:70] = 0
    path = write_tif(tmp_path / "a" / "swir.tif", swir, 20)
    block = load([scene_in(tmp_path, item, PLAIN)], PLAIN)
    np.testing.assert_array_equal(block.image[2], warped(path, BLOCK, EPSG, Resampling.bilinear))
    hole = np.zeros((256, 256), bool)
    hole[80:120, 100:140] = True
    np.testing.assert_array_equal(block.image[2] == 0, hole[64:192, 64:192])
    np.testing.assert_array_equal(block.valid, ~hole[64:192, 64:192])


def zone_33(folder: Path) -> dict[str, Any]:
    """A scene of the neighbouring zone, over the same ground."""
    x, y = (int(v[0]) for v in rasterio.warp.transform(32632, 32633, [X0 - 500], [Y0 + 500]))
    return write_scene(folder, "z33", epsg=32633, x0=x, y0=y, size_m=3840)


def test_a_scene_of_another_zone_is_reprojected(tmp_path: Path) -> None:
    block = load([scene_in(tmp_path, zone_33(tmp_path), PLAIN)], PLAIN)
    for n, band in enumerate(("red", "nir", "swir")):
        with rasterio.open(tmp_path / "z33" / f"{band}.tif") as file:
            expected = np.zeros((128, 128), np.uint16)
            rasterio.warp.reproject(
                file.read(1), expected, src_crs=file.crs, src_transform=file.transform,
                src_nodata=0, dst_crs=f"EPSG:{EPSG}", resampling=Resampling.bilinear,
                dst_transform=from_origin(BLOCK[0], BLOCK[3], 10, 10),
            )  # fmt: skip
        np.testing.assert_array_equal(block.image[n], expected)
    assert block.valid.mean() > 0.9


def test_a_reprojected_pixel_is_where_pyproj_puts_it(tmp_path: Path) -> None:
    item = zone_33(tmp_path)
    y, x = np.mgrid[:384, :384]
    for band, ramp in {"red": x, "nir": y}.items():
        grid = item["assets"][band]["proj:transform"]
        values = (1000 + 100 * ramp).astype(np.uint16)
        write_tif(tmp_path / "z33" / f"{band}.tif", values, 10, x0=grid[2], y0=grid[5], epsg=32633)
    block = load([scene_in(tmp_path, item, PLAIN)], PLAIN)
    rows, cols = np.mgrid[:128, :128] + 0.5
    there = pyproj.Transformer.from_crs(EPSG, 32633, always_xy=True)
    east, north = there.transform(BLOCK[0] + 10 * cols, BLOCK[3] - 10 * rows)
    column = (east - grid[2]) / 10 - 0.5
    row = (grid[5] - north) / 10 - 0.5
    seen = block.valid
    assert np.abs((block.image[0] - 1000.0) / 100 - column)[seen].max() < 0.13
    assert np.abs((block.image[1] - 1000.0) / 100 - row)[seen].max() < 0.13


def test_a_file_cut_short_is_found_when_it_is_reprojected(tmp_path: Path) -> None:
    scene = scene_in(tmp_path, zone_33(tmp_path), PLAIN)
    path = tmp_path / "z33" / "nir.tif"
    path.write_bytes(path.read_bytes()[:-20_000])
    assert load([scene], PLAIN).counts["scene_unreadable"] == 1


def test_beyond_the_edge_of_a_scene_there_is_no_data(tmp_path: Path) -> None:
    scene = scene_in(tmp_path, write_scene(tmp_path, "a"), PLAIN)
    for dx, dy in [(-640, 0), (0, 640), (1920, 0), (0, -1920), (-640, 640)]:
        bounds = (BLOCK[0] + dx, BLOCK[1] + dy, BLOCK[2] + dx, BLOCK[3] + dy)
        block = load([scene], PLAIN, bounds)
        expected = windows(tmp_path, "a", bounds)
        np.testing.assert_array_equal(block.image[:2], expected)
        np.testing.assert_array_equal(block.valid, expected[0] > 0)
        np.testing.assert_array_equal(block.scene, np.where(expected[0] > 0, 0, -1))


def test_two_adjacent_scenes_make_one_block(tmp_path: Path) -> None:
    west = scene_in(tmp_path, write_scene(tmp_path, "west", seed=1), PLAIN)
    east = scene_in(tmp_path, write_scene(tmp_path, "east", seed=2, x0=X0 + 2560), PLAIN)
    bounds = (X0 + 1920, Y0 - 1280, X0 + 3200, Y0)
    block = load([west, east], PLAIN, bounds)
    left, right = windows(tmp_path, "west", bounds), windows(tmp_path, "east", bounds)
    np.testing.assert_array_equal(block.image[:2], np.where(left > 0, left, right))
    assert block.valid.all()
    np.testing.assert_array_equal(block.scene, np.repeat([0, 1], 64)[None].repeat(128, axis=0))


def test_a_scene_that_does_not_meet_the_block_gives_nothing(tmp_path: Path) -> None:
    far = scene_in(tmp_path, write_scene(tmp_path, "far", x0=X0 + 100_000))
    block = load([far])
    assert (block.image == 0).all()
    assert block.counts == {"block_without_scene": 1}
    assert (block.scenes, block.scene.max()) == ([], -1)


def composite_by_hand(
    images: list[NDArray[Any]], clouds: list[NDArray[np.bool_]]
) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.int64]]:
    """The rule, one pixel at a time."""
    bands, height, width = images[0].shape
    out = np.zeros((bands, height, width), images[0].dtype)
    valid, which = np.zeros((height, width), bool), np.full((height, width), -1)
    for y in range(height):
        for x in range(width):
            for k, (image, cloud) in enumerate(zip(images, clouds, strict=True)):
                if (image[:, y, x] > 0).all() and not cloud[y, x]:
                    out[:, y, x], valid[y, x], which[y, x] = image[:, y, x], True, k
                    break
                if which[y, x] < 0 and (image[:, y, x] > 0).any():
                    out[:, y, x], which[y, x] = image[:, y, x], k
    return out, valid, which


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_pixel_comes_from_the_first_scene_where_it_is_valid(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("composite")
    rng = np.random.default_rng(seed)
    small = PLAIN.model_copy(update={"bands": PLAIN.bands[:2]})
    scenes, images, clouds = [], [], []
    for n in range(3):
        scl = rng.choice(np.array([4, 5, 8, 9], np.uint8), (16, 16))
        item = write_scene(folder, f"s{n}", size_m=320, scl=scl)
        image = rng.integers(1, 9000, (2, 32, 32), dtype=np.uint16)
        image[:, rng.random((32, 32)) < 0.3] = 0
        image[rng.random((2, 32, 32)) < 0.1] = 0
        for band, pixels in zip(("red", "nir"), image, strict=True):
            write_tif(folder / f"s{n}" / f"{band}.tif", pixels, 10)
        scenes.append(scene_in(folder, item, small))
        images.append(image)
        clouds.append(np.isin(scl, (8, 9)).repeat(2, axis=0).repeat(2, axis=1))
    block = load(scenes, small, (X0, Y0 - 320, X0 + 320, Y0))
    # Least cloudy over the block first, by whole percents; of equals, the first.
    order = sorted(range(3), key=lambda k: (round(100 * clouds[k].mean()), k))
    assert [c["rank"] for c in block.considered] == [order.index(k) for k in range(3)]
    image, valid, which = composite_by_hand([images[k] for k in order], [clouds[k] for k in order])
    np.testing.assert_array_equal(block.image, image)
    np.testing.assert_array_equal(block.valid, valid)
    names = np.array([*block.scenes, "none"])
    expected = np.array([*(f"s{k}" for k in order), "none"])
    np.testing.assert_array_equal(names[block.scene], expected[which])


def test_a_later_scene_is_not_read_when_nothing_is_missing(tmp_path: Path) -> None:
    clear = scene_in(tmp_path, write_scene(tmp_path, "clear", seed=1))
    other = scene_in(tmp_path, write_scene(tmp_path, "other", seed=2))
    for file in (tmp_path / "other").glob("*.tif"):
        if file.stem != "scl":
            file.unlink()
    block = load([clear, other])
    assert (block.scenes, block.counts) == (["clear"], {})


def test_clouds_everywhere_leave_pixels_that_are_not_valid(tmp_path: Path) -> None:
    scl = np.full((128, 128), 9, np.uint8)
    cloudy = scene_in(tmp_path, write_scene(tmp_path, "cloudy", scl=scl), SENSOR)
    block = load([cloudy])
    assert block.image.min() > 0
    assert not block.valid.any()
    assert (block.scene == 0).all()
    chips = cut_chips(block, 2, 64)
    assert chips.valid.tolist() == [0, 0, 0, 0]
    assert chips.scene.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("damage", ["missing", "empty", "header", "pixels"])
def test_a_damaged_file_leaves_its_scene_out_and_is_counted(tmp_path: Path, damage: str) -> None:
    bad = scene_in(tmp_path, write_scene(tmp_path, "bad", seed=1), PLAIN)
    good = scene_in(tmp_path, write_scene(tmp_path, "good", seed=2), PLAIN)
    path = tmp_path / "bad" / "swir.tif"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[: {"empty": 0, "header": 150, "pixels": len(data) - 20_000}[damage]])
    block = load([bad, good], PLAIN)
    assert (block.scenes, block.counts) == (["good"], {"scene_unreadable": 1})
    np.testing.assert_array_equal(block.image[:2], windows(tmp_path, "good", BLOCK))
    alone = load([bad], PLAIN)
    assert alone.counts == {"scene_unreadable": 1, "block_without_scene": 1}
    assert not alone.valid.any()


def test_pixels_over_http_are_the_same(tmp_path: Path) -> None:
    item = write_scene(tmp_path, "a", scl=np.full((128, 128), 8, np.uint8))
    here = load([scene_in(tmp_path, item)])
    with serve_files(tmp_path) as address:
        for asset in item["assets"].values():
            asset["href"] = f"{address}/a/{asset['href'][2:]}"
        there = load([scene_in(tmp_path, item)])
    np.testing.assert_array_equal(here.image, there.image)
    np.testing.assert_array_equal(here.valid, there.valid)


def test_a_file_that_is_gone_from_a_server_is_a_finding_a_failing_server_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "0")
    for code, name in [(404, "gone"), (503, "down")]:
        item = write_scene(tmp_path, name)
        with serve_files(tmp_path, fault=(f"/{name}/nir", code)) as address:
            for asset in item["assets"].values():
                asset["href"] = f"{address}/{name}/{asset['href'][2:]}"
            scene = scene_in(tmp_path, item)
            if code == 404:
                assert load([scene]).counts["scene_unreadable"] == 1
            else:
                with pytest.raises(GeoLinkError, match="cannot be fetched"):
                    load([scene])


def raster_scenes(pattern: Path, sensor: Sensor, region: Bounds) -> list[Scene]:
    return find_scenes(SceneSource(rasters=(str(pattern),)), region, sensor)[0]


REGION = (10.3, 47.8, 10.4, 47.86)


def test_each_band_of_a_file_of_many_bands(tmp_path: Path) -> None:
    rgb = random_dn(1, (3, 256, 256)).astype(np.uint8)
    rgb[:, 100, 100] = 0
    rgb[1, 101, 101], rgb[0, 101, 101] = 0, 7
    for name, options in {"cog": {}, "tiff": {"driver": "GTiff", "interleave": "pixel"}}.items():
        write_tif(tmp_path / f"{name}.tif", rgb, 10, nodata=None, **options)
        (scene,) = raster_scenes(tmp_path / f"{name}.tif", AERIAL_RGB, REGION)
        block = load([scene], AERIAL_RGB)
        np.testing.assert_array_equal(block.image, rgb[:, 64:192, 64:192])
        # Black in every band is nothing; black in one is a colour.
        assert not block.valid[100 - 64, 100 - 64]
        assert block.valid[101 - 64, 101 - 64]
        assert block.valid.mean() == 1 - 1 / 128**2


def test_bands_in_another_order_and_a_band_called_alpha(tmp_path: Path) -> None:
    data = random_dn(1, (4, 256, 256)).astype(np.uint8)
    data[3, :128] = 0
    path = write_tif(tmp_path / "naip.tif", data, 10, nodata=None, driver="GTiff")
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [
            ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha
        ]  # fmt: skip
    swapped = NAIP.model_copy(update={"bands": tuple(NAIP.bands[i] for i in (3, 0, 2, 1))})
    (scene,) = raster_scenes(path, swapped, REGION)
    block = load([scene], swapped)
    np.testing.assert_array_equal(block.image, data[[3, 0, 2, 1], 64:192, 64:192])
    # With a sensor that does not read it, the same band is the file's mask.
    (scene,) = raster_scenes(path, AERIAL_RGB, REGION)
    block = load([scene], AERIAL_RGB)
    np.testing.assert_array_equal(block.valid, data[3, 64:192, 64:192] > 0)


def test_a_few_dozen_megabytes_of_decoded_blocks_are_kept_while_a_block_is_read() -> None:
    place = Place(EPSG, (500000.0, 5000000.0, 500640.0, 5000640.0), 10.0)
    with open_loader([], SENSOR, place, Resampling.bilinear):
        assert 16 <= get_gdal_config("GDAL_CACHEMAX") / 2**20 <= 128


@pytest.mark.parametrize("dx", [0.0, 10.0, -1300.0, 1300.0])
@pytest.mark.parametrize("zone", [EPSG, EPSG + 1])
def test_a_mask_that_was_looked_at_whole_is_not_read_again_and_is_the_same(
    tmp_path: Path, dx: float, zone: int
) -> None:
    rng = np.random.default_rng(1)
    scl = rng.choice(np.array([0, 4, 5, 8, 9], np.uint8), (128, 128))
    scene = scene_in(tmp_path, write_scene(tmp_path, "a", scl=scl))
    bounds = (BLOCK[0] + dx, BLOCK[1], BLOCK[2] + dx, BLOCK[3])
    if zone != EPSG:
        x, y = pyproj.Transformer.from_crs(EPSG, zone, always_xy=True).transform(*BLOCK[:2])
        bounds = (x // 10 * 10, y // 10 * 10, x // 10 * 10 + 1280, y // 10 * 10 + 1280)
    place = Place(zone, bounds, 10.0)
    with open_loader([scene], SENSOR, place, Resampling.bilinear) as loader:
        read = loader.clouded(scene)
        look = loader.look(scene)
        assert (len(loader.seen) == 1) == (zone == EPSG)
        again = loader.clouded(scene)
    assert look is not None
    np.testing.assert_array_equal(read, again)
    if zone == EPSG:
        assert again is loader.seen[scene.mask.key]
        np.testing.assert_array_equal(look.clear, look.data & ~read)
    # A block of more pixels than the lattice has cells is only sampled.
    wide = Place(EPSG, (X0, Y0 - 2560, X0 + 2580, Y0 + 20), 10.0)
    with open_loader([scene], SENSOR, wide, Resampling.bilinear) as loader:
        loader.look(scene)
        assert not loader.seen


def test_the_mask_of_a_file_is_kept_when_it_is_reprojected(tmp_path: Path) -> None:
    data = np.full((4, 256, 256), 200, np.uint8)
    data[3, :, 128:] = 0
    data[:3, :, 128:] = 90
    path = write_tif(
        tmp_path / "a.tif", data, 10, nodata=None, driver="GTiff", photometric="RGB", x0=X0 + 5
    )
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [*file.colorinterp[:3], ColorInterp.alpha]
    (scene,) = raster_scenes(path, AERIAL_RGB, REGION)
    block = load([scene], AERIAL_RGB)
    seen = np.arange(128)[None].repeat(128, axis=0) < 64
    np.testing.assert_array_equal(block.valid, seen)
    assert (block.image[:, seen] == 200).all()


@pytest.mark.parametrize("dtype", ["int16", "float32", "uint8"])
def test_other_types_are_stored_without_wrapping_around(tmp_path: Path, dtype: str) -> None:
    values = np.array([[-5, -1, 0, 1, 2, 250]] * 6, "float64") if dtype != "uint8" else None
    data = np.full((256, 256), 100, dtype)
    if values is not None:
        data[64:70, 64:70] = values
    if dtype == "float32":
        data[70, 64:70] = [np.nan, np.inf, 1e9, 3.6, 0.2, -np.inf]
    path = write_tif(tmp_path / "a.tif", data, 10, nodata=None, driver="GTiff")
    (scene,) = raster_scenes(path, RED, REGION)
    block = load([scene], RED)
    assert block.image.dtype == np.uint16
    if values is not None:
        # Zero is "no data" in this sensor; a negative is dark, not nothing.
        assert block.image[0, 0, :6].tolist() == [1, 1, 0, 1, 2, 250]
        assert block.counts["pixel_out_of_range"] >= 12
    if dtype == "float32":
        assert block.image[0, 6, :6].tolist() == [0, 65535, 65535, 4, 1, 1]
        assert not block.valid[6, 0]


def test_storage_leaves_nodata_to_pixels_without_data() -> None:
    data = np.array([[300, -1, 255, 255]], np.int16)
    missing = np.array([[False, False, False, True]])
    stored, clipped = to_storage(data, missing, np.dtype("uint8"), 255)
    assert stored.tolist() == [[254, 0, 255, 255]]
    assert clipped == 2


def test_a_declared_nodata_value_becomes_the_sensors(tmp_path: Path) -> None:
    data = random_dn(3, (256, 256)).astype(np.int32)
    data[100:110, 100:110] = -9999
    path = write_tif(tmp_path / "a.tif", data, 10, nodata=-9999, driver="GTiff")
    (scene,) = raster_scenes(path, RED, REGION)
    block = load([scene], RED)
    np.testing.assert_array_equal(block.image[0], np.maximum(data, 0)[64:192, 64:192])
    assert block.valid.sum() == 128**2 - 100


def test_real_naip_images_are_reprojected_from_nad83(shared: Path) -> None:
    path = shared / "data" / "naip" / "m_3211605_ne_11_060_20200415.tif"
    (scene,) = raster_scenes(path, NAIP, (-117, 32, -116, 33))
    gsd_m, side = 0.6, 192
    x, y = 557_700.0, 3_648_260.4
    bounds = (x, y, x + side * gsd_m, y + side * gsd_m)
    assert choose(SceneIndex.of([scene]), 32611, bounds, SOURCE).scenes == (scene,)
    block = load_block([scene], NAIP, 32611, bounds, gsd_m)
    assert block.image.shape == (4, side, side)
    with rasterio.open(path) as file:
        source = file.read()
    expected = np.zeros((4, side, side), np.uint8)
    for n in range(4):
        rasterio.warp.reproject(
            source[n], expected[n], src_crs="EPSG:26911", src_transform=file.transform,
            dst_crs="EPSG:32611", dst_transform=from_origin(x, bounds[3], gsd_m, gsd_m),
            resampling=Resampling.bilinear,
        )  # fmt: skip
    np.testing.assert_array_equal(block.image, expected)
    assert block.valid.mean() > 0.99


def test_the_block_agrees_with_odc_stac(tmp_path: Path) -> None:
    item = write_scene(tmp_path, "a", legacy=True)
    for asset in item["assets"].values():
        asset["href"] = str(tmp_path / "a" / asset["href"][2:])
    oracle = odc.stac.load(
        [pystac.Item.from_dict(item)], bands=["red", "nir", "swir"], crs=f"EPSG:{EPSG}",
        resolution=10, x=(BLOCK[0], BLOCK[2]), y=(BLOCK[1], BLOCK[3]),
        resampling={"*": "nearest", "swir": "bilinear"}, dtype="uint16", nodata=0,
    )  # fmt: skip
    block = load([scene_in(tmp_path, item, PLAIN)], PLAIN)
    for n, band in enumerate(("red", "nir", "swir")):
        np.testing.assert_array_equal(block.image[n], oracle[band].values[0])


def test_chips_are_the_blocks_squares_from_the_north_west(tmp_path: Path) -> None:
    west = write_scene(tmp_path, "west", seed=1, time="2024-01-01T00:00:00Z")
    east = write_scene(tmp_path, "east", seed=2, x0=X0 + 2560, time="2024-01-02T00:00:00Z")
    bounds = (X0 + 2000, Y0 - 2560 - 320, X0 + 3280, Y0 - 2560 + 960)
    block = load([scene_in(tmp_path, west, PLAIN), scene_in(tmp_path, east, PLAIN)], PLAIN, bounds)
    chips = cut_chips(block, 4, 32)
    for n in range(16):
        y, x = n // 4 * 32, n % 4 * 32
        part = np.s_[y : y + 32, x : x + 32]
        np.testing.assert_array_equal(chips.image[n], block.image[(slice(None), *part)])
        assert chips.valid[n] == np.float32(block.valid[part].mean())
        index = np.bincount(block.scene[part][block.scene[part] >= 0], minlength=1)
        assert chips.scene[n] == (index.argmax() if index.any() else -1)
    # The east covers more of the block, so it goes first.
    assert block.scenes == ["east", "west"]
    assert chips.scene.reshape(4, 4).tolist() == [[1, 1, 0, 0]] * 3 + [[-1] * 4]
    day = 1704067200
    assert chips.time.tolist() == [day, day, day + 86400, day + 86400] * 3 + [UNKNOWN_TIME] * 4
    assert chips.image.flags.c_contiguous


def test_a_block_without_any_scene_has_empty_chips() -> None:
    block = load([])
    chips = cut_chips(block, 2, 64)
    assert (chips.valid == 0).all()
    assert (chips.scene == -1).all()
    assert (chips.time == UNKNOWN_TIME).all()
    assert block.counts == {"block_without_scene": 1}


def test_the_order_of_bands_is_the_sensors(tmp_path: Path) -> None:
    scene_item = write_scene(tmp_path, "a")
    turned = PLAIN.model_copy(update={"bands": (Band(name="n", asset="nir"), PLAIN.bands[0])})
    block = load([scene_in(tmp_path, scene_item, turned)], turned)
    np.testing.assert_array_equal(block.image, windows(tmp_path, "a", BLOCK)[::-1])


def test_the_bytes_of_this_stage_change_only_with_its_version(tmp_path: Path) -> None:
    # Change GOLDEN only together with the version of stage "scenes" in pipelines/plan.py.
    scl = np.full((128, 128), 4, np.uint8)
    scl[60:, :80] = 9
    items = [
        write_scene(tmp_path, "new", seed=1, scl=scl, baseline="04.00"),
        write_scene(tmp_path, "old", seed=2, x0=X0 + 320, baseline="03.01"),
    ]
    block = load([scene_in(tmp_path, i) for i in items], bounds=BLOCK)
    digest = hashlib.sha256()
    for array in (block.image, block.valid, block.scene, *cut_chips(block, 2, 64)):
        digest.update(np.ascontiguousarray(array).tobytes())
    assert (STAGES["scenes"], digest.hexdigest()[:16]) == GOLDEN


def test_files_stay_open_between_blocks_and_are_opened_anew_when_they_change(
    tmp_path: Path,
) -> None:
    scene = scene_in(tmp_path, write_scene(tmp_path, "a", seed=1), PLAIN)
    before = load([scene], PLAIN)
    with open_files(remote=False) as files:
        kept = len(files._open)
        again = load([scene], PLAIN)
        assert len(files._open) == kept > 0
    np.testing.assert_array_equal(before.image, again.image)
    write_tif(tmp_path / "a" / "red.tif", random_dn(77, (256, 256)), 10)
    after = load([scene], PLAIN)
    np.testing.assert_array_equal(after.image[:2], windows(tmp_path, "a", BLOCK))
    assert (after.image[0] != before.image[0]).any()
