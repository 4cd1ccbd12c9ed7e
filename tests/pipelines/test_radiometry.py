"""The radiometric offset is taken off exactly once, whoever served the scene; a lie is seen."""

import json
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray

from pipelines.imagery import load_block
from pipelines.items import scene_of_item
from pipelines.radiometry import image_findings, item_offset, offset_contradiction
from pipelines.world import World, make_world
from schemas.sensor import NAIP, SENTINEL_2_L2A
from schemas.sources import SceneSource

RASTER = [{"raster:bands": [{"scale": 0.0001, "offset": -0.1}]}]
ASSET = [{"raster:scale": 0.0001, "raster:offset": -0.1, "bands": [{"name": "B02"}]}]
ZERO = [{"raster:bands": [{"scale": 0.0001, "offset": 0}]}]
NONE: list[dict[str, Any]] = [{}]

CASES = {
    "Earth Search v0, old": ({"sentinel:boa_offset_applied": False}, "03.01", NONE, "", 0),
    "Earth Search v0, harmonised": ({"sentinel:boa_offset_applied": True}, "04.00", NONE, "", 0),
    "Earth Search v0, not": ({"sentinel:boa_offset_applied": False}, "04.00", NONE, "", -1000),
    "Earth Search v1, harmonised": (
        {"earthsearch:boa_offset_applied": True}, "05.11", RASTER, "sentinel-2-l2a", 0
    ),
    "Earth Search v1, not": (
        {"earthsearch:boa_offset_applied": False}, "05.00", RASTER, "sentinel-2-l2a", -1000
    ),
    "Earth Search Collection 1": ({}, "05.00", RASTER, "sentinel-2-c1-l2a", -1000),
    "Earth Search Collection 1, of 2018": ({}, "05.00", RASTER, "sentinel-2-c1-l2a", -1000),
    "Planetary Computer, old": ({}, "02.12", NONE, "sentinel-2-l2a", 0),
    "Planetary Computer, new": ({}, "05.10", NONE, "sentinel-2-l2a", -1000),
    "Copernicus Data Space": ({}, "05.11", ASSET, "sentinel-2-l2a", -1000),
    "Copernicus Data Space, old": ({}, "02.14", ZERO, "sentinel-2-l2a", 0),
    "harmonised by the assets": ({}, "05.11", ZERO, "", 0),
    "harmonised by the collection's name": ({}, "05.11", NONE, "S2_SR_HARMONIZED", 0),
    "stated by the assets alone": ({}, None, RASTER, "", -1000),
    "unknown": ({}, None, NONE, "", None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_catalogs_offset(case: str) -> None:
    properties, baseline, assets, collection, expected = CASES[case]
    if baseline:
        properties = {**properties, "s2:processing_baseline": baseline}
    item = {"id": "x", "collection": collection, "properties": properties}
    assert item_offset(SENTINEL_2_L2A, item, assets).dn == expected


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), size_km=2.0, aerial_km=0.2)


class Render(dict[str, Any]):
    """An item of the world, its digital numbers on the 10 m grid, and where they are clear."""

    dn: NDArray[np.uint16]
    clear: NDArray[np.bool_]


