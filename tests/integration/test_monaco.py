"""Monaco, built at 10 m and at 1 m over rendered scenes, against what its inputs say, chip by chip.

The oracle (`tests/independent.py`) reads the extract and the scenes on its own. Every chip of 10 m
is checked, and a seeded sample of those of 1 m over a part of the town; with the environment
variable GEOLINK_CHECK_ALL=1, every chip of 1 m over the whole of it. By hand, with counts:

    python -m tests.integration.test_monaco FOLDER PBF
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.demo import write_configs
from geolink.reader import open_dataset, read_shard
from pipelines.build import build_dataset
from pipelines.world import World, make_world
from schemas.config import DatasetConfig
from schemas.load import load_config
from schemas.sources import DROP_KEYS
from schemas.taxonomy import default_taxonomy
from tests import comparison
from tests.comparison import Differences, Place
from tests.independent import Box, Feature, read_features

CHECK_ALL = os.environ.get("GEOLINK_CHECK_ALL") == "1"
AERIAL_KM = 4.8 if CHECK_ALL else 0.8
SAMPLE = None if CHECK_ALL else 30


@dataclass(frozen=True)
class Monaco:
    """A dataset of Monaco and what it is made of."""

    place: Place
    chips: dict[Box, tuple[dict[str, Any], int]]
    """By bounds: the arrays of its shard, and its position there."""


@dataclass(frozen=True)
class Town:
    """Monaco's scenes, its features as the oracle reads them, and configs of datasets."""

    world: World
    features: list[Feature]
    configs: dict[str, Path]


def make_town(folder: Path, pbf: Path, aerial_km: float) -> Town:
    world = make_world(folder / "world", osm_pbf=pbf, aerial_km=aerial_km)
    features = read_features(pbf, world.epsg, DROP_KEYS, default_taxonomy())
    return Town(world, features, write_configs(folder, world, seed=0, seeds=0, epochs=None))


def build_monaco(town: Town, name: str, catalog: Path) -> Monaco:
    config = load_config(town.configs[name], DatasetConfig)
    result = build_dataset(config)
    assert not result.failed
    dataset = open_dataset(config.dataset)
    assert config.region
    assert config.region.bbox
    place = comparison.make_place(
        dataset.info, config.region.bbox, town.world.epsg, town.features, catalog
    )
    chips = {
        tuple(bounds): (arrays, n)
        for row in dataset.rows
        for arrays in [read_shard(dataset, row)]
        for n, bounds in enumerate(arrays["bounds"].tolist())
    }
    return Monaco(place, chips)


def check(monaco: Monaco, sample: int | None) -> Differences:
    """Compare chips, all or a seeded sample, and which chips there are."""
    d = Differences()
    inside = {chip for _, chip in comparison.chips_of(monaco.place)}
    d.check("chip outside the region", set(monaco.chips) <= inside)
    for chip in sorted(inside - set(monaco.chips)):
        valid = comparison.read_pixels(monaco.place, chip).valid.mean()
        d.check("chip left out", valid < 0.5, (chip, valid))
    chips = sorted(monaco.chips)
    if sample is not None:
        # Half of the sample from chips with many objects: there is more to be wrong.
        rng = np.random.default_rng(0)
        many = sorted(chips, key=lambda c: -_objects(*monaco.chips[c]))
        chips = many[: sample // 2] + [
            many[n]
            for n in rng.choice(np.arange(sample // 2, len(many)), sample // 2, replace=False)
        ]
    for chip in chips:
        comparison.compare_chip(monaco.place, chip, *monaco.chips[chip], d)
    return d


def _objects(arrays: dict[str, Any], n: int) -> int:
    first, last = arrays["object_offset"][n : n + 2].tolist()
    return int(last - first)


@pytest.fixture(scope="module")
def town(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Town:
    folder = tmp_path_factory.mktemp("monaco")
    return make_town(folder, shared / "data" / "monaco.osm.pbf", AERIAL_KM)


@pytest.mark.slow
def test_chips_of_10_m_are_what_their_inputs_say(town: Town) -> None:
    d = check(build_monaco(town, "satellite", town.world.s2_catalog), None)
    assert not d.found, d.examples
    assert d.compared["object"] > 8000
    assert d.compared["relation"] > 50_000


@pytest.mark.slow
def test_chips_of_1_m_are_what_their_inputs_say(town: Town) -> None:
    d = check(build_monaco(town, "aerial", town.world.aerial_catalog), SAMPLE)
    assert not d.found, d.examples
    assert d.compared["object"] > 500


if __name__ == "__main__":
    whole = make_town(Path(sys.argv[1]), Path(sys.argv[2]), 4.8)
    catalogs = {"satellite": whole.world.s2_catalog, "aerial": whole.world.aerial_catalog}
    for which, where in catalogs.items():
        all_of_it = check(build_monaco(whole, which, where), None)
        print(which, json.dumps(all_of_it.compared))  # noqa: T201
        print("differences:", json.dumps(all_of_it.found), all_of_it.examples)  # noqa: T201
