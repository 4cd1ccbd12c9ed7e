"""Scenes: found wherever they are published, same in meaning, chosen in one order."""

import json
import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
import stackstac

from pipelines.items import Scene, scene_of_item, stac_item
from pipelines.radiometry import apply_offset, item_offset
from pipelines.scenes import find_scenes
from pipelines.select import SceneIndex, choose
from schemas.errors import GeoLinkError
from schemas.sensor import AERIAL_RGB, NAIP, SENTINEL_2_L2A, Band, Sensor
from schemas.sources import SceneSource
from tests.pipelines.raster_fixtures import (
    EPSG,
    PLAIN,
    SENSOR,
    X0,
    Y0,
    random_dn,
    serve_api,
    serve_files,
    write_catalog,
    write_scene,
    write_tif,
)  # fmt: skip

REGION = (10.3, 47.8, 10.4, 47.86)
BLOCK = (X0, Y0 - 1280, X0 + 1280, Y0)


def source(**fields: Any) -> SceneSource:
    return SceneSource(**{"stac": "unused", **fields})


def found(stac: Path | str, sensor: Sensor = SENSOR, **fields: Any) -> list[Scene]:
    return find_scenes(source(stac=str(stac), **fields), REGION, sensor)[0]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalog")
    items = [
        write_scene(folder, "clear", seed=1, cloud=1.0, time="2024-06-01T10:00:00Z"),
        write_scene(folder, "hazy", seed=2, cloud=30.0, time="2024-05-01T10:00:00Z", legacy=True),
        write_scene(folder, "cloudy", seed=3, cloud=95.0, time="2024-07-01T10:00:00Z"),
        write_scene(folder, "far", seed=4, x0=X0 + 200_000, time="2024-06-01T10:00:00Z"),
    ]
    return write_catalog(folder, items)


def test_a_static_catalog_gives_the_scenes_of_the_region(catalog: Path) -> None:
    scenes, skipped = find_scenes(source(stac=str(catalog)), REGION, SENSOR)
    assert [s.id for s in scenes] == ["hazy", "clear", "cloudy"]
    assert skipped == {"scene_too_cloudy": 1}
    clear = scenes[1]
    assert clear.datetime == datetime(2024, 6, 1, 10, tzinfo=UTC)
    assert (clear.cloud_cover, clear.licence.licence, clear.offset) == (1.0, "CC-BY-4.0", -1000)
    assert [a.epsg for a in clear.bands] == [EPSG] * 3
    assert clear.bands[2].transform == (20.0, 0.0, X0, 0.0, -20.0, Y0)
    assert all(Path(a.href).is_file() for a in (*clear.bands, clear.mask) if a)


def test_the_same_catalog_over_http_gives_the_same_scenes(catalog: Path) -> None:
    local = found(catalog)
    with serve_files(catalog.parent) as address:
        remote = found(f"{address}/catalog.json")
    assert [s.id for s in remote] == [s.id for s in local]
    assert remote[0].bands[0].href == f"{address}/hazy/red.tif"


def test_an_api_is_searched_page_by_page(catalog: Path) -> None:
    items = [
        json.loads((catalog.parent / n / "item.json").read_text())
        for n in ("clear", "hazy", "cloudy", "far")
    ]
    for item in items:
        for asset in item["assets"].values():
            asset["href"] = str(catalog.parent / item["id"] / asset["href"])
    with serve_api(items, page=1) as address:
        scenes = found(address, collections=("test-l2a",))
        late = found(address, start=datetime(2024, 5, 15))
        with pytest.raises(GeoLinkError, match=r"no scene found.*collections other"):
            found(address, collections=("other",))
    assert [s.id for s in scenes] == ["hazy", "clear", "cloudy"]
    assert [s.id for s in late] == ["clear", "cloudy"]
    assert scenes[1].licence.licence == "CC-BY-4.0"
    assert [s.digest for s in scenes] == [s.digest for s in found(catalog)]


