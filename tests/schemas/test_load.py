"""A mistake in a config file is one sentence: file, line, field, and what to do."""

import re
from pathlib import Path

import pytest

from schemas.config import DatasetConfig, Splits
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from schemas.load import load_config
from schemas.sources import Region, SceneSource
from schemas.training import TrainConfig

GOOD = """\
name: monaco
dataset: out/monaco
region: {bbox: [7.3, 43.6, 7.5, 43.8]}
grid:
  gsd_m: 10
  size: 64
  patch: 8
sensor: sentinel-2-l2a
scenes:
  stac: catalog/catalog.json
  start: 2025-05-01
  max_cloud: 20
osm:
  pbf: monaco.osm.pbf
"""


def _load(tmp_path: Path, text: str) -> DatasetConfig:
    path = tmp_path / "town.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, DatasetConfig)


def _message(tmp_path: Path, text: str) -> str:
    with pytest.raises(GeoLinkError) as caught:
        _load(tmp_path, text)
    return str(caught.value)


def test_relative_paths_are_taken_from_the_configs_folder(tmp_path: Path) -> None:
    config = _load(tmp_path, GOOD)
    assert config.dataset == tmp_path / "out" / "monaco"
    assert config.osm is not None
    assert config.osm.pbf == (str(tmp_path / "monaco.osm.pbf"),)
    assert config.scenes is not None
    assert config.scenes.stac == str(tmp_path / "catalog" / "catalog.json")
    assert config.scenes.start is not None
    assert config.scenes.start.utcoffset() is not None


def test_weights_to_start_from_are_a_path_unless_they_are_of_timm(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    for start, expected in (
        ("runs/a", str(tmp_path / "runs" / "a")), ("timm:vit_base", "timm:vit_base"),
        ("/x/weights.pth", "/x/weights.pth"),
    ):  # fmt: skip
        path.write_text(f"dataset: d\nrun: r\nstart: {start}\n")
        assert load_config(path, TrainConfig).start == expected


def test_absolute_paths_and_urls_are_left_alone(tmp_path: Path) -> None:
    text = GOOD.replace("catalog/catalog.json", "https://example.org/v1")
    config = _load(tmp_path, text.replace("monaco.osm.pbf", "/data/monaco.osm.pbf"))
    assert config.scenes is not None
    assert config.scenes.stac == "https://example.org/v1"
    assert config.osm is not None
    assert config.osm.pbf == ("/data/monaco.osm.pbf",)


def test_globs_of_rasters_are_taken_from_the_configs_folder(tmp_path: Path) -> None:
    text = GOOD.replace("stac: catalog/catalog.json", "rasters: [tiles/*.tif, /abs/*.tif]")
    config = _load(tmp_path, text)
    assert config.scenes is not None
    assert config.scenes.rasters == (str(tmp_path / "tiles/*.tif"), "/abs/*.tif")


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("patch: 8", "pach: 8", 7, "unknown key 'grid.pach'; did you mean 'patch'?"),
        ("region:", "regoin:", 3, "unknown key 'regoin'; did you mean 'region'?"),
        ("max_cloud", "clouds_max", 12, "unknown key 'scenes.clouds_max'; "),
        ("pbf: monaco", "file: monaco", 14, "unknown key 'osm.file'; "),
        ("  pbf: monaco", "  find: moon\n  x: monaco", 14, "osm.find: Input should be 'any'"),
        ("name: monaco\n", "", None, "key 'name' is missing"),
        ("size: 64", "size: large", 6, "grid.size: .*integer.*given: 'large'"),
        ("size: 64", "size: 65", 4, "grid: patch 8 does not divide size 65"),
        ("gsd_m: 10", "gsd_m: -10", 5, "grid.gsd_m: .*greater than 0.*given: -10"),
        ("patch: 8", "patch: 64", None, "grid: a chip needs at least 2 patches a side"),
        ("max_cloud: 20", "max_cloud: 120", 12, "scenes.max_cloud: .*100"),
        ("start: 2025-05-01", "start: yesterday", 11, "scenes.start: "),
        ("[7.3, 43.6, 7.5, 43.8]", "[7.5, 43.6, 7.3, 43.8]", 3, "region: bbox .* has no area"),
        ("[7.3, 43.6, 7.5, 43.8]", "[43.6, 7.3, 143.8, 97.5]", 3, "region: .*not in degrees"),
        ("[7.3, 43.6, 7.5, 43.8]", "[7.3, 43.6, 7.5]", 3, "key 'region.bbox.3' is missing"),
        ("bbox: [7.3, 43.6, 7.5, 43.8]", "", 3, "region: give exactly one of bbox, geojson, file"),
        ("  stac:", "  rasters: [a.tif]\n  stac:", 9, "scenes: give exactly one of stac, rasters"),
        ("osm:\n  pbf: monaco.osm.pbf\n", "", None, r"osm is missing \(or give pairs\)"),
        ("osm:", "pairs: folder\nosm:", None, "give either pairs or region, scenes and osm"),
        ("sensor: sentinel-2-l2a", "sensor: {preset: naip, band: [red]}", 8,
         "unknown key 'sensor.band'; did you mean 'bands'?"),
        ("sensor: sentinel-2-l2a", "sensor: {name: x, dtype: float32}", 8, "sensor.dtype"),
        ("osm:", "splits: {train: 0.9}\nosm:", 13, "splits: train, val and test add up to 1.1"),
        ("osm:", "objects: {max_per_chip: 0}\nosm:", 13, "objects.max_per_chip"),
        ("osm:", "tag_encoder: bert\nosm:", 13, "tag_encoder: .*'wordllama'"),
        ("name: monaco", "name: a/b", 1, "name: .*given: 'a/b'"),
    ],
)  # fmt: skip
def test_a_mistake_names_file_line_field_and_remedy(
    tmp_path: Path, old: str, new: str, line: int | None, says: str
) -> None:
    assert old in GOOD
    message = _message(tmp_path, GOOD.replace(old, new))
    where = re.escape(str(tmp_path / "town.yaml")) + (f":{line}" if line else r"(:\d+)?")
    assert any(re.match(f"{where}: {says}", sentence) for sentence in message.splitlines()), message
    assert "pydantic" not in message


