"""Flags of chips: each planted fault raises its own, and a sound shard raises none."""

from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from pipelines.checks import check_chips, seams
from pipelines.plan import STAGES
from schemas.dataset import DatasetInfo
from schemas.findings import CHIP_FLAGS, flagged
from schemas.grid import Grid
from schemas.sensor import sensor
from tests.shards import make_info

CHIPS, SIZE = 12, 64
GRID = Grid(gsd_m=10, size=SIZE, patch=8, shard_side=4)
SATELLITE = make_info(GRID, sensor("sentinel-2-l2a", ("blue", "green", "red", "nir")))
AERIAL = make_info(GRID)
WATER, FOREST = (SATELLITE.taxonomy.names.index(n) + 1 for n in ("water", "forest"))
Arrays = dict[str, NDArray[Any]]


def sound(info: DatasetInfo = SATELLITE) -> Arrays:
    """A shard of noisy chips: a lake in the west, forest in the east, ten objects each."""
    rng = np.random.default_rng(5)
    bands, eight = len(info.sensor.bands), info.sensor.dtype == "uint8"
    land = np.array([400, 600, 500, 3000])[:bands] if not eight else np.full(bands, 120)
    water = np.array([500, 600, 300, 100])[:bands] if not eight else np.full(bands, 60)
    label = np.full((CHIPS, SIZE, SIZE), FOREST, np.uint8)
    label[:, :, :20] = WATER
    mean = np.where((label == WATER)[:, None], water[:, None, None], land[:, None, None])
    image = mean * rng.normal(1, 0.05, mean.shape)
    return {
        "image": np.maximum(image, 1).astype(info.sensor.dtype),
        "valid": np.ones(CHIPS, np.float32),
        "label_pixel": label,
        "object_offset": np.arange(CHIPS + 1) * 10,
    }


def codes(
    arrays: Arrays,
    info: DatasetInfo = SATELLITE,
    shift: NDArray[np.float32] | None = None,
    seam: NDArray[np.bool_] | None = None,
) -> dict[str, list[int]]:
    """Chips by code."""
    shift = np.zeros((CHIPS, 3), np.float32) if shift is None else shift
    seam = np.zeros(CHIPS, bool) if seam is None else seam
    finding, counts = check_chips(arrays, shift, seam, info)
    found = {c: np.flatnonzero(flagged(finding, [c])).tolist() for c in CHIP_FLAGS}
    assert counts == {c: len(chips) for c, chips in found.items()}
    return {c: chips for c, chips in found.items() if chips}


@pytest.mark.parametrize("info", [SATELLITE, AERIAL])
def test_a_sound_shard_has_no_finding(info: DatasetInfo) -> None:
    assert codes(sound(info), info) == {}


def test_cloud_and_missing_data_are_told_apart() -> None:
    arrays = sound()
    arrays["valid"][1] = 0.85
    arrays["image"][2, :, :16] = 0
    arrays["valid"][2] = 0.75
    arrays["image"][3, :, :8] = 0
    arrays["valid"][3] = 0.7
    arrays["image"][4, 1, :16] = 0
    arrays["valid"][4] = 0.75
    assert codes(arrays) == {"chip_cloudy": [1, 3], "chip_nodata": [2, 3, 4]}


def test_black_is_data_in_8_bits_unless_all_bands_are() -> None:
    arrays = sound(AERIAL)
    arrays["image"][1, 0] = 0
    assert codes(arrays, AERIAL) == {}


@pytest.mark.parametrize("value", [1, 255, 65535])
def test_an_area_of_one_value_that_is_not_nodata_is_a_wrong_nodata_value(value: int) -> None:
    arrays = sound()
    arrays["image"][5, :, :, :32] = value
    arrays["image"][5, :, :, :32] = np.where(arrays["label_pixel"][5, :, :32] > 0, value, value)
    assert codes(arrays)["chip_constant"] == [5]


def test_areas_of_several_constant_values_are_none() -> None:
    # A picture drawn with few colours.
    arrays = sound(AERIAL)
    blocks = np.arange(64).reshape(8, 8).repeat(8, 0).repeat(8, 1) + 1
    arrays["image"][5] = blocks
    assert codes(arrays, AERIAL) == {}


