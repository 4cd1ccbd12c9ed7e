"""Exports, read back by other libraries and compared with the shards they were made from."""

import json
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pyproj
import pystac
import pytest
import rasterio
from click.testing import CliRunner
from PIL import Image

from flows import export as module
from flows.export import FORMATS, export
from geolink.cli.main import cli, main
from geolink.export.pyg import read_pyg
from geolink.reader import Dataset, open_dataset, read_shard
from schemas.chips import ShardPart, take_chips
from schemas.errors import GeoLinkError
from schemas.layout import LAYOUT, UNKNOWN_TIME, Kind, Relation, validate
from schemas.sensor import SENTINEL_2_L2A
from tests.shards import make_dataset, random_arrays

SHARDS, CHIPS = 3, 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("dataset") / "d"
    make_dataset(folder, shards=SHARDS, chips=CHIPS, splits=("train", "val"), sensor=SENTINEL_2_L2A)
    return open_dataset(folder)


@pytest.fixture(scope="module")
def exported(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "e"
    result = export(dataset.path, folder, FORMATS)
    assert (result.shards, result.chips) == (SHARDS, SHARDS * CHIPS)
    assert result.written == SHARDS * len(FORMATS)
    return folder


def parts(dataset: Dataset) -> list[ShardPart]:
    return [ShardPart(dataset.info, r, read_shard(dataset, r)) for r in dataset.rows]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_chips_that_are_taken_out_are_whole() -> None:
    arrays = random_arrays(5, chips=6, objects=9)
    taken = take_chips(arrays, np.array([1, 4]))
    assert validate(taken)["chip"] == 2
    for n, chip in enumerate((1, 4)):
        for name in ("image", "bounds", "label_patch"):
            np.testing.assert_array_equal(taken[name][n], arrays[name][chip])
        here = slice(*taken["edge_offset"][n : n + 2])
        there = slice(*arrays["edge_offset"][chip : chip + 2])
        np.testing.assert_array_equal(taken["edge"][here], arrays["edge"][there])
        ours = range(*taken["object_offset"][n : n + 2])
        theirs = range(*arrays["object_offset"][chip : chip + 2])
        for a, b in zip(ours, theirs, strict=True):
            assert taken["object_osm"][a] == arrays["object_osm"][b]
            for values, offset in (("object_tag", "object_tag_offset"), ("patch", "patch_offset")):
                np.testing.assert_array_equal(
                    taken[values][slice(*taken[offset][a : a + 2])],
                    arrays[values][slice(*arrays[offset][b : b + 2])],
                )
    everything = take_chips(arrays, np.arange(6))
    for spec in LAYOUT:
        np.testing.assert_array_equal(everything[spec.name], arrays[spec.name])


def test_rasterio_reads_a_geotiff_with_all_that_it_means(dataset: Dataset, exported: Path) -> None:
    for part in parts(dataset):
        for n, stem in enumerate(part.stems):
            with rasterio.open(exported / f"images/{part.shard}/{stem}.tif") as file:
                np.testing.assert_array_equal(file.read(), part.arrays["image"][n])
                assert tuple(file.bounds) == tuple(part.arrays["bounds"][n])
                assert file.crs.to_epsg() == part.arrays["epsg"][n]
                assert file.descriptions == tuple(b.name for b in dataset.info.sensor.bands)
                assert (file.nodata, set(file.scales), set(file.offsets)) == (0, {1e-4}, {0.0})
                assert file.tags()["ACQUISITION"] == part.times[n].strftime("%Y-%m-%dT%H:%M:%SZ")
                assert file.tags().get("LICENCE", "") == dataset.info.licence


def test_the_colours_of_a_png_map_back_to_its_classes(dataset: Dataset, exported: Path) -> None:
    legend = json.loads((exported / "labels/legend.json").read_bytes())
    value = {tuple(bytes.fromhex(e["color"][1:])): e["value"] for e in legend if e["value"]}
    assert [e["name"] for e in legend] == ["none", *dataset.info.taxonomy.names]
    for part in parts(dataset):
        for mask, stem, box in zip(
            part.arrays["label_pixel"], part.stems, part.arrays["bounds"], strict=True
        ):
            path = exported / f"labels/{part.shard}/{stem}.png"
            pixels = np.asarray(Image.open(path).convert("RGBA"))
            back = [[0 if p[3] == 0 else value[tuple(p[:3].tolist())] for p in r] for r in pixels]
            np.testing.assert_array_equal(back, mask)
            with rasterio.open(path) as file:
                np.testing.assert_array_equal(file.read(1), mask)
                assert file.crs.to_epsg() == 32632
                assert tuple(file.bounds) == tuple(box)


def test_geopandas_reads_objects_where_they_are(dataset: Dataset, exported: Path) -> None:
    for part in parts(dataset):
        a = part.arrays
        objects = geopandas.read_parquet(exported / f"tables/objects/{part.shard}.parquet")
        assert objects.crs == "OGC:CRS84"
        assert len(objects) == len(a["object_kind"])
        metres = objects.geometry.to_crs(32632)
        texts = part.tag_texts()
        chip = np.repeat(np.arange(CHIPS), np.diff(a["object_offset"]))
        for n, row in enumerate(objects.itertuples()):
            x0, y0, x1, y1 = a["bounds"][chip[n]]
            x, y = a["object_anchor"][n, 0]
            expected = (x0 + float(x) * (x1 - x0), y1 - float(y) * (y1 - y0))
            assert metres[n].coords[0] == pytest.approx(expected, abs=1e-3)
            assert row.chip == part.names[chip[n]]
            assert row.kind == Kind(a["object_kind"][n]).name.lower()
            assert row.osm_id == a["object_osm"][n] >> 2
            tags = a["object_tag"][slice(*a["object_tag_offset"][n : n + 2])]
            assert sorted("=".join(pair) for pair in row.tags) == sorted(texts[t] for t in tags)


def test_relations_join_to_their_objects(dataset: Dataset, exported: Path) -> None:
    part = parts(dataset)[0]
    objects = pq.read_table(exported / f"tables/objects/{part.shard}.parquet").to_pandas()
    relations = pq.read_table(exported / f"tables/relations/{part.shard}.parquet").to_pandas()
    joined = relations.merge(
        objects, left_on=["chip", "target"], right_on=["chip", "object"], validate="many_to_one"
    )
    chip = np.repeat(np.arange(CHIPS), np.diff(part.arrays["edge_offset"]))
    ids = part.arrays["object_osm"][part.arrays["object_offset"][chip] + part.arrays["edge"][:, 1]]
    assert sorted(joined["osm_id"]) == sorted(ids >> 2)
    assert set(relations["relation"]) <= {r.name.lower() for r in Relation}


def test_the_footprints_of_chips_are_their_squares(dataset: Dataset, exported: Path) -> None:
    for part in parts(dataset):
        chips = geopandas.read_parquet(exported / f"tables/chips/{part.shard}.parquet")
        assert list(chips["chip"]) == part.names
        np.testing.assert_allclose(
            chips.geometry.to_crs(32632).bounds, part.arrays["bounds"], atol=1e-3
        )
        assert set(chips["split"]) == {part.row.split}


def test_webdataset_reads_the_tars(dataset: Dataset, exported: Path) -> None:
    import webdataset

    for part in parts(dataset):
        tar = exported / f"webdataset/{part.row.split}/{part.shard}.tar"
        samples = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode())
        assert [s["__key__"] for s in samples] == [f"{part.shard}_{s}" for s in part.stems]
        for n, sample in enumerate(samples):
            np.testing.assert_array_equal(sample["image.npy"], part.arrays["image"][n])
            np.testing.assert_array_equal(sample["label_pixel.npy"], part.arrays["label_pixel"][n])
            graph = sample["graph.npz"]
            edges = slice(*part.arrays["edge_offset"][n : n + 2])
            np.testing.assert_array_equal(graph["edge"], part.arrays["edge"][edges])
            first, last = part.arrays["object_offset"][n : n + 2]
            tags = [sample["json"]["tags"][i] for i in graph["object_tag"]]
            rows = part.arrays["object_tag"][
                slice(*part.arrays["object_tag_offset"][[first, last]])
            ]
            assert tags == [part.tag_texts()[i] for i in rows]
            assert sample["json"]["chip"] == part.names[n]


