"""Which scenes a block gets, in which order, and that every one says why."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.composite import Layers, median
from pipelines.files import Asset
from pipelines.footprints import coverage
from pipelines.imagery import BlockImage, load_block
from pipelines.items import Problem, Scene, scene_of_item
from pipelines.scenes import find_scenes
from pipelines.select import Rules, SceneIndex, choose, mark_duplicates, passes
from schemas.findings import FINDINGS
from schemas.grid import Bounds
from schemas.sensor import Band, Sensor
from schemas.sources import SceneSource
from tests.pipelines.raster_fixtures import (
    EPSG,
    PLAIN,
    X0,
    Y0,
    random_dn,
    write_catalog,
    write_scene,
    write_tif,
)  # fmt: skip

BLOCK: Bounds = (X0 + 640, Y0 - 1920, X0 + 1920, Y0 - 640)
SOURCE = SceneSource(stac="unused", max_cloud=100)
SMALL = PLAIN.model_copy(update={"bands": PLAIN.bands[:2]})


def scl(cloud: NDArray[np.bool_] | float, nodata: float = 0.0) -> NDArray[np.uint8]:
    """A mask of a scene whose block is clouded from the north to a share, and empty in the east."""
    mask = np.full((128, 128), 4, np.uint8)
    mask[: 32 + round(64 * float(cloud))] = 9
    mask[:, 96 - round(64 * nodata) :] = 0
    return mask


def scene_in(folder: Path, name: str, **fields: Any) -> Scene:
    item = write_scene(folder, name, **fields)
    made = scene_of_item(item, SMALL, SOURCE, str(folder / name / "item.json"), {})
    assert made.problem is None, made.problem
    return made


def load(scenes: list[Scene], rules: Rules = Rules(), **fields: Any) -> BlockImage:  # noqa: B008
    return load_block(scenes, fields.pop("sensor", SMALL), EPSG, BLOCK, 10.0, rules, **fields)


def bare(name: str, time: str = "2024-06-01T10:00:00", **fields: Any) -> Scene:
    """A scene without files, on the grid of tile 32TNT."""
    asset = Asset(f"/{name}.tif", 1, EPSG, (10.0, 0.0, X0, 0.0, -10.0, Y0), (256, 256))
    scene = Scene(
        name, datetime.fromisoformat(time).replace(tzinfo=UTC), 5.0, "", (asset,), None, 0, "",
        shapely.box(10.33, 47.81, 10.40, 47.87), name,
    )  # fmt: skip
    return replace(scene, **fields)


def test_scenes_are_ranked_by_cloud_over_the_block_not_over_the_tile(tmp_path: Path) -> None:
    hazy = scene_in(tmp_path, "hazy", seed=1, cloud=90.0, scl=scl(0.0))
    clear = scene_in(tmp_path, "clear", seed=2, cloud=1.0, scl=scl(0.5))
    half = scene_in(tmp_path, "half", seed=3, cloud=95.0, scl=scl(0.0, nodata=0.5))
    planned = choose(SceneIndex.of([half, hazy, clear]), EPSG, BLOCK, SOURCE).scenes
    assert [s.id for s in planned] == ["clear", "hazy", "half"]
    block = load(list(planned))
    by_scene = {c["scene"]: c for c in block.considered}
    assert [by_scene[n]["rank"] for n in ("hazy", "half", "clear")] == [0, 1, 2]
    assert by_scene["clear"]["cloud"] == pytest.approx(0.5, abs=0.01)
    assert by_scene["half"]["coverage"] == pytest.approx(0.5, abs=0.01)
    assert block.scenes == ["hazy"]
    assert by_scene["hazy"] == {
        "scene": "hazy", "chosen": True, "rank": 0, "cloud": 0.0, "coverage": 1.0,
        "reason": "gave pixels",
    }  # fmt: skip
    assert by_scene["half"]["reason"] == "nothing was missing that it could give"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.1, 3), st.booleans()),
            max_size=3,
        ),
        max_size=8,
    ),
    st.sampled_from([9.0, 179.95, -179.95]),
)
def test_the_share_covered_is_that_of_one_footprint_at_a_time(
    scenes: list[list[tuple[float, float, float, bool]]], lon: float
) -> None:
    block = shapely.box(lon - 0.2, 46.8, lon + 0.2, 47.2)
    footprints, expected = [], []
    for parts in scenes:
        turned = 360.0 if lon < 0 else -360.0
        boxes = [
            shapely.box(lon + x + turned * t, 47 + y, lon + x + w + turned * t, 47 + y + w)
            for x, y, w, t in parts
        ]
        footprints.append(shapely.MultiPolygon(boxes) if len(boxes) != 1 else boxes[0])
        there = [shapely.transform(b, lambda xy, t=t: xy + np.array([t, 0.0])) for b in boxes
                 for t in (-360, 0, 360)]  # fmt: skip
        expected.append(shapely.union_all(there).intersection(block).area / block.area)
    found = coverage(np.array(footprints, object), block)
    np.testing.assert_allclose(found, np.array(expected), atol=1e-9)


def test_limits_over_the_block_leave_scenes_out_by_name(tmp_path: Path) -> None:
    scenes = [
        scene_in(tmp_path, "good", seed=1, scl=scl(0.1)),
        scene_in(tmp_path, "cloudy", seed=2, scl=scl(0.3)),
        scene_in(tmp_path, "part", seed=3, scl=scl(0.0, nodata=0.75)),
    ]
    block = load(scenes, Rules(max_block_cloud=20.0, min_coverage=0.5))
    assert block.scenes == ["good"]
    assert block.counts == {"scene_too_cloudy_here": 1, "scene_covers_too_little": 1}
    reasons = [c["reason"] for c in block.considered]
    assert reasons[1] == "masked over 29.7% of its pixels here > 20 %"
    assert reasons[2] == "has data in 25.0% of the block < 50.0%"
    nothing = load(scenes[1:], Rules(max_block_cloud=20.0, min_coverage=0.5))
    assert nothing.counts["block_without_scene"] == 1
    assert not nothing.valid.any()


def test_a_footprint_that_lies_is_found(tmp_path: Path) -> None:
    liar = scene_in(tmp_path, "liar", seed=1, scl=scl(0.0, nodata=1.0))
    good = scene_in(tmp_path, "good", seed=2)
    block = load([liar, good])
    assert (block.scenes, block.counts) == (["good"], {"scene_footprint_wrong": 1})
    assert "though its footprint covers 100% of it" in str(block.considered[0]["reason"])
    # Without a mask the image tells.
    unmasked = SMALL.model_copy(update={"mask": None})
    for band in ("red", "nir"):
        write_tif(tmp_path / "liar" / f"{band}.tif", np.zeros((256, 256), np.uint16), 10)
    liar = replace(liar, mask=None)
    assert load([liar], sensor=unmasked).counts["scene_footprint_wrong"] == 1


def test_a_file_at_another_place_than_its_item_says_is_left_out(tmp_path: Path) -> None:
    moved = scene_in(tmp_path, "moved", seed=1)
    zone = scene_in(tmp_path, "zone", seed=2)
    good = scene_in(tmp_path, "good", seed=3)
    write_tif(tmp_path / "moved" / "nir.tif", random_dn(1, (256, 256)), 10, x0=X0 + 500)
    write_tif(tmp_path / "zone" / "nir.tif", random_dn(1, (256, 256)), 10, epsg=32633)
    block = load([moved, zone, good])
    assert (block.scenes, block.counts) == (["good"], {"scene_place_wrong": 2})
    assert "its item says" in str(block.considered[0]["reason"])


@pytest.mark.parametrize("fault", ["crs", "axes"])
def test_an_item_whose_geometry_and_grid_are_apart_is_rejected(tmp_path: Path, fault: str) -> None:
    items = [write_scene(tmp_path, n, seed=i) for i, n in enumerate(("bad", "good"))]
    if fault == "crs":
        items[0]["properties"]["proj:code"] = "EPSG:32633"
    else:
        ring = items[0]["geometry"]["coordinates"][0]
        items[0]["geometry"]["coordinates"] = [[p[::-1] for p in ring]]
    region = (5.0, 5.0, 60.0, 60.0)
    source = SceneSource(stac=str(write_catalog(tmp_path, items)))
    scenes, skipped = find_scenes(source, region, SMALL)
    assert skipped == {"scene_place_wrong": 1}
    problem = next(s.problem for s in scenes if s.problem)
    assert "wrong CRS, or latitude and longitude exchanged" in problem.text


def test_constant_areas_that_are_not_the_stated_nodata_are_found(tmp_path: Path) -> None:
    scene = scene_in(tmp_path, "a", seed=1)
    for n, band in enumerate(("red", "nir")):
        dn = random_dn(n, (256, 256))
        dn[:, 100:150] = 65535
        write_tif(tmp_path / "a" / f"{band}.tif", dn, 10)
    assert load([scene]).counts == {"scene_nodata_wrong": 1}


def test_the_same_acquisition_under_two_ids_is_used_once(tmp_path: Path) -> None:
    old = bare("S2A_1_L2A", baseline=300)
    new = bare("S2A_0_L2A", "2024-06-01T10:04:10", baseline=510)
    other = bare("S2B", "2024-06-01T10:04:10", orbit="sentinel-2b")
    later = bare("later", "2024-06-04T10:00:00")
    part = bare("part", footprint=shapely.box(10.33, 47.81, 10.35, 47.87))
    old, new = replace(old, orbit="sentinel-2a 8"), replace(new, orbit="sentinel-2a")
    for order in ([old, new, other, later, part], [part, later, new, other, old]):
        marked = {s.id: s.problem for s in mark_duplicates(order)}
        assert [n for n, p in marked.items() if p] == ["S2A_1_L2A"]
        problem = marked["S2A_1_L2A"]
        assert problem == ("scene_duplicate", "is the same acquisition as S2A_0_L2A")
    # In a catalog: the same bytes under a second id.
    items = [write_scene(tmp_path, n, seed=1) for n in ("first", "second")]
    source = SceneSource(stac=str(write_catalog(tmp_path, items)))
    _, skipped = find_scenes(source, (10.3, 47.8, 10.4, 47.86), SMALL)
    assert skipped == {"scene_duplicate": 1}


def test_low_sun_is_a_reason(tmp_path: Path) -> None:
    items = [
        write_scene(tmp_path, "low", time="2024-06-01T10:00:00Z", **{"view:sun_elevation": 11.5}),
        write_scene(
            tmp_path, "zenith", time="2024-06-02T10:00:00Z", **{"s2:mean_solar_zenith": 70.0}
        ),
        write_scene(tmp_path, "high", time="2024-06-03T10:00:00Z", **{"view:sun_elevation": 55.0}),
        write_scene(tmp_path, "unknown", time="2024-06-04T10:00:00Z"),
    ]
    source = SceneSource(stac=str(write_catalog(tmp_path, items)), min_sun_elevation=25.0)
    scenes, skipped = find_scenes(source, (10.3, 47.8, 10.4, 47.86), SMALL)
    assert skipped == {"scene_low_sun": 2}
    assert sorted(s.id for s in scenes if not s.problem) == ["high", "unknown"]


def test_a_plan_tries_so_many_scenes_and_names_the_rest() -> None:
    scenes = [bare(f"s{n}", cloud_cover=float(n)) for n in range(5)]
    broken = bare("bad", problem=Problem("scene_low_sun", "sun too low"))
    source = SceneSource(stac="unused", max_scenes=2, min_coverage=0.9)
    part = bare("part", footprint=shapely.box(10.33, 47.81, 10.36, 47.87))
    far = bare("far", footprint=shapely.box(12, 47, 13, 48))
    found = choose(SceneIndex.of([*scenes, broken, part, far]), EPSG, BLOCK, source)
    assert [s.id for s in found.scenes] == ["s0", "s1"]
    reasons = {c.scene.id: c.reason for c in found.choices if not c.chosen}
    assert sorted(reasons) == ["bad", "part", "s2", "s3", "s4"]
    assert reasons["s3"].endswith("; beyond the 2 scenes tried")
    assert reasons["part"].endswith("of the block < 90%")
    assert found.elsewhere == 1


def test_a_scene_is_found_from_both_sides_of_the_antimeridian() -> None:
    far = bare("a", footprint=shapely.box(179.0, -17.0, 182.0, -15.0))
    index = SceneIndex.of([far])
    for epsg, x in ((32760, 820_000), (32701, 180_000)):
        bounds = (x, 8_200_000, x + 2560, 8_202_560)
        assert choose(index, epsg, bounds, SOURCE).scenes == (far,), epsg


def test_a_pass_is_a_local_day_of_one_platform_and_orbit() -> None:
    times = {
        # Fiji, 180 degrees east: local noon is midnight UTC, in the middle of a pass.
        "a1": "2024-06-01T23:59:50", "a2": "2024-06-02T00:00:10",
        "b": "2024-06-02T23:59:50",
    }  # fmt: skip
    scenes = [bare(n, t, orbit="sentinel-2a 1") for n, t in times.items()]
    scenes.append(bare("other", times["a1"], orbit="sentinel-2b 44"))
    assert passes(scenes, 180.0) == [[0, 1], [2], [3]]
    assert passes(scenes, -180.0) == [[0, 1], [2], [3]]
    assert passes([replace(s, datetime=None, orbit="") for s in scenes], 0.0) == [[0, 1, 2, 3]]


def test_a_date_takes_the_scenes_of_one_day_clearest_first(tmp_path: Path) -> None:
    days = {"2024-06-01": 0.5, "2024-06-06": 0.0, "2024-06-11": 0.25}
    scenes = [
        scene_in(tmp_path, day, seed=n, time=f"{day}T10:00:00Z", scl=scl(cloud))
        for n, (day, cloud) in enumerate(days.items())
    ]
    rules = Rules(dates=3)
    blocks = [load(scenes, rules, date=d) for d in range(4)]
    assert [b.scenes for b in blocks] == [["2024-06-06"], ["2024-06-11"], ["2024-06-01"], []]
    assert [round(float(b.valid.mean()), 2) for b in blocks] == [1.0, 0.75, 0.5, 0.0]
    assert blocks[1].considered[0]["reason"] == "is of date 2 of the block"
    assert blocks[3].counts == {"block_without_scene": 1}


ONE = Sensor(name="one", dtype="uint16", bands=(Band(name="a", asset="a"), SMALL.bands[0]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_the_median_is_that_of_the_valid_pixels(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 65535, (n, 2, 8, 12), dtype=np.uint16)
    images[rng.random((n, 2, 8, 12)) < 0.1] = 0
    clouds = rng.random((n, 8, 12)) < 0.4
    made = median(ONE, (8, 12), n, lambda rows: [
        (images[k][:, rows].copy(), clouds[k][rows]) for k in range(n)
    ])  # fmt: skip
    for y in range(8):
        for x in range(12):
            pixels = images[:, :, y, x].astype(int)
            data = (pixels > 0).any(axis=1)
            good = (pixels > 0).all(axis=1) & ~clouds[:, y, x]
            assert made.valid[y, x] == good.any()
            if good.any():
                expected = np.floor(np.median(pixels[good], axis=0) + 0.5)
                assert made.rank[y, x] == good.argmax()
            else:
                first = data.argmax()
                expected = pixels[first] if data.any() else np.zeros(2)
                assert made.rank[y, x] == (first if data.any() else -1)
            assert made.image[:, y, x].tolist() == expected.tolist()


def test_the_median_in_strips_is_the_median(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [scene_in(tmp_path, f"s{n}", seed=n, scl=scl(n / 4)) for n in range(3)]
    rules = Rules(composite="median")
    whole = load(scenes, rules)
    monkeypatch.setattr("pipelines.composite._MEDIAN_BYTES", 30 * 128 * 12)
    strips = load(scenes, rules)
    np.testing.assert_array_equal(whole.image, strips.image)
    np.testing.assert_array_equal(whole.scene, strips.scene)
    assert whole.considered == strips.considered
    assert whole.scenes == ["s0"]
    raw = np.stack([load([s], Rules()).image for s in scenes])
    assert (whole.image[:, 100] == np.median(raw[:, :, 100], axis=0)).all()


def test_a_scene_that_turns_out_broken_is_no_part_of_the_median(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [scene_in(tmp_path, f"s{n}", seed=n) for n in range(3)]
    expected = load(scenes[:2], Rules(composite="median"))
    path = tmp_path / "s2" / "nir.tif"
    data = bytearray(path.read_bytes())
    data[-20_000:] = bytes(20_000)
    path.write_bytes(bytes(data))
    monkeypatch.setattr("pipelines.composite._MEDIAN_BYTES", 30 * 128 * 12)
    block = load(scenes, Rules(composite="median"))
    np.testing.assert_array_equal(block.image, expected.image)
    assert block.counts == {"scene_unreadable": 1}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_patch_comes_from_the_scene_that_is_clearest_in_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 9000, (4, 2, 8, 12), dtype=np.uint16)
    images[:, :, rng.random((8, 12)) < 0.1] = 0
    images[1, :, :4, :4] = 0
    clouds = rng.random((4, 8, 12)) < rng.choice([0.1, 0.5], (4, 1, 1))
    layers = Layers(ONE, (8, 12), 4)
    for k in range(4):
        if layers.wants(clouds[k]):
            layers.add(k, images[k].copy(), clouds[k])
    made = layers.result()
    for y in (0, 4):
        for x in (0, 4, 8):
            part = np.s_[y : y + 4, x : x + 4]
            data = [(images[k, :, *part] > 0).all(axis=0) for k in range(4)]
            seen = [(data[k] & ~clouds[k][part]).sum() if data[k].any() else -1 for k in range(4)]
            best = int(np.argmax(seen))
            if seen[best] < 0:
                assert (made.rank[part] == -1).all()
                continue
            np.testing.assert_array_equal(made.image[:, *part], images[best, :, *part])
            np.testing.assert_array_equal(made.valid[part], data[best] & ~clouds[best][part])
            np.testing.assert_array_equal(made.rank[part], np.where(data[best], best, -1))


def test_best_patch_through_files(tmp_path: Path) -> None:
    north = scene_in(tmp_path, "north", seed=1, scl=scl(0.5))
    clear = np.full((128, 128), 4, np.uint8)
    clear[63:] = 8
    south = scene_in(tmp_path, "south", seed=2, scl=clear)
    block = load([north, south], Rules(composite="best-patch"), patch=16)
    rows = np.flatnonzero((block.scene == block.scenes.index("north")).all(axis=1))
    assert (rows[0], rows[-1]) == (64, 127)
    assert block.valid[:62].all()
    assert block.valid[64:].all()


def test_every_code_of_a_scene_is_in_the_ledger() -> None:
    for code in (
        "scene_place_wrong", "scene_footprint_wrong", "scene_nodata_wrong", "scene_no_offset",
        "scene_double_offset", "scene_too_cloudy_here", "scene_covers_too_little",
        "scene_datum_changed", "scene_duplicate", "scene_low_sun",
    ):  # fmt: skip
        assert FINDINGS[code].scope == "scene"
