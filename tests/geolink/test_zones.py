"""Zones and villages: published samples as they are, stand-ins in which the map tells the label."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from geolink.tasks.contracts import IGNORE
from geolink.tasks.evaluate import evaluate
from geolink.tasks.sources import open_data
from geolink.tasks.sources.graph_files import join_graphs, read_graph
from geolink.tasks.sources.zones import ZONES, most_of_patches
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from tests.shards import make_dataset
from tests.tasks import make_checkpoint

TEXT, SIZE = 16, 32
WIDTH = {"point": 2, "line": 6, "polygon": 8}
TOLD = ("green", "residential", "industrial")
"""Zones of the stand-in."""


def graph_arrays(
    text: NDArray[Any], kind: NDArray[Any], rng: np.random.Generator
) -> dict[str, Any]:
    """Nodes [M, TEXT] of kinds [M] at random places, each with an edge to itself but points and
    lines, which also touch the next polygon."""
    arrays: dict[str, Any] = {}
    count = {name: int((kind == k).sum()) for k, name in enumerate(WIDTH)}
    for k, (name, width) in enumerate(WIDTH.items()):
        place = rng.random((count[name], width))
        arrays[f"x__{name}"] = np.c_[text[kind == k], place].astype(np.float32)
    for a, b in product(WIDTH, WIDTH):
        same = a == b
        here = np.arange(count[a] if same else min(count[a], count[b]))
        codes = (2 if a == "point" else 6) if same else (2 if "point" in (a, b) else 3)
        arrays[f"edge_index__{a}__to__{b}"] = np.stack([here, here])
        arrays[f"edge_attr__{a}__to__{b}"] = np.eye(codes, dtype=np.float32)[np.zeros_like(here)]
    return arrays


def write_sample(path: Path, zone: int, rng: np.random.Generator, objects: int) -> None:
    """Noise, most of which is of one zone, with objects whose texts tell which."""
    meaning = np.random.default_rng(7).normal(0, 1, (10, TEXT))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = rng.integers(1, 255, (SIZE, SIZE, 3)).astype(np.uint8)
    Image.fromarray(image).save(path.with_name(f"{path.name}_img.png"))
    label = np.full((SIZE, SIZE), zone, np.uint8)
    label[:4], label[4:8], label[8:10] = 0, IGNORE, 1
    Image.fromarray(label).save(path.with_name(f"{path.name}_label.png"))
    text = meaning[zone] + rng.normal(0, 0.3, (objects, TEXT))
    arrays = graph_arrays(text, rng.integers(0, 3, objects), rng)
    np.savez(path.with_name(f"{path.name}_graph.npz"), **arrays)


def make_zones(
    folder: Path, count: int = 36, splits: tuple[str, ...] = ("train", "val", "test")
) -> Path:
    """Samples in the published layout, of three zones in turn; the first of each split has no
    object."""
    for number, split in enumerate(splits):
        rng = np.random.default_rng(number)
        for n in range(count):
            zone = 1 + ZONES.index(TOLD[n % 3])
            write_sample(folder / split / f"s{n:02}", zone, rng, 5 if n else 0)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("run") / "run", variant="geolink2")


@pytest.fixture(scope="module")
def zones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zones(tmp_path_factory.mktemp("zones") / "zones")


def config(run: Path | str, data: Path, **changes: Any) -> TaskConfig:
    training = {"epochs": 8, "batch_size": 12, "lr": [5e-3], "head": "linear", "layer_decay": 1.0}
    training |= changes.pop("training", {})
    return TaskConfig(**{
        "task": "zones", "checkpoint": run, "data": data, "training": training, "bootstrap": 50,
        "baselines": ("majority",), **changes,
    })  # fmt: skip


@pytest.mark.parametrize("training", [{"epochs": 12}, {"epochs": 30, "lr": [5e-2], "freeze": True}])
def test_a_map_that_tells_the_zone_beats_an_image_that_does_not(
    run: Path, zones: Path, training: dict[str, Any]
) -> None:
    result = evaluate(config(
        run, zones, inputs="image+osm", baselines=("image-only", "osm-only", "majority"),
        training=training,
    ))  # fmt: skip
    assert result["class_names"] == list(TOLD)
    scores = {method: s["score"]["accuracy"] for method, s in result["scores"].items()}
    assert scores["encoder"] > 0.85
    assert scores["osm-only"] > 0.85
    assert scores["majority"] == pytest.approx(1 / 3)
    for less in ("image-only", "majority"):
        assert result["scores"][less]["difference"]["accuracy"][1] > 0.2
    assert "3 of 108 images have no OSM object" in result["notes"]


@pytest.mark.parametrize("labels", ["pixel", "patch"])
def test_zones_of_pixels_and_patches_are_learnt(run: Path, zones: Path, labels: str) -> None:
    result = evaluate(config(run, zones, inputs="image+osm", labels=labels))
    assert result["kind"] == "mask"
    assert result["class_names"] == list(ZONES)
    ours, theirs = (result["scores"][m]["score"]["mean_iou"] for m in ("encoder", "majority"))
    assert ours > theirs + 0.2
    pixels = np.array(result["scores"]["encoder"]["confusion"]).sum(1)
    # Eight rows are not scored, two are water; of a patch of 16 rows six and two are left.
    water, zone = (2, 22) if labels == "pixel" else (0, 32)
    assert pixels[0] == 36 * SIZE * water
    assert pixels[ZONES.index("green")] == 12 * SIZE * zone
    with pytest.raises(GeoLinkError, match="inputs osm have none: use image or image"):
        evaluate(config(run, zones, inputs="osm", labels=labels))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_patch_is_of_the_class_of_most_of_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (2, 6, 9), p=[0.2, 0.2, 0.1, 0.5])
    found = most_of_patches(mask, 3)
    assert found.shape == mask.shape
    for n, y, x in product(range(2), range(0, 6, 3), range(0, 9, 3)):
        square = mask[n, y : y + 3, x : x + 3]
        counts = [int((square == c).sum()) for c in range(3)]
        expected = counts.index(max(counts)) if max(counts) else IGNORE
        assert (found[n, y : y + 3, x : x + 3] == expected).all()


def village_folder(folder: Path, names: tuple[str, ...] = ("other", "village")) -> Path:
    for number, split in enumerate(("train", "val", "test")):
        rng = np.random.default_rng(10 + number)
        for n in range(24):
            name = names[n % len(names)]
            write_sample(folder / split / name / f"{n}", 1 + n % len(names), rng, 4)
            (folder / split / name / f"{n}_label.png").unlink()
    return folder


def test_villages_are_told_by_the_map_in_folders_by_class(run: Path, tmp_path: Path) -> None:
    folder = village_folder(tmp_path / "v")
    result = evaluate(config(
        run, folder, task="villages", inputs="image+osm", baselines=("image-only", "majority"),
        output=tmp_path / "out",
    ))  # fmt: skip
    assert result["class_names"] == ["other", "village"]
    assert result["scores"]["encoder"]["score"]["accuracy"] > 0.9
    assert result["scores"]["image-only"]["difference"]["accuracy"][1] > 0.1
    village = result["scores"]["encoder"]["by_class"][1]
    assert village["class"] == "village"
    assert village["f1"] > 0.9
    assert "village" in (tmp_path / "out" / "result.md").read_text()
    three = village_folder(tmp_path / "three", ("a", "b", "c"))
    with pytest.raises(GeoLinkError, match="tells two classes apart, three has 3: a, b, c"):
        evaluate(config(run, three, task="villages"))


def test_label_maps_of_villages_have_two_classes(run: Path, tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val", "test")):
        rng = np.random.default_rng(number)
        for n in range(6):
            write_sample(tmp_path / "v" / split / f"{n}", 1 + n % 2, rng, 4)
    data = open_data(config(run, tmp_path / "v", task="villages"))
    assert data.classes == ("other", "urban village")
    assert data.part("train").label.tolist() == [0, 1] * 3  # type: ignore[union-attr]
    (tmp_path / "v" / "classes.txt").write_text("town\nvillage\n")
    assert open_data(config(run, tmp_path / "v")).classes == ("town", "village")


@pytest.mark.parametrize("inputs", ["image", "osm", "image+osm"])
def test_zones_of_shards_are_evaluated(run: Path, tmp_path: Path, inputs: str) -> None:
    folder = make_dataset(
        tmp_path / "d", shards=3, chips=16, objects=0.0, splits=("train", "val", "test")
    )
    result = evaluate(config(run, folder, inputs=inputs, training={"epochs": 1}))
    assert result["kind"] == "class"
    total = sum(result["images"].values())
    note = f"{total} of {total} chips have no OSM object"
    assert (note in result["notes"]) == (inputs != "image")


def _remove_graph(folder: Path) -> None:
    (folder / "val" / "s03_graph.npz").unlink()


def _pickle_graph(folder: Path) -> None:
    path = folder / "val" / "s03_graph.npz"
    path.rename(path.with_suffix(".pt"))


def _objects_in_graph(folder: Path) -> None:
    np.savez(folder / "val" / "s03_graph.npz", x__point=np.array([{}], dtype=object))


def _no_graph(folder: Path) -> None:
    (folder / "val" / "s03_graph.npz").write_bytes(b"PK, but no more")


def _changed(**changes: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "val" / "s03_graph.npz"
        with np.load(path) as file:
            arrays = dict(file)
        for name, function in changes.items():
            arrays[name] = function(arrays[name])
        np.savez(path, **arrays)

    return change


def _wrong_number(folder: Path) -> None:
    Image.fromarray(np.full((SIZE, SIZE), 12, np.uint8)).save(folder / "val" / "s03_label.png")


def _wrong_size(folder: Path) -> None:
    Image.fromarray(np.ones((SIZE, 8), np.uint8)).save(folder / "val" / "s03_label.png")


def _remove_label(folder: Path) -> None:
    (folder / "val" / "s03_label.png").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_remove_graph, r"there is no graph .*s03_graph.npz: an image without objects"),
        (_pickle_graph, r"s03_graph.pt is pickled, and reading it could run code"),
        (_objects_in_graph, r"s03_graph.npz cannot be read: Object arrays cannot be loaded"),
        (_no_graph, r"s03_graph.npz cannot be read"),
        (_changed(x__line=lambda x: x[:, :4]), r"needs nodes x__line \[objects, text \+ 6"),
        (_changed(x__line=lambda x: x[:, 1:]), r"s03_graph.npz are of several lengths"),
        (_changed(x__point=lambda x: x + np.nan), r"texts that are not finite"),
        (_changed(x__point=lambda x: x + 3), r"places beyond 0 to 1"),
        (_changed(edge_index__line__to__line=lambda e: e + 9), "line to line .* ends at no node"),
        (_changed(edge_attr__line__to__line=lambda a: a * 0), "line to line .* not one relation"),
        (_changed(edge_attr__line__to__line=lambda a: a[:, :4]), r"edge_attr \[E, 6\]"),
        (_wrong_number, r"s03_label.png holds 12, but classes go from 1 to 9"),
        (_wrong_size, r"s03_label.png is \[32, 8\] \[y, x\], its image is \[32, 32\]"),
        (_remove_label, r"s03_img.png has no label map .*s03_label.png"),
    ],
)
def test_bad_samples_are_refused_in_a_sentence(
    damage: Callable[[Path], None], said: str, run: Path, tmp_path: Path
) -> None:
    folder = make_zones(tmp_path / "z", 6)
    damage(folder)
    with pytest.raises(GeoLinkError, match=said):
        open_data(config(run, folder))


def test_too_few_samples_are_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match="has no images of split test"):
        evaluate(config(run, make_zones(tmp_path / "a", 6, ("train", "val"))))
    folder = make_zones(tmp_path / "b", 6)
    for path in sorted((folder / "test").iterdir())[3:]:
        path.unlink()
    with pytest.raises(GeoLinkError, match=r"split test of .* has 1 labelled images, at least 2"):
        evaluate(config(run, folder))
    folder = make_zones(tmp_path / "c", 2)
    label = (folder / "train" / "s00_label.png").read_bytes()
    (folder / "train" / "s01_label.png").write_bytes(label)
    with pytest.raises(GeoLinkError, match=r"nothing to tell apart .* only class is green"):
        evaluate(config(run, folder))
    with pytest.raises(GeoLinkError, match=r"give .* labels region, patch and pixel, not object"):
        evaluate(config(run, tmp_path / "c", labels="object"))


def test_encoders_and_samples_without_objects_are_refused_in_a_sentence(
    run: Path, zones: Path, tmp_path: Path
) -> None:
    with pytest.raises(GeoLinkError, match="has no OSM encoder: use inputs: image"):
        evaluate(config("timm:vit_tiny_patch16_224", zones, inputs="image+osm"))
    folder = make_zones(tmp_path / "z", 3)
    for path in folder.glob("*/*_graph.npz"):
        path.unlink()
    assert not open_data(config(run, folder)).has_graphs
    with pytest.raises(GeoLinkError, match="z has no OSM objects: use inputs: image"):
        evaluate(config(run, folder, inputs="image+osm"))
    other = make_checkpoint(tmp_path / "other", tag_dim=12)
    with pytest.raises(GeoLinkError, match=r"shape \[105, 16\], not \[tags, 12\]"):
        evaluate(config(other, make_zones(tmp_path / "y", 8), inputs="osm"))


@pytest.fixture(scope="module")
def samples(shared: Path) -> list[Path]:
    """The published samples' graphs."""
    return sorted((shared / "data" / "ufz").glob("*_graph.npz"))