def test_edges_of_the_graphs_are_those_of_the_shard(dataset: Dataset, exported: Path) -> None:
    vocabulary = pq.read_table(exported / "pyg/tags.parquet")
    assert len(np.load(exported / "pyg/tags.npy")) == len(vocabulary)
    for part in parts(dataset):
        path = exported / f"pyg/{part.row.split}/{part.shard}.pt"
        for n, graph in enumerate(read_pyg(path)):
            assert graph.chip == part.names[n]
            np.testing.assert_array_equal(graph.image[0].numpy(), part.arrays["image"][n])
            found = set()
            for source, relation, target in graph.edge_types:
                a, b = graph[source, relation, target].edge_index.numpy()
                ids = graph[source].osm_id.numpy()[a], graph[target].osm_id.numpy()[b]
                found |= {(int(i), relation, int(j)) for i, j in zip(*ids, strict=True)}
            first, last = part.arrays["edge_offset"][n : n + 2]
            osm = part.arrays["object_osm"][part.arrays["object_offset"][n] :]
            assert found == {
                (int(osm[i]), Relation(r).name.lower(), int(osm[j]))
                for (i, j), r in zip(
                    part.arrays["edge"][first:last], part.arrays["relation"][first:last],
                    strict=True,
                )
            }  # fmt: skip


