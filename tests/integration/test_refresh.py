"""A refreshed dataset is the one that would have been built from scratch, and no shard more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import osmium
import pytest
import shapely

from pipelines import plan as plan_module
from pipelines.build import BuildResult, build_dataset
from pipelines.explain import explain
from pipelines.world import World
from schemas.config import DatasetConfig
from schemas.dataset import read_snapshot, tag_table_name, vocabulary_name
from schemas.errors import GeoLinkError
from schemas.load import load_config
from tests.integration.conftest import WriteConfig


def _build(path: Path, **options: Any) -> BuildResult:
    return build_dataset(load_config(path, DatasetConfig), **options)


def current(dataset: Path) -> dict[str, object]:
    """The latest snapshot's rows and contract, and the bytes of all files that belong to it."""
    snapshot = read_snapshot(dataset)
    names = [
        "dataset.json",
        vocabulary_name(snapshot.vocabulary),
        tag_table_name(snapshot.vocabulary, snapshot.info.tag_encoder),
    ]
    for row in snapshot.rows:
        folder = dataset / row.path
        names += [p.relative_to(dataset).as_posix() for p in folder.rglob("*") if p.is_file()]
    files: dict[str, object] = {name: (dataset / name).read_bytes() for name in sorted(names)}
    return {**files, "rows": snapshot.rows, "contract": snapshot.info}


def edited(pbf: Path, target: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of an extract, each element passed through `change` (None leaves it out)."""
    with osmium.SimpleWriter(str(target), overwrite=True) as writer:
        for entity in osmium.FileProcessor(str(pbf)):
            kept = change(entity)
            if kept is not None:
                writer.add(kept)
    return target


def _a_building_less(pbf: Path, target: Path) -> Path:
    """The same extract without one building, and with another tag on a second one."""
    seen: list[int] = []

    def change(entity: Any) -> Any:
        if not (entity.is_way() and "building" in entity.tags):
            return entity
        seen.append(entity.id)
        if len(seen) == 5:
            return None
        return entity.replace(tags={"building": "church"}) if len(seen) == 9 else entity

    return edited(pbf, target, change)


ONE_SCENE = {"start": "2022-01-01", "end": "2022-12-31"}


def test_each_kind_of_change_ends_in_the_dataset_built_from_scratch(
    satellite_config: WriteConfig, town: World, tmp_path: Path
) -> None:
    newer = _a_building_less(town.pbf, tmp_path / "newer.osm.pbf")
    stac = str(town.s2_catalog)
    steps: list[dict[str, Any]] = [
        {"scenes": {"stac": stac, **ONE_SCENE}},
        {"scenes": {"stac": stac}},
        {"osm": {"pbf": str(newer)}},
        {"osm": {"pbf": str(newer)}, "objects": {"max_per_chip": 20}},
        {"osm": {"pbf": str(newer)}, "splits": {"block_km": 0.64, "train": 0.2, "val": 0.4,
                                                "test": 0.4}},
    ]  # fmt: skip
    built = []
    for n, step in enumerate(steps):
        refreshed = _build(satellite_config("refreshed", **step), change=True)
        assert refreshed.snapshot == n + 1
        built.append(refreshed.built)
        scratch = _build(satellite_config(f"scratch{n}", **step))
        assert current(refreshed.dataset) == current(scratch.dataset)
    shards = len(scratch.rows)
    assert built[0] == built[1] == built[3] == shards
    # Two buildings: the shards they lie in, or near the border of.
    assert 1 <= built[2] <= 8 < shards


def test_newer_code_of_a_stage_rebuilds_every_shard(
    satellite_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = satellite_config()
    first = _build(path)
    stages = {**plan_module.STAGES, "labels": plan_module.STAGES["labels"] + 1}
    monkeypatch.setattr(plan_module, "STAGES", stages)
    second = _build(path, change=True)
    assert second.built == len(first.rows)
    shard = next(r.shard for r in second.rows if r.chips)
    reason = f"stage labels is of version {stages['labels']} instead of {stages['labels'] - 1}"
    assert explain(second.dataset, shard).past == [(2, reason), (1, "first built")]


def test_a_build_refuses_another_contract_and_says_how(
    satellite_config: WriteConfig, town: World
) -> None:
    first = _build(satellite_config("contract"))
    before = current(first.dataset)
    changed = satellite_config("contract", objects={"max_per_chip": 3})
    with pytest.raises(GeoLinkError, match=r"objects\.max_per_chip \(null instead of 3\).*refresh"):
        _build(changed)
    with pytest.raises(GeoLinkError, match="max_per_chip"):
        _build(changed, change=True, within=shapely.box(*town.bounds_lonlat))
    assert current(first.dataset) == before


def test_explain_tells_what_a_shard_is_made_from_and_what_would_change_it(
    satellite_config: WriteConfig, town: World, tmp_path: Path
) -> None:
    stac = str(town.s2_catalog)
    first = _build(satellite_config("told", scenes={"stac": stac, **ONE_SCENE}))
    row = max(first.rows, key=lambda r: r.objects)
    wider = satellite_config("told", scenes={"stac": stac})
    config = load_config(wider, DatasetConfig)
    told = explain(first.dataset, row.shard, config=config)
    assert told.rebuild == ["scene S2A_30TWR_20190421_0_L2A is new"]
    assert [c["scene"] for c in told.considered if c["chosen"]] == row.scenes
    assert set(told.radiometry) == set(row.scenes)
    unchanged = satellite_config("told", scenes={"stac": stac, **ONE_SCENE})
    assert (
        explain(first.dataset, row.shard, config=load_config(unchanged, DatasetConfig)).rebuild
        == []
    )
    with pytest.raises(GeoLinkError, match="no shard or chip 'nowhere'"):
        explain(first.dataset, "nowhere")
