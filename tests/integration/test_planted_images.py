"""Faults of images planted in a sound world: each is found by its name, and in that world none.

The world is a town of 2 km with an aerial picture (1 m) and satellite scenes (10 m), whose content
lies 0.4 and 0.3 pixels off the map by design.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import rasterio
import yaml
from numpy.typing import NDArray
from rasterio.transform import Affine

from geolink.reader import open_dataset
from geolink.show import draw_shifts, shift_map
from pipelines.build import BuildResult, build_dataset
from pipelines.world import World
from schemas.config import DatasetConfig
from schemas.dataset import read_arrays
from schemas.findings import FINDINGS, SURE, flagged
from schemas.load import load_config
from tests.integration.conftest import WriteConfig

IMAGE_CODES = {
    code for code, f in FINDINGS.items()
    if f.scope in ("scene", "chip") and f.severity != "note"
} | {"chip_seam", "chip_nodata", "chip_osm_dense", "shard_map_unrelated"}  # fmt: skip
Plant = Callable[[NDArray[np.uint8], dict[str, Any]], NDArray[np.uint8]]


@pytest.fixture
def aerial(town: World, cache: Path, tmp_path: Path) -> Callable[..., BuildResult]:
    """Builds about a kilometre of chips of 128 m from the aerial picture with planted faults."""
    west, south, east, north = town.aerial_bounds_lonlat
    x, y = (west + east) / 2, (south + north) / 2

    def build(*plants: Plant, **changes: Any) -> BuildResult:
        paths = [
            _planted(town, tmp_path / f"{n}.tif", plant) for n, plant in enumerate(plants)
        ] or [_planted(town, tmp_path / "sound.tif", lambda image, _: image)]
        config = {
            "name": "aerial",
            "dataset": "data",
            "region": {"bbox": [x - 0.0065, y - 0.0045, x + 0.0065, y + 0.0045]},
            "grid": {"gsd_m": 1, "size": 128, "patch": 16, "shard_side": 8},
            "sensor": "aerial-rgb",
            "scenes": {"rasters": [str(p) for p in paths]},
            "osm": {"pbf": str(town.pbf)},
            "splits": {"train": 1, "val": 0, "test": 0},
            "cache": str(cache),
            **changes,
        }
        path = tmp_path / "aerial.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        result = build_dataset(load_config(path, DatasetConfig))
        assert set(result.qc) <= FINDINGS.keys()
        assert not result.failed
        return result

    return build


def _planted(town: World, path: Path, plant: Plant) -> Path:
    """The town's aerial picture as a GeoTIFF, with something done to it or its profile."""
    [source] = town.aerial_catalog.parent.rglob("image.tif")
    with rasterio.open(source) as file:
        image, profile = file.read(), dict(file.profile)
    image = plant(image, profile)
    profile |= {"driver": "GTiff", "height": image.shape[1], "width": image.shape[2]}
    with rasterio.open(path, "w", **profile) as file:
        file.write(image)
    return path


def arrays(result: BuildResult, name: str) -> NDArray[Any]:
    """An array of all shards."""
    return np.concatenate(
        [read_arrays(result.dataset, r.path, [name])[0][name] for r in result.rows if r.chips]
    )


def chips(result: BuildResult) -> int:
    return sum(r.chips for r in result.rows)


def moved(x: float, y: float) -> Plant:
    """A picture whose georeference is off by some pixels east and north."""

    def plant(image: NDArray[np.uint8], profile: dict[str, Any]) -> NDArray[np.uint8]:
        profile["transform"] = profile["transform"] @ Affine.translation(x, -y)
        return image

    return plant


def test_the_sound_world_has_next_to_no_finding(aerial: Callable[..., BuildResult]) -> None:
    result = aerial()
    found = {code: n for code, n in result.qc.items() if code in IMAGE_CODES}
    # A wide road drawn in another width looks shifted: the only false alarms, 3 % at most.
    assert found.pop("chip_shifted", 0) <= 0.03 * chips(result)
    assert found == {}
    assert chips(result) > 40
    shift = arrays(result, "shift")
    sure = shift[:, 2] >= SURE
    assert sure.mean() > 0.6
    np.testing.assert_allclose(np.median(shift[sure, :2], axis=0), (0.4, -0.3), atol=0.2)