def test_every_item_is_found_from_the_catalog_and_every_file_from_its_item(
    dataset: Dataset, exported: Path
) -> None:
    catalog = pystac.Catalog.from_file(str(exported / "stac/catalog.json"))
    items = list(catalog.get_items(recursive=True))
    assert {i.id for i in items} == {r.shard for r in dataset.rows}
    linked = set()
    for item in items:
        for asset in item.get_assets().values():
            path = Path(asset.get_absolute_href() or "")
            assert path.exists(), path
            linked.add(path.resolve())
    written = {
        p.resolve() for p in exported.rglob("*")
        if p.suffix in (".tif", ".png", ".tar", ".pt") or p.parent.parent.name == "tables"
    }  # fmt: skip
    assert written < linked
    collection = catalog.get_child("fabricated")
    assert collection is not None
    assert collection.get_single_link("license") is not None


def test_stac_validator_finds_nothing_wrong_but_what_was_planted(
    exported: Path, tmp_path: Path
) -> None:
    # The schemas of the STAC core come with pystac; those of extensions lie on the web only.
    from stac_validator.validate import StacValidate

    local = {}
    for path in (Path(pystac.__file__).parent / "validation/jsonschemas").rglob("*.json"):
        for kind in ("item", "collection", "catalog"):
            core = f"https://schemas.stacspec.org/v1.1.0/{kind}-spec/json-schema"
            local[f"{core}/{path.name}"] = str(path)
        local |= {path.name: str(path), f"https://geojson.org/schema/{path.name}": str(path)}

    def valid(path: Path) -> bool:
        validator = StacValidate(str(path), core=True, schema_map=dict(local))
        validator.run()
        return bool(validator.valid)

    paths = sorted((exported / "stac").rglob("*.json"))
    assert len(paths) == SHARDS + 2
    assert all(valid(path) for path in paths)
    for field in ("geometry", "assets", "links", "id"):
        broken = json.loads(paths[-1].read_bytes())
        del broken[field]
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        assert not valid(tmp_path / "broken.json")