def test_published_graphs_are_read_as_they_are(samples: list[Path]) -> None:
    assert len(samples) == 3
    (graphs,), table = join_graphs([[read_graph(path) for path in samples]])
    names = ("self", "touches", "overlaps", "covers", "covered_by", "equals")
    for n, path in enumerate(samples):
        batch = graphs.take(np.array([n]))
        data = batch.to_pyg()
        with np.load(path) as file:
            for kind in WIDTH:
                x = file[f"x__{kind}"]
                assert np.array_equal(table[data[kind].tag.numpy()], x[:, :512])
                place = x[:, 512:].reshape(len(x), WIDTH[kind] // 2, 2)
                found = data[kind].anchor.numpy()
                assert np.array_equal(found[:, : place.shape[1]], place)
                assert np.array_equal(found[:, -1], place[:, -1] if len(place) else found[:, -1])
            edges = sum(file[name].shape[1] for name in file.files if "edge_index" in name)
            assert edges == batch.edge.shape[1]
            for kind in ("line", "polygon"):
                ends = file[f"edge_index__{kind}__to__{kind}"]
                code = file[f"edge_attr__{kind}__to__{kind}"].argmax(1)
                for number, name in enumerate(names):
                    expected = set(map(tuple, ends[:, code == number].T.tolist()))
                    there = data[kind, name, kind]
                    found = there.edge_index.T.tolist() if "edge_index" in there else []
                    assert set(map(tuple, found)) == expected
        for there, back in (("covered_by", "covers"), ("crosses", "crosses")):
            one, other = data["line", there, "polygon"], data["polygon", back, "line"]
            if "edge_index" in one:
                pairs = set(map(tuple, one.edge_index.T.tolist()))
                assert {(a, b) for b, a in other.edge_index.T.tolist()} == pairs


@pytest.mark.parametrize("labels", ["region", "pixel"])
@pytest.mark.parametrize("variant", ["paper", "geolink2"])
def test_published_samples_are_evaluated_in_splits_of_their_reflections(
    samples: list[Path], labels: str, variant: str, tmp_path: Path
) -> None:
    with pytest.raises(GeoLinkError, match=r"split val of .*ufz has 0 labelled images, at least 2"):
        open_data(config("run", samples[0].parent, labels=labels))
    for split, axis in (("train", None), ("val", 0), ("test", 1)):
        (tmp_path / "z" / split).mkdir(parents=True)
        for path in samples:
            place = tmp_path / "z" / split / path.name
            for name in ("_img.png", "_label.png"):
                old = path.with_name(path.name.replace("_graph.npz", name))
                array = np.asarray(Image.open(old))
                array = array if axis is None else np.flip(array, axis)
                Image.fromarray(array).save(place.with_name(old.name))
            with np.load(path) as file:
                arrays = dict(file)
            for kind in WIDTH if axis is not None else ():
                even = 512 + (1 - (axis or 0))
                arrays[f"x__{kind}"][:, even::2] = 1 - arrays[f"x__{kind}"][:, even::2]
            np.savez(place, **arrays)
    run = make_checkpoint(tmp_path / "run", tag_dim=512, variant=variant)
    result = evaluate(config(
        run, tmp_path / "z", labels=labels, inputs="image+osm", training={"epochs": 2}
    ))  # fmt: skip
    assert result["images"] == {"train": 3, "val": 3, "test": 3}
    if labels == "region":
        assert result["class_names"] == ["water", "undeveloped"]
    else:
        assert result["class_names"] == list(ZONES)
        # What is not scored in the three maps: 7,689 pixels.
        assert np.sum(result["scores"]["encoder"]["confusion"]) == 3 * 224**2 - 7689