def test_a_picture_shifted_by_3_pixels_is_found_corrected_or_dropped(
    aerial: Callable[..., BuildResult],
) -> None:
    kept = aerial(moved(3, -2))
    assert kept.qc["chip_shifted"] > 0.6 * chips(kept)
    shift = arrays(kept, "shift")
    sure = shift[:, 2] >= SURE
    np.testing.assert_allclose(np.median(shift[sure, :2], axis=0), (3.4, -2.3), atol=0.2)

    assert isinstance(kept.dataset, Path)
    with duckdb.connect(str(kept.dataset / "catalog.duckdb"), read_only=True) as con:
        found = con.execute(
            "SELECT severity, sum(count) FROM findings WHERE code = 'chip_shifted' GROUP BY ALL"
        ).fetchall()
        where = con.execute(
            "SELECT shard, chip FROM chip_findings WHERE code = 'chip_shifted' ORDER BY ALL"
        ).fetchall()
    assert found == [("warning", kept.qc["chip_shifted"])]
    flags = {r.shard: flagged(np.array(r.chip_findings, np.uint32), ["chip_shifted"])
             for r in kept.rows}  # fmt: skip
    assert where == [(s, n) for s in sorted(flags) for n in np.flatnonzero(flags[s]).tolist()]

    corrected = aerial(moved(3, -2), dataset="corrected", registration="correct")
    assert chips(corrected) == chips(kept)
    assert corrected.qc.get("chip_shifted", 0) <= 0.03 * chips(kept)
    left = arrays(corrected, "shift")
    sure = left[:, 2] >= SURE
    assert np.abs(np.median(left[sure, :2], axis=0)).max() < 0.1

    dropped = aerial(moved(3, -2), dataset="dropped", registration="drop")
    assert dropped.qc["chip_dropped_shifted"] == kept.qc["chip_shifted"]
    assert chips(dropped) == chips(kept) - kept.qc["chip_shifted"]
    assert "chip_shifted" not in dropped.qc


def test_objects_that_are_corrected_lie_where_the_sound_picture_has_them(
    aerial: Callable[..., BuildResult],
) -> None:
    sound = aerial(registration="correct")
    shifted = aerial(moved(3, -2), dataset="shifted", registration="correct")
    # The same content under the same labels, three pixels to the east and two to the south.
    a, b = (_mosaic(r, "label_pixel") for r in (sound, shifted))
    image_a, image_b = (_mosaic(r, "image") for r in (sound, shifted))
    inner, other = (slice(20, -20), slice(20, -20)), (slice(22, -18), slice(23, -17))
    assert (image_b[other] == image_a[inner]).mean() > 0.95
    assert (b[other] == a[inner]).mean() > 0.97
    assert (b[inner] == a[inner]).mean() < 0.95


def test_the_map_of_shifts_is_drawn(aerial: Callable[..., BuildResult], tmp_path: Path) -> None:
    result = aerial(moved(3, -2))
    figure = draw_shifts(open_dataset(result.dataset))
    assert "median +3." in figure.axes[0].get_title(loc="left")
    shift_map(open_dataset(result.dataset), tmp_path / "shifts.png")
    assert (tmp_path / "shifts.png").stat().st_size > 10_000


def _mosaic(result: BuildResult, name: str) -> NDArray[Any]:
    """Chips side by side, one band; 0 where there is none."""
    bounds, values = arrays(result, "bounds"), arrays(result, name)
    values = values[:, 0] if values.ndim == 4 else values
    x, y = bounds[:, 0] - bounds[:, 0].min(), bounds[:, 3].max() - bounds[:, 3]
    side = values.shape[1]
    whole = np.zeros((int(y.max()) + side, int(x.max()) + side), values.dtype)
    for chip, row, column in zip(values, y.astype(int), x.astype(int), strict=True):
        whole[row : row + side, column : column + side] = chip
    return whole


