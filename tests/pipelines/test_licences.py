"""Terms are read from items and collections as real catalogs state them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.licences import licence_of
from pipelines.plan import make_plan
from pipelines.store import prepare_dataset
from pipelines.world import make_world
from schemas.config import DatasetConfig
from schemas.dataset import read_info
from schemas.licences import OSM, Licence
from schemas.load import load_config

NOTICE = "https://sentinel.esa.int/documents/247904/690755/Sentinel_Data_Legal_Notice"


@pytest.mark.parametrize(
    "name", ["s2_antimeridian_baseline0509_T01WCP_a", "s2_planetary_computer_T06VVN"]
)
def test_real_sentinel_items_are_attributed_as_their_notice_asks(shared: Path, name: str) -> None:
    item = json.loads((shared / "data" / "stac" / f"{name}.json").read_text())
    licence = licence_of(item, {"license": "proprietary"})
    year = item["properties"]["datetime"][:4]
    assert licence.licence == "LicenseRef-Copernicus-Sentinel-Data"
    assert licence.attribution == f"Contains modified Copernicus Sentinel data {year}"
    assert licence.url == NOTICE
    assert licence.terms == "open"


def test_what_an_item_does_not_state_is_its_collections() -> None:
    collection: dict[str, Any] = {
        "id": "drone", "license": "CC-BY-4.0",
        "links": [{"rel": "license", "href": "https://a.org/terms"}],
        "providers": [
            {"name": "Host", "roles": ["host"]}, {"name": "Maker", "roles": ["producer"]},
            {"name": "Owner", "roles": ["licensor", "producer"]},
        ],
    }  # fmt: skip
    item: dict[str, Any] = {"properties": {}}
    assert licence_of(item, collection) == Licence(
        source="drone", licence="CC-BY-4.0", attribution="Maker, Owner", url="https://a.org/terms"
    )
    own = {"collection": "c", "properties": {"license": "CC0-1.0", "providers": [{"name": "Me"}]}}
    assert licence_of(own, {}) == Licence(source="c", licence="CC0-1.0", attribution="Me")
    public = {"links": [{"rel": "license", "href": "https://b.org", "title": "Public Domain"}]}
    assert licence_of(item, {**public, "license": "proprietary"}).terms == "open"
    assert licence_of(item, {}) == Licence(source="scenes", licence="")


def test_a_plan_carries_every_source_and_finds_what_cannot_be_combined(tmp_path: Path) -> None:
    town = make_world(tmp_path / "town", seed=3, size_km=2.0)
    config = {
        "name": "t", "dataset": "d", "region": {"bbox": list(town.bounds_lonlat)},
        "grid": {"gsd_m": 10, "size": 32, "patch": 8, "shard_side": 2},
        "sensor": {"preset": "sentinel-2-l2a", "bands": ["red"]},
        "scenes": {"stac": str(town.s2_catalog)}, "osm": {"pbf": str(town.pbf)},
        "cache": str(tmp_path / "cache"),
    }  # fmt: skip

    def planned() -> Any:
        path = tmp_path / "t.yaml"
        path.write_text(yaml.safe_dump(config))
        return make_plan(load_config(path, DatasetConfig))

    first = planned()
    assert OSM in first.info.licences
    assert len(first.info.licences) == 2
    assert "licence_incompatible" not in first.skipped
    for path in Path(town.s2_catalog).parent.rglob("*.json"):
        path.write_text(path.read_text().replace("CC-BY-4.0", "CC-BY-NC-4.0").replace(
            "CC0-1.0", "CC-BY-NC-4.0"))  # fmt: skip
    second = planned()
    assert second.skipped["licence_incompatible"] == 1
    # No shard depends on it, and a build does not refuse it.
    assert [t.key for t in second.tasks] == [t.key for t in first.tasks]
    prepare_dataset(tmp_path / "d", first.info)
    prepare_dataset(tmp_path / "d", second.info)
    assert read_info(tmp_path / "d") == first.info
