"""Shifts of image against map: found to a fraction of a pixel, and never claimed without ground."""

from collections import Counter
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.features import Features, make_features
from pipelines.labels import rasterise
from pipelines.registration import Lattice, Registration, reach_px, register
from pipelines.world.aerial import render_aerial
from pipelines.world.appearance import Drawables, drawables
from pipelines.world.sentinel2 import render_pair
from pipelines.world.town import Town, make_town
from schemas.findings import SURE
from schemas.grid import Bounds
from schemas.taxonomy import default_taxonomy


@cache
def town() -> tuple[Town, Drawables, Features]:
    """A town of 2 km, what can be drawn of it, and what the map knows of it."""
    made = make_town(3, 2.0)
    mapped = [[f"{k}={v}" for k, v in sorted(tags.items())] for tags in made.features.mapped]
    features = make_features(
        made.features.geometry.copy(), np.arange(len(mapped)),
        np.cumsum([0, *map(len, mapped)]), [tag for tags in mapped for tag in tags],
        default_taxonomy(), np.flatnonzero([len(tags) > 0 for tags in mapped]), Counter(),
    )  # fmt: skip
    return made, drawables(made.features), features


def square(side_m: float) -> Bounds:
    """About the town's centre, on whole 60 m."""
    x, y = (round(v / 60) * 60 for v in town()[0].centre_utm)
    return (x - side_m / 2, y - side_m / 2, x + side_m / 2, y + side_m / 2)


@cache
def class_raster(side_m: float, gsd_m: float) -> NDArray[np.uint8]:
    f = town()[2]
    cells = round(2 * side_m / gsd_m)
    return rasterise(f.geometry, f.osm_class, f.width_m, square(side_m), cells)


@cache
def aerial(side_m: float, shift_m: tuple[float, float]) -> NDArray[np.uint8]:
    made, things, _ = town()
    return render_aerial(made.features, things, square(side_m), 1.0, shift_m, 0)


@cache
def satellite(side_m: float, shift_m: tuple[float, float]) -> NDArray[np.uint16]:
    """The clear scene: blue, green, red, near infrared."""
    made, things, _ = town()
    scene = render_pair(made.features, things, square(side_m), shift_m, 0)[1]
    return np.stack([scene.bands[b] for b in ("blue", "green", "red", "nir")])


def chips(image: NDArray[np.generic], size: int) -> NDArray[np.generic]:
    bands, side, _ = image.shape
    n = side // size
    cut = image.reshape(bands, n, size, n, size).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(cut).reshape(n * n, bands, size, size)


def grid(n: int, *, adjacent: bool = True) -> Lattice:
    return Lattice(n, n, np.arange(n * n), np.zeros(n * n, np.int16), adjacent)


def errors(found: Registration, shift_px: tuple[float, float]) -> tuple[float, float, float]:
    """Share of sure chips, their median error, and the share of them off by over a pixel."""
    sure = found.shift[:, 2] >= SURE
    error = np.hypot(*(found.shift[:, :2] - shift_px).T)[sure]
    return float(sure.mean()), float(np.median(error)), float((error > 1).mean())


SHIFTS_PX = [(0.0, 0.0), (3.0, 0.0), (0.0, -3.0), (0.4, -0.3), (2.6, 1.7), (-4.3, 3.6)]


