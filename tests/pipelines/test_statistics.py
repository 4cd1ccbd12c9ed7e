"""Moran's I and Lee's L in bulk are those of esda, one chip and class at a time."""

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.plan import STAGES
from pipelines.statistics import patch_brightness, statistics


def _oracle(field, brightness):
    """Moran's I and Lee's L of one lattice by esda."""
    esda = pytest.importorskip("esda")
    weights = pytest.importorskip("libpysal").weights.lat2W(*field.shape, rook=False)
    weights.transform = "r"
    moran = esda.Moran(field.ravel(), weights, transformation="r", permutations=0).I
    lee = esda.Spatial_Pearson(weights.sparse, permutations=0)
    return moran, lee.fit(field.reshape(-1, 1), brightness.reshape(-1, 1)).association_[0, 1]


@pytest.mark.parametrize("shape", [(2, 2), (2, 5), (3, 2), (14, 14), (9, 4), (32, 32)])
def test_they_are_those_of_esda(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[0])
    chips, classes = 10, 3
    fraction = rng.random((chips, *shape, classes), np.float32)
    fraction[..., 1] = rng.random(fraction.shape[:-1]) < 0.3
    fraction[..., 2] = np.cumsum(rng.random(fraction.shape[:-1]), axis=1) / shape[0]
    fraction[:, 0, 0, 1], fraction[:, -1, -1, 1] = 0, 1
    brightness = (rng.random((chips, *shape)) * 3000).astype(np.float32)
    morans, lees = statistics(fraction, brightness)
    assert morans.dtype == lees.dtype == np.float32
    for n in range(chips):
        for c in range(classes):
            moran, lee = _oracle(fraction[n, ..., c].astype(float), brightness[n].astype(float))
            assert morans[n, c] == pytest.approx(moran, abs=1e-6)
            assert lees[n, c] == pytest.approx(lee, abs=1e-6)


def test_hand_worked_lattices() -> None:
    halves = np.array([[1, 1, 0, 0]] * 4, np.float32)
    board = np.indices((4, 4)).sum(axis=0) % 2
    corner = np.zeros((2, 2), np.float32)
    corner[0, 0] = 1
    moran, _ = statistics(np.stack([halves, board], -1)[None].astype(np.float32), halves[None])
    # Halves, in units of z: the outer columns see only their own side; the inner ones three of
    # their side against two at the border, five against three inside.
    expected = (8 * 1 + 4 * (3 - 2) / 5 + 4 * (5 - 3) / 8) / 16
    assert moran[0, 0] == pytest.approx(expected)
    # A square of four: everyone's lag is minus a third of itself.
    small, lee = statistics(corner[None, ..., None], corner[None])
    assert small[0, 0] == pytest.approx(-1 / 3)
    assert lee[0, 0] == pytest.approx(1 / 9)
    # Dark where the class is: the sign turns.
    _, lee = statistics(corner[None, ..., None], 100 - corner[None])
    assert lee[0, 0] == pytest.approx(-1 / 9)
    assert moran[0, 1] < 0 < moran[0, 0]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 0.7])
def test_a_constant_field_has_statistics_of_exactly_zero(value: float) -> None:
    rng = np.random.default_rng(0)
    constant = np.full((3, 7, 5, 2), value, np.float32)
    moving = rng.random((3, 7, 5), np.float32)
    moran, lee = statistics(constant, moving)
    assert not moran.any()
    assert not lee.any()
    moran, lee = statistics(np.repeat(moving[..., None], 2, axis=-1), constant[..., 0] * 1234.5)
    assert moran.all()
    assert not lee.any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(2, 9), st.integers(2, 9), st.integers(1, 20))
def test_a_chip_does_not_depend_on_the_others(seed: int, py: int, px: int, chips: int) -> None:
    rng = np.random.default_rng(seed)
    fraction = (rng.random((chips, py, px, 4)) * rng.integers(0, 2, (chips, 1, 1, 4))).astype("f4")
    brightness = rng.random((chips, py, px), np.float32)
    together = statistics(fraction, brightness)
    order = rng.permutation(chips)
    shuffled = statistics(fraction[order], brightness[order])
    alone = statistics(fraction[:1], brightness[:1])
    for field, other, one in zip(together, shuffled, alone, strict=True):
        assert np.isfinite(field).all()
        np.testing.assert_array_equal(field[order], other)
        np.testing.assert_array_equal(field[:1], one)


@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", 0), ("uint8", 255), ("uint16", 0)])
def test_brightness_is_the_mean_of_the_bands_means_without_nodata(dtype: str, nodata: int) -> None:
    rng = np.random.default_rng(1)
    patch, p, bands, chips = 6, 3, 4, 11
    top = np.iinfo(dtype).max
    image = rng.integers(1, top, (chips, bands, p * patch, p * patch)).astype(dtype)
    image[0, 1, :9, :5] = nodata
    image[1, :, 2:15, 3:17] = nodata
    image[2, 3, :6, 6:12] = nodata
    image[3] = nodata
    result = patch_brightness(image, patch, nodata)
    assert result.shape == (chips, p, p)
    assert result.dtype == np.float32
    for n in range(chips):
        expected = np.full((p, p), np.nan)
        for i, j in np.ndindex(p, p):
            square = image[n, :, patch * i : patch * (i + 1), patch * j : patch * (j + 1)]
            means = [band[band != nodata].astype(float) for band in square]
            if all(len(m) for m in means):
                expected[i, j] = np.mean([m.mean() for m in means])
        rest = np.nanmean(expected) if np.isfinite(expected).any() else 0.0
        expected[np.isnan(expected)] = rest
        np.testing.assert_allclose(result[n], expected, rtol=1e-6)


def test_a_patch_without_pixels_takes_no_part_in_lees_l() -> None:
    rng = np.random.default_rng(2)
    image = rng.integers(1, 255, (1, 3, 32, 32)).astype(np.uint8)
    image[:, :, :8, :8] = 0
    brightness = patch_brightness(image, 8).astype(float)
    assert brightness[0, 0, 0] == pytest.approx(np.delete(brightness[0].ravel(), 0).mean())
    assert patch_brightness(np.zeros_like(image), 8).tolist() == np.zeros((1, 4, 4)).tolist()


def test_sums_of_the_largest_patches_do_not_overflow() -> None:
    image = np.full((1, 1, 512, 512), 65535, np.uint16)
    assert patch_brightness(image, 256).tolist() == [[[65535.0] * 2] * 2]


def test_the_bytes_of_statistics_change_only_with_the_version_of_their_stage() -> None:
    rng = np.random.default_rng(4)
    fraction = rng.integers(0, 256, (20, 8, 8, 20)).astype(np.float32) / 256
    brightness = patch_brightness(rng.integers(0, 255, (20, 3, 64, 64)).astype(np.uint8), 8)
    digest = xxhash.xxh3_64(np.concatenate(statistics(fraction, brightness)).tobytes())
    assert (STAGES["statistics"], digest.hexdigest()) == (1, "051bbd7a1a86488d")