@pytest.fixture(scope="module")
def renders(world: World) -> list[Render]:
    made = []
    for path in sorted(world.s2_catalog.parent.rglob("S2*.json")):
        render = Render(json.loads(path.read_text()))
        bands = []
        for name in [*(b.name for b in SENTINEL_2_L2A.bands), "scl"]:
            asset = render["assets"][name]
            asset["href"] = str(path.parent / asset["href"])
            with rasterio.open(asset["href"]) as file:
                bands.append(file.read(1))
        side = max(len(b) for b in bands)
        bands = [b.repeat(side // len(b), 0).repeat(side // len(b), 1) for b in bands]
        assert SENTINEL_2_L2A.mask
        render.dn = np.stack(bands[:-1])
        render.clear = ~np.isin(bands[-1], SENTINEL_2_L2A.mask.invalid)
        made.append(render)
    return made


def _offset(render: Render) -> int:
    return item_offset(SENTINEL_2_L2A, render, render["assets"].values()).dn or 0


def test_clean_scenes_raise_no_alarm_and_planted_faults_do(renders: list[Render]) -> None:
    found, planted, alarms, clean = 0, 0, 0, 0
    for render in renders:
        dn = _offset(render)
        side = render.dn.shape[1] // 2
        parts = [np.s_[y : y + side, x : x + side] for y in (0, side) for x in (0, side)]
        for part in [np.s_[:, :], *parts]:
            for bands in (slice(None), [1, 2, 3], [3, 2, 1, 7]):
                image, clear = render.dn[bands][:, *part], render.clear[part]
                alarms += offset_contradiction(image, clear, dn, 0) is not None
                clean += 1
                if dn:
                    # Harmonised by its server, which does not say so: -1000 twice.
                    wrong = np.where(image > 0, np.maximum(image.astype(int) - 1000, 1), 0)
                    expected = "scene_double_offset"
                else:
                    wrong, expected = np.where(image > 0, image + 1000, 0), "scene_no_offset"
                seen = offset_contradiction(wrong.astype(np.uint16), clear, dn, 0)
                found += seen == expected
                planted += 1
    assert (alarms, clean, planted) == (0, 30, 30)
    assert found >= 29


def test_bright_places_raise_no_alarm() -> None:
    rng = np.random.default_rng(0)
    clear = np.ones((200, 200), bool)

    def place(*reflectance: float) -> NDArray[np.uint16]:
        spread = rng.normal(1, 0.08, (len(reflectance), 200, 200))
        return (np.array(reflectance)[:, None, None] * spread * 10_000).astype(np.uint16)

    desert = place(0.12, 0.16, 0.24, 0.33, 0.38, 0.45)
    snow = place(0.9, 0.9, 0.88, 0.85, 0.12, 0.1)
    forest = place(0.02, 0.03, 0.05, 0.03, 0.3, 0.15)
    water = place(0.05, 0.04, 0.03, 0.02, 0.01, 0.005)
    for image in (desert, snow, forest, water):
        assert offset_contradiction(image, clear, 0, 0) is None
        assert offset_contradiction(image + np.uint16(1000), clear, -1000, 0) is None
    for image in (forest, water):
        assert offset_contradiction(image + np.uint16(1000), clear, 0, 0) == "scene_no_offset"
        assert offset_contradiction(image, clear, -1000, 0) == "scene_double_offset"
    few = np.zeros((200, 200), bool)
    few[:10, :10] = True
    assert offset_contradiction(water, few, -1000, 0) is None


@pytest.mark.parametrize("applied", [True, False])
def test_a_lying_item_is_a_finding_of_the_block(
    world: World, renders: list[Render], applied: bool
) -> None:
    render = next(r for r in renders if (_offset(r) != 0) is applied)
    item = json.loads(json.dumps(render))
    if applied:
        # It carries +1000 but says that it was taken off.
        item["properties"]["earthsearch:boa_offset_applied"] = True
    else:
        item["properties"]["s2:processing_baseline"] = "05.00"
    source = SceneSource(stac="unused", max_cloud=100)
    x0, y0, x1, _ = world.bounds_utm
    bounds = (x0, y0, x1, y0 + (x1 - x0))
    for made, expected in ((render, {}), (item, {"scene_no_offset", "scene_double_offset"})):
        scene = scene_of_item(made, SENTINEL_2_L2A, source, "/x.json", {})
        block = load_block([scene], SENTINEL_2_L2A, world.epsg, bounds, 10.0)
        codes = {c for c in block.counts if c in ("scene_no_offset", "scene_double_offset")}
        assert codes <= set(expected)
        assert len(codes) == (1 if expected else 0)
        if codes:
            assert codes == {"scene_no_offset" if applied else "scene_double_offset"}


def test_only_sentinel_2_is_looked_at_for_offsets() -> None:
    dark = np.random.default_rng(0).integers(1, 60, (4, 100, 100)).astype(np.uint8)
    assert image_findings(NAIP, 0, dark, None) == []
