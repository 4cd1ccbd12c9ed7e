"""The Prefect flows run without a server of one's own, on real inputs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prefect.testing.utilities import prefect_test_harness

from flows.datasets import build_dataset, refresh_region
from flows.training import evaluate, pretrain
from pipelines.world import make_world
from schemas.errors import GeoLinkError
from schemas.sources import Region


@pytest.fixture(scope="module", autouse=True)
def _prefect() -> Iterator[None]:
    """A Prefect API with a database of its own, gone after the tests."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small world and the four configs of a run over it."""
    folder = tmp_path_factory.mktemp("flows")
    world = make_world(folder / "world", seed=5, size_km=2.0)
    configs = {
        "dataset": {
            "name": "flows",
            "dataset": "dataset",
            "region": {"bbox": list(world.bounds_lonlat)},
            "grid": {"gsd_m": 10, "size": 16, "patch": 4, "shard_side": 4},
            "sensor": {"preset": "sentinel-2-l2a", "bands": ["red", "green", "nir"]},
            "scenes": {"stac": str(world.s2_catalog)},
            "osm": {"pbf": str(world.pbf)},
            "splits": {"block_km": 0.64, "train": 0.6, "val": 0.2, "test": 0.2},
            "cache": "cache",
        },
        "train": {
            "dataset": "dataset",
            "run": "run",
            "epochs": 1,
            "batch_size": 16,
            "model": {
                "image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2,
                "osm_dim": 16, "fusion_dim": 16, "decoder_dim": 16, "decoder_depth": 1,
            },
        },
        "evaluate": {
            "checkpoint": "run", "data": "dataset", "knn": {"k": 3}, "bootstrap": 20,
        },
    }  # fmt: skip
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def test_a_dataset_is_built_learnt_from_and_evaluated(folder: Path) -> None:
    built = build_dataset(folder / "dataset.yaml")
    assert (built["snapshot"], built["published"]) == (1, True)
    again = build_dataset(folder / "dataset.yaml")
    assert (again["built"], again["published"]) == (0, False)
    assert pretrain(folder / "train.yaml")["finished"]
    scores = evaluate(folder / "evaluate.yaml")["scores"]
    assert set(scores) == {"encoder", "random", "pixels", "bands", "majority"}


def test_a_refresh_of_a_part_leaves_the_rest_alone(folder: Path) -> None:
    build_dataset(folder / "dataset.yaml")
    west, south, east, north = yaml.safe_load((folder / "dataset.yaml").read_text())["region"][
        "bbox"
    ]
    part = Region(bbox=(west, south, (west + east) / 2, north))
    summary = refresh_region(folder / "dataset.yaml", part)
    assert (summary["built"], summary["published"]) == (0, False)
    assert summary["unchanged"] > 0


def test_a_flow_fails_with_the_sentence_of_the_mistake(folder: Path) -> None:
    with pytest.raises(GeoLinkError, match="cannot read config"):
        build_dataset(folder / "nowhere.yaml")
