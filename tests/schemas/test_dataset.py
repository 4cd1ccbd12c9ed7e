"""`dataset.json` and where things lie."""

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.config import ObjectOptions, Splits
from schemas.dataset import (
    DatasetInfo,
    read_info,
    snapshot_name,
    snapshot_numbers,
    tag_table_name,
    vocabulary_name,
)
from schemas.errors import GeoLinkError
from schemas.grid import Grid
from schemas.layout import SCHEMA_VERSION
from schemas.licences import OSM
from schemas.sensor import SENTINEL_2_L2A
from schemas.sources import DROP_KEYS
from schemas.taxonomy import default_taxonomy

INFO = DatasetInfo(
    schema_version=SCHEMA_VERSION, name="monaco", grid=Grid(gsd_m=10, size=64, patch=8),
    aligned=True, sensor=SENTINEL_2_L2A, taxonomy=default_taxonomy(), drop_keys=DROP_KEYS,
    keep_keys=(), objects=ObjectOptions(), splits=Splits(), tag_encoder="wordllama",
    licences=(OSM,),
)  # fmt: skip


def _write(folder: Path, change: dict[str, Any] | None = None) -> Path:
    data = INFO.model_dump(mode="json") | (change or {})
    (folder / "dataset.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert read_info(_write(tmp_path)) == INFO


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match="is no GeoLink dataset: it has no"):
        read_info(tmp_path)
    with pytest.raises(GeoLinkError, match="is no GeoLink dataset"):
        read_info(tmp_path / "absent")


def test_a_dataset_of_a_newer_version_is_an_error_that_says_upgrade(tmp_path: Path) -> None:
    _write(tmp_path, {"schema_version": SCHEMA_VERSION + 1, "new_field": 3})
    with pytest.raises(
        GeoLinkError, match=f"schema {SCHEMA_VERSION + 1}, .* up to {SCHEMA_VERSION}; upgrade"
    ):
        read_info(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid": {"gsd_m": 10, "size": 65, "patch": 8}}, "damaged: grid: .*does not divide"),
        ({"name": 3}, "damaged: name"),
        ({"colour": 3}, "damaged: colour"),
        ({"sensor": {**INFO.sensor.model_dump(mode="json"), "dtype": "float64"}}, "sensor.dtype"),
    ],
)
def test_a_damaged_dataset_is_an_error_that_names_the_field(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(GeoLinkError, match=says):
        read_info(_write(tmp_path, change))


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_a_file_that_is_no_json_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(GeoLinkError, match="cannot read"):
        read_info(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "{}"])
def test_json_that_is_no_dataset_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(GeoLinkError, match="is damaged"):
        read_info(tmp_path)


def test_only_published_snapshots_count(tmp_path: Path) -> None:
    assert snapshot_numbers(tmp_path) == []
    for number in (12, 2, 1):
        (tmp_path / snapshot_name(number)).parent.mkdir(exist_ok=True)
        (tmp_path / snapshot_name(number)).touch()
    for name in ("3.parquet", "00000004.parquet.tmp", ".00000005.parquet", "x0000006.parquet"):
        (tmp_path / "snapshots" / name).touch()
    assert snapshot_numbers(tmp_path) == [1, 2, 12]
    assert (tmp_path / snapshot_name(12)).name == "00000012.parquet"


def test_tags_lie_by_vocabulary_and_encoder(tmp_path: Path) -> None:
    assert (tmp_path / vocabulary_name("ab12")) == tmp_path / "tags" / "ab12.parquet"
    assert (tmp_path / tag_table_name("ab12", "wordllama")).name == "ab12-wordllama.npy"