def test_far_more_or_fewer_objects_than_elsewhere_in_the_shard() -> None:
    arrays = sound()
    counts = np.array([20, 22, 18, 25, 0, 19, 21, 300, 1, 24, 17, 20])
    arrays["object_offset"] = np.r_[0, np.cumsum(counts)]
    assert codes(arrays) == {
        "chip_osm_dense": [7], "chip_osm_sparse": [8], "chip_osm_empty": [4],
    }  # fmt: skip
    # Where densities vary much, none of them is odd.
    counts = np.array([1, 3, 9, 30, 90, 300, 2, 6, 18, 60, 180, 12])
    arrays["object_offset"] = np.r_[0, np.cumsum(counts)]
    assert codes(arrays) == {}


def test_water_that_looks_like_forest_and_forest_that_looks_like_water_disagree() -> None:
    arrays = sound()
    swapped = np.where(arrays["label_pixel"] == WATER, FOREST, WATER).astype(np.uint8)
    arrays["label_pixel"][[3, 8]] = swapped[[3, 8]]
    assert codes(arrays) == {"chip_class_disagrees": [3, 8]}
    # Without near infrared nothing is said.
    arrays = sound(AERIAL)
    arrays["label_pixel"][3] = swapped[3]
    assert codes(arrays, AERIAL) == {}


def test_only_a_sure_shift_beyond_a_pixel_and_its_error_is_one() -> None:
    shift = np.zeros((CHIPS, 3), np.float32)
    shift[:5] = [[3, 0, 0.99], [3, 0, 0.9], [1.2, 0, 1], [1.2, -1.2, 0.96], [0, 0, 1]]
    assert codes(sound(), shift=shift) == {"chip_shifted": [0, 3]}


@pytest.mark.parametrize("gain", [1.0, 1.2])
@pytest.mark.parametrize("turned", [False, True])
def test_a_seam_is_a_jump_along_the_border_of_two_scenes(gain: float, turned: bool) -> None:
    rng = np.random.default_rng(2)
    image = np.full((3, 256, 256), 1000) * rng.normal(1, 0.08, (3, 256, 256))
    scene = np.zeros((256, 256), np.int16)
    scene[:, 100:] = 1
    image[:, :, 100:] *= gain
    image[:, :20] = 0
    scene[:20] = -1
    if turned:
        image, scene = image.transpose(0, 2, 1), scene.T
    found = seams(image.astype(np.uint16), scene, 4, 64, 0).reshape(4, 4)
    expected = np.zeros((4, 4), bool)
    if gain > 1:
        expected[(1, slice(None)) if turned else (slice(None), 1)] = True
    np.testing.assert_array_equal(found, expected)
    # The same jump where no scenes meet is the ground's.
    assert not seams(image.astype(np.uint16), np.zeros_like(scene), 4, 64, 0).any()


def test_the_bytes_of_checks_change_only_with_the_version_of_their_stage() -> None:
    from pipelines.registration import Lattice, register

    rng = np.random.default_rng(9)
    raster = np.kron(rng.integers(0, 5, (32, 32)), np.ones((16, 16))).astype(np.uint8)
    picture = 40 * raster[::2, ::2] + rng.integers(1, 30, (256, 256))
    image = np.roll(picture, (-2, 3), (0, 1)).astype(np.uint8)
    image = image.reshape(4, 64, 4, 64).transpose(0, 2, 1, 3).reshape(16, 1, 64, 64)
    lattice = Lattice(4, 4, np.arange(16), np.zeros(16, np.int16), True)
    shift = register(image, raster, lattice, 0).shift
    assert np.median(np.abs(shift[:, :2] - (3, 2))) < 0.1
    arrays = sound()
    arrays["image"][5, :, :, :32] = 7
    arrays["label_pixel"][3] = WATER
    arrays["object_offset"] = np.r_[0, np.cumsum([20, 22, 18, 25, 0, 19, 21, 300, 1, 24, 17, 20])]
    finding, _ = check_chips(arrays, shift[:CHIPS], np.arange(CHIPS) == 1, SATELLITE)
    # Tenths of a pixel: the last digits differ between processors and library versions.
    whole = np.rint(shift[:, :2] * 10).astype(np.int64).tobytes() + finding.tobytes()
    digest = xxhash.xxh3_64_hexdigest(whole)
    assert (STAGES["checks"], digest) == (1, "332f6c6be17ac28d")