def swapped_axes(image: NDArray[np.uint8], profile: dict[str, Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(image.transpose(0, 2, 1))


def another_datum(image: NDArray[np.uint8], profile: dict[str, Any]) -> NDArray[np.uint8]:
    """Coordinates of WGS 84 said to be ones of ED50: 150 m off."""
    profile["crs"] = "EPSG:" + str(profile["crs"].to_epsg() - 32600 + 23000)
    return image


@pytest.mark.parametrize("plant", [swapped_axes, another_datum])
def test_a_picture_of_another_place_is_told_from_a_shifted_one(
    aerial: Callable[..., BuildResult], plant: Plant
) -> None:
    result = aerial(plant)
    assert result.qc["shard_map_unrelated"] >= 1
    assert result.qc.get("chip_shifted", 0) <= 0.1 * chips(result)


@pytest.mark.parametrize("value", [1, 255])
def test_a_filled_area_that_is_not_the_nodata_value_is_found(
    aerial: Callable[..., BuildResult], value: int
) -> None:
    def plant(image: NDArray[np.uint8], profile: dict[str, Any]) -> NDArray[np.uint8]:
        y, x = np.mgrid[: image.shape[1], : image.shape[2]]
        image[:, x + y < sum(image.shape[1:]) * 0.47] = value
        return image

    result = aerial(plant)
    assert 0.2 * chips(result) < result.qc["chip_constant"] < 0.7 * chips(result)
    assert "chip_nodata" not in result.qc


def test_a_seam_between_two_pictures_is_found(aerial: Callable[..., BuildResult]) -> None:
    def half(image: NDArray[np.uint8], profile: dict[str, Any]) -> NDArray[np.uint8]:
        image[:, :, image.shape[2] // 2 :] = 0
        return image

    def brighter(image: NDArray[np.uint8], profile: dict[str, Any]) -> NDArray[np.uint8]:
        return np.clip(image.astype(int) + 25, 1, 255).astype(np.uint8)

    result = aerial(half, brighter)
    seam = result.qc["chip_seam"]
    assert 5 <= seam <= 10
    same = aerial(half, lambda image, _: image, dataset="same")
    assert "chip_seam" not in same.qc


def test_an_empty_file_whose_footprint_says_that_it_covers_the_place_is_found(
    aerial: Callable[..., BuildResult], town: World, tmp_path: Path
) -> None:
    folder = tmp_path / "catalog"
    shutil.copytree(town.aerial_catalog.parent, folder)
    [path] = folder.rglob("image.tif")
    _planted(town, path, lambda image, _: np.zeros_like(image))
    catalog = folder / town.aerial_catalog.name
    _twin(town, folder)
    result = aerial(scenes={"stac": str(catalog)})
    assert result.qc["scene_footprint_wrong"] >= 1
    assert chips(result) > 40


def _twin(town: World, folder: Path) -> None:
    """Beside the only item of a catalog, the sound one of another id."""
    [item] = [p for p in folder.rglob("*.json") if json.loads(p.read_text())["type"] == "Feature"]
    text = json.loads(item.read_text())
    home = item.parent.with_name("sound")
    home.mkdir()
    [source] = town.aerial_catalog.parent.rglob("image.tif")
    shutil.copyfile(source, home / "image.tif")
    text["id"] = "sound"
    text["properties"]["datetime"] = "2021-08-27T10:30:00Z"
    (home / "sound.json").write_text(json.dumps(text))
    for parent in folder.rglob("*.json"):
        found = json.loads(parent.read_text())
        for link in list(found.get("links", [])):
            if link["rel"] == "item":
                href = link["href"].replace(item.stem, "sound")
                found["links"].append({**link, "href": href})
                parent.write_text(json.dumps(found))


def test_satellite_scenes_are_sound_and_bands_swapped_in_one_are_found(
    satellite_config: WriteConfig, town: World, tmp_path: Path
) -> None:
    grid = {"gsd_m": 10, "size": 32, "patch": 8, "shard_side": 4}
    sound = build_dataset(load_config(satellite_config("sound", grid=grid), DatasetConfig))
    assert set(sound.qc) <= FINDINGS.keys()
    found = {c: n for c, n in sound.qc.items() if c in IMAGE_CODES - {"chip_seam", "chip_nodata"}}
    assert found == {}
    folder = tmp_path / "swapped"
    shutil.copytree(town.s2_catalog.parent, folder)
    for green in folder.rglob("green.tif"):
        nir = green.with_name("nir.tif")
        spare = green.with_name("spare.tif")
        green.rename(spare)
        nir.rename(green)
        spare.rename(nir)
    scenes = {"stac": str(folder / town.s2_catalog.name)}
    config = load_config(satellite_config("bands", grid=grid, scenes=scenes), DatasetConfig)
    swapped = build_dataset(config)
    assert swapped.qc["chip_class_disagrees"] > 0.3 * chips(swapped)
