"""A small made-up town, and configs of datasets over it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.world import World, make_world


@pytest.fixture(scope="session")
def town(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A town of 2 km with its PBF, scenes and catalogs; made once a test process."""
    return make_world(tmp_path_factory.mktemp("town"), seed=3, size_km=2.0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted extracts, shared by all tests of a process."""
    return tmp_path_factory.mktemp("cache")


WriteConfig = Callable[..., Path]


@pytest.fixture
def satellite_config(town: World, cache: Path, tmp_path: Path) -> WriteConfig:
    """Writes the config of a 10 m dataset: four bands, 2 x 2 chips of 32 px a shard."""

    def write(name: str = "satellite", **changes: Any) -> Path:
        config: dict[str, Any] = {
            "name": "satellite",
            "dataset": name,
            "region": {"bbox": list(town.bounds_lonlat)},
            "grid": {"gsd_m": 10, "size": 32, "patch": 8, "shard_side": 2},
            "sensor": {"preset": "sentinel-2-l2a", "bands": ["blue", "green", "red", "nir"]},
            "scenes": {"stac": str(town.s2_catalog)},
            "osm": {"pbf": str(town.pbf)},
            "splits": {"block_km": 0.64, "train": 0.6, "val": 0.2, "test": 0.2},
            "cache": str(cache),
        }
        config.update(changes)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    return write