def test_pystac_reads_what_the_extensions_say(dataset: Dataset, exported: Path) -> None:
    from pystac.extensions.classification import ClassificationExtension
    from pystac.extensions.label import LabelExtension, LabelType
    from pystac.extensions.projection import ProjectionExtension
    from pystac.extensions.table import TableExtension

    names = ["none", *dataset.info.taxonomy.names]
    for part in parts(dataset):
        item = pystac.Item.from_file(str(exported / f"stac/items/{part.shard}.json"))
        assert ProjectionExtension.ext(item).code == "EPSG:32632"
        label = LabelExtension.ext(item)
        assert (label.label_type, label.label_properties) == (LabelType.RASTER, None)
        assert label.label_classes is not None
        assert label.label_classes[0].classes == names
        table = TableExtension.ext(item.assets["objects"])
        assert table.row_count == len(part.arrays["object_kind"])
        assert table.columns is not None
        assert {c.name for c in table.columns} >= {"chip", "osm_id", "tags", "geometry"}
        for stem, box in zip(part.stems, part.arrays["bounds"], strict=True):
            image = item.assets[f"{stem}.image"]
            assert ProjectionExtension.ext(image).bbox == box.tolist()
            assert [b["name"] for b in image.extra_fields["bands"]] == [
                b.name for b in dataset.info.sensor.bands
            ]
            classes = ClassificationExtension.ext(item.assets[f"{stem}.label"]).classes
            assert classes is not None
            assert [c.name for c in classes] == names