def test_all_mistakes_of_a_file_are_listed(tmp_path: Path) -> None:
    text = GOOD.replace("patch: 8", "pach: 8").replace("max_cloud: 20", "max_cloud: 120")
    message = _message(tmp_path, text)
    assert "town.yaml:7: unknown key 'grid.pach'" in message
    assert "town.yaml:12: scenes.max_cloud" in message


def test_a_misspelt_key_in_a_list_of_bands_is_named_with_the_right_one(tmp_path: Path) -> None:
    table = """sensor:
  name: mine
  dtype: uint8
  bands:
    - {name: red, asset: image}
    - {name: nir, asset: image, indx: 2}
"""
    message = _message(tmp_path, GOOD.replace("sensor: sentinel-2-l2a\n", table))
    assert "town.yaml:13: unknown key 'sensor.bands.1.indx'; did you mean 'index'?" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: [a\n", r"town\.yaml:\d+: not valid YAML"),
        ("- a\n- b\n", "a config is a mapping of keys to values"),
        ("", "a config is a mapping of keys to values"),
        ("just words", "a config is a mapping of keys to values"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_an_error(tmp_path: Path, text: str, says: str) -> None:
    assert re.search(says, _message(tmp_path, text))


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match=r"cannot read config .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml", DatasetConfig)
    with pytest.raises(GeoLinkError, match="cannot read config"):
        load_config(tmp_path, DatasetConfig)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(GeoLinkError, match="cannot read config"):
        load_config(tmp_path / "latin.yaml", DatasetConfig)


def test_json_is_a_config_too(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('{"dataset": "d", "run": "r", "epochs": 3}')
    config = load_config(path, TrainConfig)
    assert (config.epochs, config.run) == (3, tmp_path / "r")
    path.write_text('{"dataset": "d",\n "run": "r",\n "epoch": 3}')
    with pytest.raises(GeoLinkError, match=r"train\.json:3: unknown key 'epoch'; .*'epochs'"):
        load_config(path, TrainConfig)


def test_the_example_configs_are_valid() -> None:
    folder = Path(__file__).resolve().parents[2] / "examples"
    models = {"train": TrainConfig, "evaluate": TaskConfig}
    examples = sorted(folder.glob("*.yaml"))
    assert examples
    for path in examples:
        load_config(path, models.get(path.stem, DatasetConfig))


def test_a_config_cannot_be_changed() -> None:
    splits = Splits()
    with pytest.raises(ValueError, match="frozen"):
        splits.train = 0.5  # type: ignore[misc]


def test_a_region_may_cross_the_antimeridian() -> None:
    assert Region(bbox=(179.9, -17.0, 180.1, -16.9)).bbox == (179.9, -17.0, 180.1, -16.9)


def test_times_without_a_zone_are_utc() -> None:
    source = SceneSource.model_validate({"stac": "x", "start": "2025-05-01T10:00:00"})
    assert source.start is not None
    assert source.start.isoformat() == "2025-05-01T10:00:00+00:00"
    with pytest.raises(ValueError, match=r"start .* is after end"):
        SceneSource.model_validate({"stac": "x", "start": "2025-05-01", "end": "2024-05-01"})
