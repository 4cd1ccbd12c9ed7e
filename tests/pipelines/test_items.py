"""Real items of eight vintages mean what is written in them; pixels come from where they say."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyproj
import pytest
import rasterio
from rasterio.enums import Resampling
from rasterio.transform import Affine, from_origin

from pipelines.datum import datum_change
from pipelines.imagery import load_block
from pipelines.items import scene_of_item
from pipelines.scenes import find_scenes
from pipelines.select import Rules
from schemas.sensor import AERIAL_RGB, LANDSAT_C2_L2, NAIP, SENTINEL_2_L2A, Sensor, sensor
from schemas.sources import SceneSource
from tests.pipelines.raster_fixtures import random_dn, write_tif

SOURCE = SceneSource(stac="unused", max_cloud=100)


class Vintage(NamedTuple):
    """What a real item says, read off its JSON by hand."""

    sensor: Sensor
    time: str
    cloud: float
    sun: float | None
    orbit: str
    baseline: int | None
    offset: int
    epsg: int
    corner: tuple[float, float]
    red: str
    mask: str


VINTAGES = {
    "landsat8_planetary_computer": Vintage(
        LANDSAT_C2_L2, "2020-01-14T17:05:46.732651+00:00", 8.18, 22.57988462, "landsat_8 028",
        None, 0, 32615, (173085.0, 4904715.0), "red", "qa_pixel",
    ),
    "landsat8_usgs_antarctica_epsg3031": Vintage(
        LANDSAT_C2_L2, "2020-01-01T00:00:00+00:00", 0.0, 22.72192082, "landsat_8 81",
        None, 0, 3031, (857085.0, -127485.0), "SR_B4.TIF", "QA_PIXEL.TIF",
    ),
    "s2_antimeridian_baseline0509_T01WCP_a": Vintage(
        SENTINEL_2_L2A, "2023-06-25T23:46:21.024000+00:00", 15.047897, 47.1050263487453,
        "sentinel-2a 73", 509, -1000, 32601, (300000.0, 7400040.0), "red", "scl",
    ),
    "s2_antimeridian_baseline0509_T01WCP_b": Vintage(
        SENTINEL_2_L2A, "2023-06-25T23:46:21.024000+00:00", 15.047897, None,
        "sentinel-2a 73", 509, -1000, 32601, (300000.0, 7400040.0), "red", "scl",
    ),
    "s2_earthsearch_v0_beta1_T28QCH": Vintage(
        SENTINEL_2_L2A, "2020-07-14T11:55:52+00:00", 2.36, None, "sentinel-2a",
        214, 0, 32628, (300000.0, 2300040.0), "B04", "SCL",
    ),
    "s2_planetary_computer_T06VVN": Vintage(
        SENTINEL_2_L2A, "2019-06-29T21:25:29.024000+00:00", 0.314306, 52.0871194575839,
        "sentinel-2b 43", 212, 0, 32606, (399960.0, 6800040.0), "B04", "SCL",
    ),
    "s2_stac110_projcode_baseline0211_T10SDG": Vintage(
        SENTINEL_2_L2A, "2018-12-31T19:04:06.567000+00:00", 2.779036, 27.099070943431997,
        "sentinel-2a", 211, 0, 32610, (399960.0, 4200000.0), "red", "scl",
    ),
    "s2_stac110_projcode_baseline0400_T34LBP": Vintage(
        SENTINEL_2_L2A, "2022-04-01T09:03:19.283000+00:00", 92.696983, 59.757571576334996,
        "sentinel-2a", 400, -1000, 32734, (199980.0, 8900020.0), "red", "scl",
    ),
}  # fmt: skip


@pytest.fixture(params=sorted(VINTAGES))
def vintage(request: pytest.FixtureRequest, shared: Path) -> tuple[dict[str, Any], Vintage]:
    """A real item, and what is expected of it."""
    file = shared / "data" / "stac" / f"{request.param}.json"
    return json.loads(file.read_text()), VINTAGES[request.param]


def test_a_real_item_means_what_it_says(vintage: tuple[dict[str, Any], Vintage]) -> None:
    item, v = vintage
    scene = scene_of_item(
        item, v.sensor, SOURCE, "https://a.org/b/c.json", {"license": "proprietary"}
    )
    assert scene.problem is None
    assert scene.datetime == datetime.fromisoformat(v.time)
    assert (scene.cloud_cover, scene.orbit, scene.baseline) == (v.cloud, v.orbit, v.baseline)
    assert scene.sun_elevation == (None if v.sun is None else pytest.approx(v.sun))
    assert scene.offset == v.offset
    red = scene.bands[3]
    assert v.sensor.bands[3].name == "red"
    assert red.epsg == v.epsg
    assert red.transform
    assert (red.transform[2], red.transform[5]) == v.corner
    href = str(item["assets"][v.red]["href"])
    assert red.href.endswith(href.removeprefix("./"))
    assert scene.mask
    assert scene.mask.href.endswith(str(item["assets"][v.mask]["href"]).removeprefix("./"))


def test_pixels_of_a_real_item_come_from_its_own_grid(
    vintage: tuple[dict[str, Any], Vintage], tmp_path: Path
) -> None:
    item, v = vintage
    if v.epsg == 3031:
        pytest.skip("beyond 80 degrees south, where there are no chips")
    names = ("red", "swir16")
    part = sensor(v.sensor.name, names)
    raw = {}
    gsd_m = 30.0 if v.sensor is LANDSAT_C2_L2 else 20.0
    x0, y0 = v.corner[0] + 150 * gsd_m, v.corner[1] - 200 * gsd_m
    for n, band in enumerate(part.bands):
        key = next(k for k in band.asset.split("|") if k in item["assets"])
        path = tmp_path / f"{n}.tif"
        low = 1100 if v.offset else 100
        raw[band.name] = repoint(item, key, path, x0, y0, 40 * gsd_m, random_dn(n, (80, 80), low))
    clear = np.full((80, 80), 21824 if v.sensor is LANDSAT_C2_L2 else 4, np.uint16)
    repoint(item, v.mask, tmp_path / "mask.tif", x0, y0, 40 * gsd_m, clear)
    scene = scene_of_item(item, part, SOURCE, str(tmp_path / "c.json"), {})
    assert scene.problem is None
    bounds = (x0, y0 - 40 * gsd_m, x0 + 40 * gsd_m, y0)
    block = load_block([scene], part, v.epsg, bounds, gsd_m, Rules(resampling="nearest"))
    assert block.valid.all()
    assert block.counts == {}
    for n, name in enumerate(names):
        pixels = raw[name]
        if len(pixels) == 80:
            # 10 m onto 20 m: GDAL's nearest takes one of the four that meet at the centre.
            corners = np.stack([pixels[i::2, k::2] for i in (0, 1) for k in (0, 1)])
            assert (corners + v.offset == block.image[n]).any(axis=0).all()
        else:
            np.testing.assert_array_equal(block.image[n], pixels + v.offset)


def repoint(
    item: dict[str, Any], key: str, path: Path, x0: float, y0: float, side_m: float, dn: Any
) -> Any:
    """Point an asset at a sparse file on the grid it states, filled in one square with `dn`."""
    asset = item["assets"][key]
    grid = asset if "proj:transform" in asset else item["properties"]
    t, (rows, cols) = Affine(*grid["proj:transform"][:6]), grid["proj:shape"]
    side, row, col = round(side_m / t.a), round((t.f - y0) / t.a), round((x0 - t.c) / t.a)
    pixels = dn[:side, :side]
    properties = item["properties"]
    epsg = properties.get("proj:epsg") or properties["proj:code"].removeprefix("EPSG:")
    with rasterio.open(
        path, "w", driver="GTiff", width=cols, height=rows, count=1, dtype="uint16", nodata=0,
        crs=f"EPSG:{epsg}", transform=t, tiled=True, compress="deflate", sparse_ok=True,
    ) as file:  # fmt: skip
        file.write(pixels, 1, window=rasterio.windows.Window(col, row, side, side))
    asset["href"] = str(path)
    return pixels.astype(int)


FORMS: dict[str, Any] = {
    "on the item": lambda e, t, s: ({"proj:epsg": e, "proj:transform": t, "proj:shape": s}, {}),
    "code": lambda e, t, s: ({"proj:code": f"EPSG:{e}"}, {"proj:transform": t, "proj:shape": s}),
    "on the asset": lambda e, t, s: (
        {"proj:epsg": None}, {"proj:epsg": e, "proj:transform": [*t, 0, 0, 1], "proj:shape": s}
    ),
    "asset against item": lambda e, t, s: (
        {"proj:epsg": 3857}, {"proj:code": f"EPSG:{e}", "proj:transform": t, "proj:shape": s}
    ),
    "wkt": lambda e, t, s: (
        {"proj:wkt2": pyproj.CRS.from_epsg(e).to_wkt()}, {"proj:transform": t, "proj:shape": s}
    ),
    "shape of the asset, transform of the item": lambda e, t, s: (
        {"proj:epsg": e, "proj:transform": [60, 0, t[2], 0, -60, t[5]]}, {"proj:shape": s}
    ),
    "only in the file": lambda e, t, s: ({}, {}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_grid_is_the_same_wherever_it_is_stated(tmp_path: Path, form: str) -> None:
    write_tif(tmp_path / "a.tif", random_dn(1, (3, 128, 128)).astype(np.uint8), 10, nodata=None)
    grid = [10.0, 0.0, 600_000, 0.0, -10.0, 5_300_000]
    properties, asset = FORMS[form](32632, grid, [128, 128])
    item = {
        "id": "a", "properties": {"datetime": "2024-06-01T10:00:00Z", **properties},
        "assets": {"image": {"href": "./a.tif", **asset}},
    }  # fmt: skip
    scene = scene_of_item(item, AERIAL_RGB, SOURCE, str(tmp_path / "i.json"), {})
    assert scene.problem is None
    band = scene.bands[2]
    assert (band.epsg, band.transform, band.shape) == (32632, tuple(grid), (128, 128))
    # An item without geometry lies where its grid does.
    assert scene.footprint.bounds == pytest.approx((10.336, 47.833, 10.354, 47.845), abs=0.002)


def test_real_naip_is_moved_by_a_null_transformation_whose_accuracy_is_recorded(
    shared: Path,
) -> None:
    for name, epsg, gsd_m in [
        ("m_3211605_ne_11_060_20200415", 26911, 0.6),
        ("m_4112001_sw_10_060_20220716", 26910, 22.0),
    ]:
        path = shared / "data" / "naip" / f"{name}.tif"
        source = SceneSource(rasters=(str(path),))
        (scene,), _ = find_scenes(source, (-125.0, 30.0, -110.0, 45.0), NAIP)
        with rasterio.open(path) as file:
            x, y = file.transform @ (20, 20)
            pixels, transform = file.read(), file.transform
        utm = 32600 + epsg % 100
        x0, y0 = np.floor(x / gsd_m) * gsd_m, np.floor(y / gsd_m) * gsd_m
        bounds = (x0, y0 - 96 * gsd_m, x0 + 96 * gsd_m, y0)
        block = load_block([scene], NAIP, utm, bounds, gsd_m)
        assert block.counts == {"scene_datum_changed": 1}
        assert "NAD83 to WGS 84 (1)" in str(block.considered[0]["reason"])
        assert "(4 m)" in str(block.considered[0]["reason"])
        # The transformation is null, as PROJ's definition of it says too.
        there = pyproj.Transformer.from_crs(epsg, utm, always_xy=True)
        assert there.transform(x0, y0) == pytest.approx((x0, y0), abs=0.001)
        expected = np.zeros_like(block.image)
        rasterio.warp.reproject(
            pixels, expected, src_crs=f"EPSG:{utm}", src_transform=transform,
            dst_crs=f"EPSG:{utm}", dst_transform=from_origin(x0, y0, gsd_m, gsd_m),
            resampling=Resampling.bilinear,
        )  # fmt: skip
        assert np.abs(block.image.astype(int) - expected).max() <= 1


def test_another_datum_is_changed_as_pyproj_does_it(tmp_path: Path) -> None:
    # British National Grid: 100 m from WGS 84; a picture whose values are its columns.
    ramp = np.broadcast_to(np.arange(1, 241, dtype=np.uint16) * 100, (240, 240)).copy()
    path = write_tif(tmp_path / "os.tif", ramp, 10, x0=530_000, y0=181_000, epsg=27700)
    grey = Sensor.model_validate(
        {"name": "g", "dtype": "uint16", "bands": [{"name": "g", "asset": "x"}]}
    )
    source = SceneSource(rasters=(str(path),))
    (scene,), _ = find_scenes(source, (-1.0, 51.0, 1.0, 52.0), grey)
    bounds = (699_600.0, 5_708_600.0, 700_560.0, 5_709_560.0)
    block = load_block([scene], grey, 32630, bounds, 10.0)
    assert block.valid.mean() > 0.9
    change = datum_change(27700, 32630, bounds)
    assert change
    assert change.accuracy_m
    assert 1 <= change.accuracy_m <= 3
    assert change.text in str(block.considered[0]["reason"])
    rows, cols = np.mgrid[:96, :96] + 0.5
    back = pyproj.Transformer.from_crs(32630, 27700, always_xy=True)
    east, _ = back.transform(bounds[0] + 10 * cols, bounds[3] - 10 * rows)
    column = (east - 530_000) / 10 - 0.5
    off = np.abs(block.image[0] / 100.0 - 1 - column)[block.valid]
    assert np.quantile(off, 0.99) < 0.13
    assert datum_change(32633, 32632, bounds) is None
    assert datum_change(3031, 32718, bounds) is None