def test_exporting_again_does_nothing_and_a_killed_one_goes_on(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = ("geotiff", "png", "webdataset")
    export(dataset.path, tmp_path / "whole", formats)
    before = files(tmp_path / "whole")
    assert export(dataset.path, tmp_path / "whole", formats).written == 0
    assert files(tmp_path / "whole") == before

    writers, calls = module._writers, []

    def failing(*arguments: Any) -> Any:
        def write(part: ShardPart, name: str, inner: Any) -> None:
            calls.append(name)
            if len(calls) == 5:
                raise KeyboardInterrupt
            inner(part)

        return {
            name: lambda part, name=name, inner=inner: write(part, name, inner)
            for name, inner in writers(*arguments).items()
        }

    monkeypatch.setattr(module, "_writers", failing)
    with pytest.raises(KeyboardInterrupt):
        export(dataset.path, tmp_path / "killed", formats)
    monkeypatch.undo()
    assert export(dataset.path, tmp_path / "killed", formats).written == 5
    assert files(tmp_path / "killed") == before


def test_a_selection_is_what_was_asked_for(dataset: Dataset, tmp_path: Path) -> None:
    def chips(folder: Path) -> set[str]:
        return {p.stem.partition("_")[0] for p in folder.rglob("*.tif")}

    every = {n for part in parts(dataset) for n in part.names}
    export(dataset.path, tmp_path / "val", ("geotiff",), split="val")
    assert chips(tmp_path / "val") == set(parts(dataset)[1].names)
    assert export(dataset.path, tmp_path / "few", ("geotiff",), limit=7).chips == 7
    assert len(chips(tmp_path / "few")) == 7
    centre = {
        name: lonlat
        for part in parts(dataset)
        for name, lonlat in zip(part.names, part.arrays["center_lonlat"], strict=True)
    }
    lon = sorted(c[0] for c in centre.values())
    for turn in (0, 360):
        box = (lon[0] - 1e-6 + turn, -80.0, lon[6] + 1e-6 + turn, 84.0)
        export(dataset.path, tmp_path / f"box{turn}", ("geotiff",), bbox=box)
        assert chips(tmp_path / f"box{turn}") == {n for n in every if centre[n][0] <= lon[6] + 1e-6}


def test_licence_and_attribution_go_with_every_export(dataset: Dataset, exported: Path) -> None:
    assert dataset.info.licence in (exported / "LICENSE").read_text()
    assert (exported / "ATTRIBUTION").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "shapefile"], "unknown format 'shapefile'; known: geotiff"),
        (["--format", "png", "--split", "dev"], "unknown split 'dev'"),
        (["--format", "png", "--split", "test"], "no chip to export in split test"),
        (["--format", "png", "--bbox", "5", "1", "4", "2"], "no area"),
        (["--format", "png", "--bbox", "50", "1", "51", "2"], "no chip to export"),
        (["--format", "png", "--limit", "0"], "less than one chip"),
        (["--format", "png", "--snapshot", "9"], "no snapshot 9"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    folder = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        main(["export", str(dataset.path), str(folder), *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_a_folder_of_something_else_is_left_alone(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(GeoLinkError, match="not empty"):
        export(dataset.path, tmp_path, ("png",))
    assert files(tmp_path) == {"mine.txt": b"keep"}
    export(dataset.path, tmp_path / "a", ("png",), limit=2)
    with pytest.raises(GeoLinkError, match="another dataset, snapshot or selection"):
        export(dataset.path, tmp_path / "a", ("png",), limit=3)


def test_the_command_prints_what_it_did(dataset: Dataset, tmp_path: Path) -> None:
    command = ["export", str(dataset.path), str(tmp_path / "o"), "--format", "png", "--json"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["chips"] == SHARDS * CHIPS


def test_a_catalog_hears_of_formats_that_are_added_later(dataset: Dataset, tmp_path: Path) -> None:
    export(dataset.path, tmp_path, ("stac",), limit=2)
    export(dataset.path, tmp_path, ("png",), limit=2)
    item = json.loads(next((tmp_path / "stac/items").glob("*.json")).read_bytes())
    assert sum(name.endswith(".label") for name in item["assets"]) == 2


def test_a_footprint_across_the_180th_meridian_is_cut_there(dataset: Dataset) -> None:
    from pipelines.export.stac import _bbox, footprint

    part = parts(dataset)[0]
    arrays = dict(part.arrays)
    to_utm = pyproj.Transformer.from_crs(4326, 32660, always_xy=True)
    x, y = to_utm.transform(180.0, 10.0)
    column = np.arange(CHIPS) - 2
    west = x + 320.0 * column - 160
    arrays["bounds"] = np.stack([west, 0 * west + y, west + 320, 0 * west + y + 320], axis=1)
    arrays["epsg"] = np.full(CHIPS, 32660, np.int32)
    lonlat = to_utm.transform(west + 160, 0 * west + y + 160, direction="INVERSE")
    arrays["center_lonlat"] = np.stack(lonlat, axis=1)
    arrays["center_lonlat"][:, 0] = np.abs(arrays["center_lonlat"][:, 0])
    area = footprint(part._replace(arrays=arrays))
    assert area.geom_type == "MultiPolygon"
    assert area.bounds[0] == -180
    assert area.bounds[2] == 180
    lon_min, _, lon_max, _ = _bbox(area)
    assert lon_min > 179 > -179 > lon_max
    arrays["time"] = np.full(CHIPS, UNKNOWN_TIME)
    assert part._replace(arrays=arrays).stems == part._replace(arrays=arrays).names


def test_tars_are_the_same_bytes_for_the_same_chips(dataset: Dataset, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(dataset.path, tmp_path / name, FORMATS[:4], limit=3)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_shard_without_objects_is_exported_in_every_format(tmp_path: Path) -> None:
    empty = make_dataset(tmp_path / "dataset", shards=1, chips=2, objects=0.0)
    done = export(empty, tmp_path / "exported", FORMATS)
    assert done.chips == 2
    tables = pq.read_table(next((tmp_path / "exported/tables/objects").glob("*.parquet")))
    assert tables.num_rows == 0