def test_a_scene_outside_the_time_range_says_so(catalog: Path) -> None:
    scenes = found(catalog, start=datetime(2024, 5, 15), end=datetime(2024, 6, 15))
    problems = {s.id: s.problem.text if s.problem else "" for s in scenes}
    assert problems["clear"] == ""
    assert "before" in problems["hazy"]
    assert "after" in problems["cloudy"]


def test_scenes_of_other_collections_are_not_considered(catalog: Path) -> None:
    with pytest.raises(GeoLinkError, match="no scene found"):
        found(catalog, collections=("landsat",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the STAC catalog"),
        ("", "is no JSON"),
        ("{not json", "is no JSON"),
        ("[]", "no STAC catalog"),
        ('{"type": "FeatureCollection", "features": []}', "no STAC catalog"),
        (
            '{"type": "Catalog", "stac_version": "1.0.0", "id": "a", "description": "",'
            ' "links": []}',
            "no scene found",
        ),
        (
            '{"type": "Catalog", "stac_version": "1.0.0", "id": "a", "description": "",'
            ' "links": [{"rel": "item", "href": "./gone.json"}]}',
            "gone.json",
        ),
    ],
)
def test_what_is_no_catalog_is_one_clear_error(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "catalog.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(GeoLinkError, match=message):
        found(path)


def test_an_unreachable_api_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.remote.FIRST_WAIT_S", 0.01)
    with pytest.raises(GeoLinkError, match=r"http://127\.0\.0\.1:9/ cannot be fetched \(no conn"):
        found("http://127.0.0.1:9/")


def test_a_scene_that_cannot_be_used_says_why_and_the_others_remain(tmp_path: Path) -> None:
    items = [write_scene(tmp_path, n, seed=i) for i, n in enumerate("abcde")]
    del items[0]["assets"]["nir"]
    del items[1]["properties"]["proj:code"]
    write_tif(tmp_path / "b" / "red.tif", random_dn(0, (256, 256)), 10, epsg=None)
    (tmp_path / "c" / "swir.tif").unlink()
    del items[3]["properties"]["s2:processing_baseline"]
    scenes, skipped = find_scenes(source(stac=str(write_catalog(tmp_path, items))), REGION, SENSOR)
    problems = {s.id: s.problem.text for s in scenes if s.problem}
    assert "no asset 'nir|B08'" in problems["a"]
    assert "no CRS" in problems["b"]
    assert "swir.tif does not exist" in problems["c"]
    assert "baseline" in problems["d"]
    assert sorted(problems) == ["a", "b", "c", "d"]
    assert skipped == {"scene_asset_missing": 2, "scene_no_crs": 1, "scene_offset_unknown": 1}


def test_no_usable_scene_at_all_is_an_error_with_a_reason(tmp_path: Path) -> None:
    item = write_scene(tmp_path, "a", cloud=99.0)
    with pytest.raises(GeoLinkError, match=r"none of 1 scenes.*scene_too_cloudy 1.*99 % > 80 %"):
        found(write_catalog(tmp_path, [item]))


def test_grids_missing_in_metadata_are_read_from_the_files(tmp_path: Path) -> None:
    item = write_scene(tmp_path, "a")
    for asset in item["assets"].values():
        del asset["proj:shape"], asset["proj:transform"]
    del item["properties"]["proj:code"]
    (scene,) = found(write_catalog(tmp_path, [item]))
    assert scene.bands[2].transform == (20.0, 0.0, X0, 0.0, -20.0, Y0)
    assert (scene.bands[2].epsg, scene.bands[2].shape) == (EPSG, (128, 128))


def test_real_items_of_every_vintage_mean_the_same(shared: Path) -> None:
    landsat = Sensor(
        name="landsat",
        bands=(
            Band(name="red", asset="red|SR_B4.TIF"),
            Band(name="blue", asset="blue|SR_B2.TIF"),
        ),
        dtype="uint16",
    )
    expected = {
        "landsat8_planetary_computer": (32615, (30.0, 0.0, 173085.0, 0.0, -30.0, 4904715.0), 0),
        "landsat8_usgs_antarctica_epsg3031": (3031, None, 0),
        "s2_antimeridian_baseline0509_T01WCP_a": (32601, (300000.0, 7400040.0), -1000),
        "s2_antimeridian_baseline0509_T01WCP_b": (32601, (300000.0, 7400040.0), -1000),
        "s2_earthsearch_v0_beta1_T28QCH": (32628, (300000.0, 2300040.0), 0),
        "s2_planetary_computer_T06VVN": (32606, (399960.0, 6800040.0), 0),
        "s2_stac110_projcode_baseline0211_T10SDG": (32610, (399960.0, 4200000.0), 0),
        "s2_stac110_projcode_baseline0400_T34LBP": (32734, (199980.0, 8900020.0), -1000),
    }
    files = sorted((shared / "data" / "stac").glob("*.json"))
    assert [f.stem for f in files] == sorted(expected)
    for file in files:
        item = json.loads(file.read_text())
        sensor = landsat if "landsat" in file.stem else SENTINEL_2_L2A
        scene = scene_of_item(item, sensor, source(max_cloud=100), "https://a.org/b/c.json", {})
        epsg, grid, offset = expected[file.stem]
        assert scene.problem is None, file.stem
        assert {a.epsg for a in scene.bands} == {epsg}
        assert scene.offset == offset
        if sensor is SENTINEL_2_L2A:
            assert scene.mask is not None
            x, y = grid
            gsd_m = [60, 10, 10, 10, 20, 20, 20, 10, 20, 60, 20, 20]
            assert [a.transform for a in scene.bands] == [(g, 0, x, 0, -g, y) for g in gsd_m]
            assert [a.shape for a in scene.bands] == [(109800 // g,) * 2 for g in gsd_m]
        elif grid:
            assert scene.bands[0].transform == grid
        assert len(pickle.dumps(scene)) < 8_000
        # stackstac takes the item: every band goes in and comes out, in the item's own CRS.
        names = tuple(b.name for b in sensor.bands)
        array = stackstac.stack(
            [stac_item(scene, dict(zip(names, scene.bands, strict=True)))],
            assets=list(names), dtype=np.dtype("uint16"), fill_value=np.uint16(0), rescale=False,
            resolution=1000,
        )  # fmt: skip
        assert tuple(array["band"].values) == names
        assert array.attrs["spec"].epsg == epsg


def test_a_scene_across_the_antimeridian_covers_both_sides(shared: Path) -> None:
    file = shared / "data" / "stac" / "s2_antimeridian_baseline0509_T01WCP_a.json"
    item = json.loads(file.read_text())
    scene = scene_of_item(item, SENTINEL_2_L2A, source(), "https://a.org/b.json", {})
    assert scene.footprint.bounds == pytest.approx((178.474, 65.672, 181.034, 66.706), abs=0.01)
    x, y = 350_000, 7_340_000
    for epsg, bounds, meets in [
        (32601, (x, y, x + 5120, y + 5120), True),
        (32660, (625_000, y, 630_120, y + 5120), True),
        (32632, (x, y, x + 5120, y + 5120), False),
    ]:
        found = choose(SceneIndex.of([scene]), epsg, bounds, source())
        assert bool(found.scenes) is meets, epsg


S2_ITEM = {"id": "S2A_32TNT_20240601_0_L2A", "properties": {}}
OFFSET = [{"raster:bands": [{"scale": 0.0001, "offset": -0.1}]}]
HARMONISED = [{"raster:bands": [{"scale": 0.0001, "offset": 0}]}]
STAC_1_1 = [{"bands": [{"raster:scale": 0.0001, "raster:offset": -0.1}]}]
UNSTATED = [{"raster:bands": [{"nodata": 0}]}, {}]


@pytest.mark.parametrize(
    ("baseline", "applied", "assets", "offset"),
    [
        ("02.12", None, UNSTATED, 0),
        ("03.01", None, HARMONISED, 0),
        ("03.01", False, HARMONISED, 0),
        ("04.00", None, UNSTATED, -1000),
        ("04.00", None, OFFSET, -1000),
        ("04.00", None, STAC_1_1, -1000),
        ("05.09", None, HARMONISED, 0),
        ("05.09", True, OFFSET, 0),
        ("05.09", True, UNSTATED, 0),
        ("05.09", False, UNSTATED, -1000),
        ("05.09", False, HARMONISED, -1000),
        ("N0510", None, UNSTATED, -1000),
        ("05.09", None, [*OFFSET, *HARMONISED], None),
        (None, None, OFFSET, -1000),
        (None, None, HARMONISED, 0),
        (None, True, OFFSET, 0),
        (None, False, UNSTATED, None),
        (None, None, UNSTATED, None),
    ],
)
def test_the_offset_is_taken_off_exactly_once(
    baseline: str | None, applied: bool | None, assets: list[dict[str, Any]], offset: int | None
) -> None:
    properties: dict[str, Any] = {}
    if baseline is not None:
        properties["s2:processing_baseline"] = baseline
    if applied is not None:
        properties["earthsearch:boa_offset_applied"] = applied
    item = {**S2_ITEM, "properties": properties}
    assert item_offset(SENTINEL_2_L2A, item, assets).dn == offset


def test_the_baseline_is_read_from_the_product_name_where_nothing_else_has_it() -> None:
    name = "S2A_MSIL2A_20200714T115221_N0214_R123_T28QCH_20200714T191310"
    old = {"id": "x", "properties": {"sentinel:product_id": name}}
    new = {"id": name.replace("N0214", "N0500"), "properties": {}}
    assert item_offset(SENTINEL_2_L2A, old, []).dn == 0
    assert item_offset(SENTINEL_2_L2A, new, []).dn == -1000
    assert item_offset(PLAIN, new, []).dn == 0


def test_the_offset_keeps_nodata_and_clips_at_one() -> None:
    image = np.array([[[0, 1, 999, 1000, 1001, 1002, 65535]]], np.uint16)
    apply_offset(image, -1000, 0)
    assert image.tolist() == [[[0, 1, 1, 1, 1, 2, 64535]]]
    apply_offset(image, 1000, 0)
    assert image.tolist() == [[[0, 1001, 1001, 1001, 1001, 1002, 65535]]]


def scene(name: str, cloud: float | None, time: str, cover: float = 1.0) -> Scene:
    block = shapely.box(9.9, 47.0, 10.9, 48.5)
    west, south, _, north = block.bounds
    # BLOCK lies in the west of 10.3448..10.3624 E.
    footprint = block if cover == 1.0 else shapely.box(west, south, 10.3533, north)
    return Scene(
        name, datetime.fromisoformat(time).replace(tzinfo=UTC), cloud, "", (), None, 0, "",
        footprint, name,
    )  # fmt: skip


def test_least_cloudy_then_coverage_then_time_then_id() -> None:
    scenes = [
        scene("g", None, "2020-01-01"),
        scene("f", 20.0, "2020-01-01"),
        scene("e", 10.0, "2020-01-01", cover=0.5),
        scene("d", 10.0, "2021-01-01"),
        scene("b", 10.0, "2020-06-01"),
        scene("c", 10.0, "2020-06-01"),
        scene("a", 0.0, "2022-01-01", cover=0.5),
    ]
    for order in (scenes, scenes[::-1]):
        choices = choose(SceneIndex.of(order), EPSG, BLOCK, source()).choices
        assert [c.scene.id for c in choices] == list("abcdefg")
    assert all(c.chosen for c in choices)
    assert "cloud cover 0 %" in choices[0].reason


def test_a_scene_beside_the_block_is_only_counted() -> None:
    far = scene("far", 0.0, "2020-01-01")
    far = Scene(**{**far.__dict__, "footprint": shapely.box(30, 47, 31, 48)})
    assert choose(SceneIndex.of([far]), EPSG, BLOCK, source()) == ([], 1)


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    items = [write_scene(tmp_path, "a")]
    before = found(write_catalog(tmp_path, items))[0].digest
    moved = tmp_path / "moved"
    assert before == found(write_catalog(moved, [write_scene(moved, "a")]))[0].digest
    write_tif(tmp_path / "a" / "red.tif", random_dn(9, (256, 256)), 10)
    assert before != found(tmp_path / "catalog.json")[0].digest


def test_a_stated_checksum_is_believed_unless_the_file_was_cut_short(tmp_path: Path) -> None:
    item = write_scene(tmp_path, "a")
    for n, asset in enumerate(item["assets"].values()):
        asset["file:checksum"] = f"1220{n:064x}"
    before = found(write_catalog(tmp_path, [item]))[0].digest
    path = tmp_path / "a" / "red.tif"
    path.write_bytes(path.read_bytes()[:-1000])
    assert before != found(tmp_path / "catalog.json")[0].digest


def test_signed_urls_name_the_same_file(catalog: Path) -> None:
    item = json.loads((catalog.parent / "clear" / "item.json").read_text())
    digests = []
    for token in ("st=1&sig=abc", "st=2&sig=def"):
        for band, asset in item["assets"].items():
            asset["href"] = f"https://a.org/{band}.tif?{token}"
        digests.append(scene_of_item(item, SENSOR, source(), "https://a.org/", {}).digest)
    assert digests[0] == digests[1]


def local(pattern: Path, sensor: Sensor = AERIAL_RGB, **fields: Any) -> list[Scene]:
    return find_scenes(SceneSource(rasters=(str(pattern),), **fields), REGION, sensor)[0]


def test_local_rasters_are_scenes(tmp_path: Path) -> None:
    rgb = random_dn(0, (3, 128, 128)).astype(np.uint8)
    write_tif(tmp_path / "b.tif", rgb, 10, nodata=None)
    path = write_tif(tmp_path / "a.tif", rgb, 10, nodata=None, driver="GTiff")
    with rasterio.open(path, "r+") as file:
        file.update_tags(TIFFTAG_DATETIME="2021:03:04 05:06:07")
    write_tif(tmp_path / "far.tif", rgb, 10, x0=X0 + 100_000)
    scenes = local(tmp_path / "*.tif")
    assert [s.id for s in scenes] == ["b", "a"]
    assert scenes[1].datetime == datetime(2021, 3, 4, 5, 6, 7, tzinfo=UTC)
    assert [a.index for a in scenes[1].bands] == [1, 2, 3]
    (choice, *_) = choose(SceneIndex.of(scenes), EPSG, BLOCK, source()).choices
    assert choice.reason.endswith("covers 100% of the block")


def test_a_picture_with_a_world_file_and_a_projection_file_is_a_scene(tmp_path: Path) -> None:
    rgb = random_dn(0, (3, 128, 128)).astype(np.uint8)
    write_tif(tmp_path / "p.png", rgb, 10, epsg=None, nodata=None, driver="PNG", worldfile="YES")
    (tmp_path / "p.png.aux.xml").unlink(missing_ok=True)
    with pytest.raises(GeoLinkError, match="no CRS with an EPSG code"):
        local(tmp_path / "*.png")
    (tmp_path / "p.prj").write_text(rasterio.CRS.from_epsg(EPSG).to_wkt())
    (scene,) = local(tmp_path / "*.png")
    assert scene.bands[0].epsg == EPSG
    assert scene.bands[0].transform == (10.0, 0.0, X0, 0.0, -10.0, Y0)


def test_a_raster_with_too_few_bands_says_so(tmp_path: Path) -> None:
    write_tif(tmp_path / "a.tif", random_dn(0, (3, 128, 128)).astype(np.uint8), 10)
    with pytest.raises(GeoLinkError, match="has 3 bands, sensor naip needs 4"):
        local(tmp_path / "a.tif", NAIP)


def test_a_glob_without_files_and_a_file_that_is_no_raster_are_errors(tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match="no raster matches"):
        local(tmp_path / "*.tif")
    (tmp_path / "a.tif").write_text("hello")
    with pytest.raises(GeoLinkError, match="scene_unreadable 1"):
        local(tmp_path / "*.tif")