@pytest.mark.parametrize("shift_px", SHIFTS_PX)
@pytest.mark.parametrize("size", [224, 64])
def test_shifts_of_aerial_pictures_are_found(size: int, shift_px: tuple[float, float]) -> None:
    side_m = 1344.0
    image, raster = aerial(side_m, shift_px), class_raster(side_m, 1.0)
    found = register(chips(image, size), raster, grid(round(side_m) // size), 0)
    sure, median, off = errors(found, shift_px)
    assert sure > (0.95 if size == 224 else 0.45)
    assert median < (0.25 if size == 224 else 0.4)
    assert off < (0.02 if size == 224 else 0.15)
    assert not found.unrelated


@pytest.mark.parametrize("shift_px", SHIFTS_PX)
def test_shifts_of_satellite_scenes_are_found(shift_px: tuple[float, float]) -> None:
    image = satellite(1920.0, (10 * shift_px[0], 10 * shift_px[1]))
    found = register(chips(image, 48), class_raster(1920.0, 10.0), grid(4), 0)
    sure, median, off = errors(found, shift_px)
    assert sure > 0.9
    assert median < 0.25
    assert off == 0


def test_the_map_of_another_place_is_unrelated_and_gives_no_sure_shift() -> None:
    side_m = 1344.0
    image, raster = chips(aerial(side_m, (0.4, -0.3)), 224), class_raster(side_m, 1.0)
    for wrong in (raster.T, raster[::-1], np.roll(raster, 400, axis=1)):
        found = register(image, np.ascontiguousarray(wrong), grid(6), 0)
        assert found.unrelated
        assert (found.shift[:, 2] >= SURE).mean() < 0.06


def test_a_lone_straight_road_gives_no_sure_shift() -> None:
    rng = np.random.default_rng(0)
    raster = np.zeros((256, 256), np.uint8)
    raster[100:112] = 9
    image = rng.integers(90, 110, (1, 1, 128, 128)).astype(np.uint8)
    image[:, :, 52:58] += 60
    assert register(image, raster, grid(1), 0).shift[0, 2] < 0.5
    # A crossing makes it sure: 2 pixels up.
    raster[:, 100:112] = 9
    image[:, :, :, 50:56] = np.maximum(image[:, :, :, 50:56], 150)
    x, y, confidence = register(image, raster, grid(1), 0).shift[0]
    assert confidence > SURE
    assert (x, y) == (pytest.approx(0, abs=0.3), pytest.approx(-2, abs=0.3))


def test_nothing_to_see_or_nothing_mapped_is_no_shift() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(1, 255, (4, 3, 64, 64)).astype(np.uint8)
    empty = np.zeros((256, 256), np.uint8)
    raster = np.repeat(np.repeat(rng.integers(0, 9, (16, 16)), 16, 0), 16, 1).astype(np.uint8)
    for image, classes in (
        (noise, empty), (noise, raster), (np.full_like(noise, 7), raster),
        (np.zeros_like(noise), raster), (noise[:, :, :8, :8], raster[:32, :32]),
        (noise[:0], raster),
    ):  # fmt: skip
        scene = np.zeros(len(image), np.int16)
        found = register(image, classes, Lattice(2, 2, np.arange(len(image)), scene, True), 0)
        assert found.shift.shape == (len(image), 3)
        assert np.isfinite(found.shift).all()
        assert (found.shift[:, 2] < 0.9).all()
        assert not found.unrelated


def test_chips_of_one_scene_know_nothing_of_another_scenes_shift() -> None:
    side_m = 1344.0
    raster = class_raster(side_m, 1.0)
    one, other = (chips(aerial(side_m, s), 224) for s in ((3.0, 0.0), (0.0, -3.0)))
    scene = np.repeat([0, 1], 18).astype(np.int16)
    image = np.where(scene[:, None, None, None] == 0, one, other)
    found = register(image, raster, Lattice(6, 6, np.arange(36), scene, True), 0)
    for n, shift in enumerate(((3.0, 0.0), (0.0, -3.0))):
        error = np.hypot(*(found.shift[scene == n, :2] - shift).T)
        assert np.median(error) < 0.3
        assert error.max() < 1.5


def test_chips_left_out_leave_the_others_where_they_are() -> None:
    side_m = 1344.0
    image, raster = chips(aerial(side_m, (2.6, 1.7)), 224), class_raster(side_m, 1.0)
    kept = np.flatnonzero(np.arange(36) % 5 != 2)
    lattice = Lattice(6, 6, kept, np.zeros(len(kept), np.int16), True)
    found = register(image[kept], raster, lattice, 0)
    _, median, off = errors(found, (2.6, 1.7))
    assert median < 0.3
    assert off < 0.05


def test_the_border_of_missing_data_is_no_edge() -> None:
    side_m = 1344.0
    image, raster = aerial(side_m, (2.6, 1.7)).copy(), class_raster(side_m, 1.0)
    y, x = np.mgrid[:1344, :1344]
    image[:, (x // 90 + y // 90) % 3 == 0] = 0
    _, median, off = errors(register(chips(image, 224), raster, grid(6), 0), (2.6, 1.7))
    assert median < 0.5
    assert off < 0.1


@pytest.mark.parametrize(("size", "reach"), [(224, 16), (256, 16), (64, 8), (32, 5), (512, 32)])
def test_the_reach_is_stated(size: int, reach: int) -> None:
    assert reach_px(size) == reach
