"""The harder world: looks that vary by flight, a map that errs, and the truth beside it."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import osmium
import pytest
import rasterio
import shapely

from pipelines.world.hard import FLIGHT_M, HardWorld, make_hard_world, worsened
from pipelines.world.town import make_town

SIZE = {"seed": 0, "size_km": 2.0, "aerial_km": 1.024}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> HardWorld:
    return make_hard_world(tmp_path_factory.mktemp("hard"), **SIZE)


def buildings(pbf: Path) -> int:
    return sum("building" in o.tags for o in osmium.FileProcessor(str(pbf)))


def test_the_same_seed_gives_the_same_map_truth_and_picture(
    world: HardWorld, tmp_path: Path
) -> None:
    again = make_hard_world(tmp_path / "again", **SIZE)
    for one in (world.pbf, world.truth_pbf, *world.folder.rglob("*.tif")):
        two = again.folder / one.relative_to(world.folder)
        digests = [hashlib.sha256(path.read_bytes()).digest() for path in (one, two)]
        assert digests[0] == digests[1], one.name


def test_flights_differ_in_look_at_their_common_border(world: HardWorld) -> None:
    with rasterio.open(next(world.folder.rglob("*.tif"))) as file:
        image = file.read().astype(float)
    step = np.abs(np.diff(image, axis=2)).mean((0, 1))
    assert step[FLIGHT_M - 1] > 2 * np.median(step)


def test_the_map_lacks_things_and_calls_areas_by_wrong_names() -> None:
    known = make_town(0, 2.0).features
    worse = worsened(known, 0)
    had = np.array([bool(tags) for tags in known.mapped])
    has = np.array([bool(tags) for tags in worse.mapped])
    assert not (has & ~had).any()
    assert 0.12 < 1 - has[had].mean() < 0.18
    land = np.array(["landuse" in tags for tags in known.mapped]) & has
    wrong = [known.mapped[i] != worse.mapped[i] for i in np.flatnonzero(land)]
    assert 0.05 < np.mean(wrong) < 0.2
    moved = shapely.distance(shapely.centroid(known.geometry), shapely.centroid(worse.geometry))
    assert 1.0 < np.median(moved) < 5.0
    assert Counter(map(str, worse.truth)) == Counter(map(str, known.truth))


def test_the_truth_is_a_map_of_its_own_that_lacks_nothing(world: HardWorld) -> None:
    assert buildings(world.truth_pbf) > 1.15 * buildings(world.pbf)
