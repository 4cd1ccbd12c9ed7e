"""What is done about shifts, where every chip has an image of its own (pairs)."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely

from pipelines.alignment import align, shift_m
from pipelines.features import make_features
from pipelines.inputs import Inputs, draw
from pipelines.objects import clip
from pipelines.pairs import PairShard
from pipelines.plan import ShardTask
from schemas.config import ObjectOptions, Registration
from schemas.findings import SURE
from schemas.grid import Grid
from tests.shards import make_info

SIZE, GSD = 128, 0.5
INFO = make_info(Grid(gsd_m=1, size=SIZE, patch=16, shard_side=8))
SHIFT_PX = np.array([[0, 0], [4, -3], [-2, 5]])
"""Right and up, of three pairs."""


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    """Three pictures of forty houses each, whose pixels are 0.5 m."""
    rng = np.random.default_rng(1)
    side = SIZE * GSD
    bounds = np.array([[1000.0 * n, 0, 1000.0 * n + side, side] for n in range(3)])
    corner = rng.uniform(2, side - 10, (3, 40, 2)) + bounds[:, None, :2]
    far = corner + rng.uniform(3, 8, corner.shape)
    houses = shapely.box(corner[..., 0], corner[..., 1], far[..., 0], far[..., 1])
    features = make_features(
        houses.ravel(), np.repeat(np.arange(3), 40), np.arange(121), ["building=yes"] * 120,
        INFO.taxonomy, np.arange(120), Counter(),
    )  # fmt: skip
    frame = features.osm
    plain = Inputs(
        arrays={
            "image": np.zeros((3, 3, SIZE, SIZE), np.uint8),
            "bounds": bounds,
            "scene": np.arange(3, dtype=np.int16),
        },
        features=features, frame=frame, raster=np.zeros(0, np.uint8), lattice=(3, 1),
        kept=np.arange(3), seam=np.zeros(3, bool), scenes=["a", "b", "c"], radiometry={},
        considered=[], counts={},
    )  # fmt: skip
    raster = draw(task("keep"), plain)
    picture = 60 + 120 * (raster[::2, ::2] > 0).reshape(3, SIZE, SIZE)
    for n, (right, up) in enumerate(SHIFT_PX):
        picture[n] = np.roll(picture[n], (-up, right), axis=(0, 1))
    image = (picture + rng.integers(-20, 20, picture.shape)).astype(np.uint8)
    arrays = {**plain.arrays, "image": np.repeat(image[:, None], 3, axis=1)}
    return replace(plain, arrays=arrays, raster=raster)


def task(registration: Registration) -> ShardTask:
    source = PairShard("pairs", "train", Path(), ("a", "b", "c"), ())
    return ShardTask(Path(), INFO, "pairs", "", {}, "train", "", source, {}, registration)


def test_shifts_are_measured_in_pixels_and_stored_in_metres(inputs: Inputs) -> None:
    kept = align(task("keep"), inputs)
    assert kept.inputs is inputs
    assert (kept.shift[:, 2] > SURE).all()
    np.testing.assert_allclose(kept.shift[:, :2], SHIFT_PX, atol=0.3)
    metres = shift_m(task("keep"), kept)
    np.testing.assert_allclose(metres[:, :2], kept.shift[:, :2] * GSD)
    np.testing.assert_array_equal(metres[:, 2], kept.shift[:, 2])
    assert kept.moved_m == []


def test_every_pair_is_corrected_by_its_own_shift(inputs: Inputs) -> None:
    corrected = align(task("correct"), inputs)
    np.testing.assert_allclose(corrected.moved_m, SHIFT_PX * GSD, atol=0.15)
    assert np.abs(corrected.shift[:, :2]).max() < 1e-6
    moved = shapely.get_coordinates(corrected.inputs.features.geometry)
    before = shapely.get_coordinates(inputs.features.geometry)
    step = np.repeat(corrected.moved_m, len(before) // 3, axis=0)
    np.testing.assert_allclose(moved - before, step, atol=1e-9)
    again = align(task("keep"), corrected.inputs)
    assert np.abs(again.shift[:, :2]).max() < 0.3
    assert align(task("keep"), inputs).shift[1, 0] > 3  # what went in is as it was


def test_dropped_pairs_take_their_features_with_them(inputs: Inputs) -> None:
    dropped = align(task("drop"), inputs)
    assert dropped.counts["chip_dropped_shifted"] == 2
    left = dropped.inputs
    assert left.kept.tolist() == [0]
    assert left.arrays["bounds"].tolist() == inputs.arrays["bounds"][:1].tolist()
    objects = clip(left.features, left.arrays["bounds"], ObjectOptions(), frame=left.frame)
    assert objects.chips == 1
    assert set(objects.source) == set(range(40))
