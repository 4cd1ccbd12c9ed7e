"""Maps of trained models: where they lie, what they say, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin
from rasterio.windows import Window

import flows.predict as flow
from flows.predict import predict
from geolink.checkpoint import model_tensors
from geolink.cli import main
from geolink.reader import open_dataset
from geolink.stream import read_chips
from geolink.tasks.evaluate import evaluate
from geolink.tasks.predict import open_predictor
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from schemas.grid import to_utm
from tests.shards import make_dataset, make_grid
from tests.tasks import make_checkpoint, make_npz

GSD = 2.0
DARK, BRIGHT = 60, 190


def paint(mask: Any, seed: int) -> Any:
    """Pixels [3, y, x] in which class 1 is bright."""
    rng = np.random.default_rng(seed)
    level = np.where(mask, BRIGHT, DARK) + rng.normal(0, 8, (3, *mask.shape))
    return level.clip(1, 255).astype(np.uint8)


def blobs(height: int, width: int, seed: int, side: int = 8) -> Any:
    """Squares of `side` pixels."""
    rng = np.random.default_rng(seed)
    small = rng.random((-(-height // side), -(-width // side))) < 0.4
    return np.kron(small, np.ones((side, side)))[:height, :width].astype(np.uint8)


def make_scene(path: Path, image: Any, **changes: Any) -> Path:
    profile = {
        "driver": "GTiff", "count": len(image), "height": image.shape[1], "width": image.shape[2],
        "dtype": "uint8", "crs": "EPSG:32633", "transform": from_origin(4e5, 5e6, GSD, GSD),
        "photometric": "RGB", **changes,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(image)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmentation of dark from bright, of image folders."""
    folder = tmp_path_factory.mktemp("model")
    run = make_checkpoint(folder / "run")
    for number, split in enumerate(("train", "val", "test")):
        for name in ("images", "masks"):
            (folder / "data" / split / name).mkdir(parents=True)
        for n in range(24):
            mask = blobs(32, 32, 100 * number + n)
            pixels = np.moveaxis(paint(mask, n), 0, -1)
            Image.fromarray(pixels).save(folder / "data" / split / "images" / f"{n}.png")
            Image.fromarray(mask).save(folder / "data" / split / "masks" / f"{n}.png")
    (folder / "data" / "classes.txt").write_text("dark\nbright\n")
    training = {"epochs": 12, "batch_size": 8, "lr": [1e-2], "head": "linear", "layer_decay": 1.0}
    evaluate(TaskConfig(
        task="segmentation", checkpoint=run, data=folder / "data", training=training,
        bootstrap=50, baselines=("majority",), output=folder / "out", accelerator="cpu",
    ))  # fmt: skip
    return folder / "out"


def read(path: Path) -> Any:
    with rasterio.open(path) as file:
        return file.read(1)


def iou(found: Any, truth: Any) -> float:
    return float(((found == 1) & (truth == 1)).sum() / ((found == 1) | (truth == 1)).sum())


def test_a_planted_map_is_found_where_it_lies(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "BLOCK_PX", 64)
    truth = blobs(150, 203, 7, side=24)
    image = paint(truth, 3)
    image[:, 40:60, 80:130] = 0
    scene = make_scene(tmp_path / "town.tif", image, nodata=0)
    done = predict(model, scene, tmp_path / "m", accelerator="cpu")
    with rasterio.open(scene) as source, rasterio.open(tmp_path / "m" / "classes.tif") as file:
        assert (file.crs, file.transform, file.shape) == (
            source.crs, source.transform, source.shape,
        )  # fmt: skip
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.tags()["class_1"] == "bright"
        assert file.nodata == 255
        found = file.read(1)
        assert file.colormap(1)[0] != file.colormap(1)[1]
    hole = np.zeros_like(truth, bool)
    hole[40:60, 80:130] = True
    assert ((found == 255) == hole).all()
    assert iou(found[~hole], truth[~hole]) > 0.9
    with rasterio.open(tmp_path / "m" / "probability.tif") as file:
        p = file.read(1) * file.scales[0] + file.offsets[0]
        assert ((file.read(1) == 0) == hole).all()
    assert p[~hole].min() >= 0.499
    assert p[~hole].max() <= 1.0001
    table = gpd.read_parquet(tmp_path / "m" / "polygons.parquet")
    assert table.crs.to_epsg() == 32633
    np.testing.assert_allclose(table.geometry.area, table.area_m2, rtol=1e-9)
    np.testing.assert_allclose(table.area_m2, table.cells * GSD**2, rtol=1e-12)
    area = done["areas"]["raster"]
    for n, name in enumerate(("dark", "bright")):
        assert area["cells"][name] == (found == n).sum()
        assert table.cells[table["class"] == name].sum() == (found == n).sum()
        assert area["area_m2"][name] == pytest.approx((found == n).sum() * GSD**2)
    weighted = (table.probability * table.cells).sum() / table.cells.sum()
    assert weighted == pytest.approx(p[~hole].mean(), abs=1e-5)
    assert (tmp_path / "m" / "map.png").stat().st_size > 1000


def test_a_scene_of_one_window_is_what_the_model_says_of_an_image(
    model: Path, tmp_path: Path
) -> None:
    scene = make_scene(tmp_path / "one.tif", paint(blobs(32, 32, 5), 5))
    predict(model, scene, tmp_path / "m", accelerator="cpu")
    p = whole(model, scene)
    assert (read(tmp_path / "m" / "classes.tif") == p.argmax(0)).all()
    kept = (read(tmp_path / "m" / "probability.tif").astype(float) - 1) / 254
    np.testing.assert_allclose(kept, p.max(0), atol=0.5 / 254 + 1e-6)


def whole(model: Path, scene: Path) -> Any:
    """Probabilities [class, y, x] of a scene of one window."""
    from flows.areas import scene_areas
    from pipelines.pixels import look

    areas = scene_areas(look(scene), (), 64)
    predictor = open_predictor(model, areas, None, device=torch.device("cpu"))
    with rasterio.open(scene) as file:
        image = torch.from_numpy(file.read())[None]
    return predictor.probabilities(image)[0].numpy()


def test_windows_of_a_model_that_sees_no_further_than_a_pixel_make_what_the_whole_makes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what a pixel alone decides, windows, however cut, leave no trace."""
    from geolink.tasks import predict as task

    def by_pixel(self: Any, images: torch.Tensor, graph: Any = None) -> torch.Tensor:
        bright = (images.float().mean(1) - 125) / 40
        return torch.stack([-bright, bright], 1).softmax(1)

    monkeypatch.setattr(task.Predictor, "probabilities", by_pixel)
    image = np.random.default_rng(0).integers(1, 255, (3, 130, 170), np.uint8)
    scene = make_scene(tmp_path / "s.tif", image)
    p = by_pixel(None, torch.from_numpy(image)[None])[0].numpy()
    for block in (32, 100):
        monkeypatch.setattr(flow, "BLOCK_PX", block)
        predict(model, scene, tmp_path / f"m{block}", accelerator="cpu")
        kept = (read(tmp_path / f"m{block}" / "probability.tif").astype(float) - 1) / 254
        np.testing.assert_allclose(kept, p.max(0), atol=0.5 / 254 + 1e-5)


def test_the_cut_into_blocks_changes_nothing_and_stopped_runs_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_scene(tmp_path / "s.tif", paint(blobs(150, 203, 9), 4))
    predict(model, scene, tmp_path / "large", accelerator="cpu")
    monkeypatch.setattr(flow, "BLOCK_PX", 64)
    predict(model, scene, tmp_path / "small", accelerator="cpu")

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(model, scene, tmp_path / "stopped", accelerator="cpu", progress=stop)
    assert not (tmp_path / "stopped" / "classes.tif").exists()
    done = predict(model, scene, tmp_path / "stopped", accelerator="cpu")
    assert (done["run"]["blocks"], done["run"]["computed_now"]) == (12, 7)
    for name in ("classes.tif", "probability.tif", "polygons.parquet", "map.png"):
        content = (tmp_path / "small" / name).read_bytes()
        assert content == (tmp_path / "stopped" / name).read_bytes(), name
        assert content == (tmp_path / "large" / name).read_bytes(), name
    assert predict(model, scene, tmp_path / "stopped", accelerator="cpu") == done
    other = make_scene(tmp_path / "other.tif", paint(blobs(150, 203, 8), 4))
    with pytest.raises(GeoLinkError, match="holds other maps"):
        predict(model, other, tmp_path / "stopped", accelerator="cpu")


def test_a_classifier_of_images_maps_one_class_a_window(tmp_path: Path) -> None:
    run = make_checkpoint(tmp_path / "run")
    label = np.arange(60) % 2
    image = np.stack([paint(np.full((32, 32), v), n) for n, v in enumerate(label)])
    data = make_npz(tmp_path / "d.npz", image=image, label=label, classes=["dark", "bright"])
    training = {"epochs": 10, "batch_size": 8, "lr": [1e-2], "layer_decay": 1.0}
    evaluate(TaskConfig(
        task="finetune", checkpoint=run, data=data, training=training, bootstrap=50,
        baselines=("majority",), output=tmp_path / "out", accelerator="cpu",
    ))  # fmt: skip
    mask = np.kron([[0, 1, 0], [1, 1, 0]], np.ones((32, 32)))
    scene = make_scene(tmp_path / "s.tif", paint(mask, 1))
    done = predict(tmp_path / "out", scene, tmp_path / "m", accelerator="cpu")
    with rasterio.open(tmp_path / "m" / "classes.tif") as file:
        assert file.read(1).tolist() == [[0, 1, 0], [1, 1, 0]]
        assert file.res == (32 * GSD, 32 * GSD)
    assert done["areas"]["raster"]["area_m2"]["bright"] == 3 * (32 * GSD) ** 2


@pytest.mark.parametrize("inputs", ["image", "image+osm"])
def test_chips_of_a_dataset_are_mapped_in_their_places(inputs: Any, tmp_path: Path) -> None:
    grid = make_grid()
    folder = make_dataset(
        tmp_path / "d", shards=3, chips=13, objects=4, grid=grid, splits=("train", "val", "test")
    )
    run = make_checkpoint(tmp_path / "run")
    evaluate(TaskConfig(
        task="segmentation", checkpoint=run, data=folder, labels="pixel", inputs=inputs,
        training={"epochs": 1, "batch_size": 8, "head": "linear", "freeze": inputs == "image"},
        bootstrap=50, baselines=("majority",), output=tmp_path / "out", accelerator="cpu",
    ))  # fmt: skip
    done = predict(tmp_path / "out", folder, tmp_path / "m", accelerator="cpu", batch_size=13)
    cells = done["areas"]["32632"]["cells"]
    assert sum(cells.values()) - cells["no data"] == 3 * 13 * 32 * 32
    if inputs == "image":
        return
    from flows.predict import _dataset_blocks
    from geolink.tasks.kept import read_model

    dataset = open_dataset(folder)
    areas = _dataset_blocks(dataset, read_model(tmp_path / "out")[0])
    predictor = open_predictor(tmp_path / "out", areas, dataset, device=torch.device("cpu"))
    with rasterio.open(tmp_path / "m" / "classes.tif") as file:
        for batch in read_chips(dataset, None, batch_size=13):
            p = predictor.probabilities(batch.image, batch.graph).numpy()
            for n, lonlat in enumerate(batch.center_lonlat.numpy()):
                x, y = to_utm(32632).transform(*lonlat)
                half = grid.size * grid.gsd_m / 2
                window = file.window(x - half, y - half, x + half, y + half)
                window = Window(*(round(v) for v in window.flatten()))
                assert (file.read(1, window=window) == p[n].argmax(0)).all()
    assert set(model_tensors(predictor.module)) >= {"head.classify.weight"}


def test_what_makes_no_map_is_told(model: Path, tmp_path: Path) -> None:
    scene = make_scene(tmp_path / "s.tif", paint(blobs(64, 64, 1), 1))

    def told(folder: Path, source: Path, match: str, **changes: Any) -> None:
        with pytest.raises(GeoLinkError, match=match):
            predict(folder, source, tmp_path / "m", accelerator="cpu", **changes)

    (tmp_path / "empty").mkdir()
    told(tmp_path / "empty", scene, "no folder of an evaluation")
    (tmp_path / "empty" / "result.json").write_text('{"task": "knn"}')
    told(tmp_path / "empty", scene, "task knn in .* keeps no model that makes maps")
    one = make_scene(tmp_path / "one.tif", paint(blobs(64, 64, 1), 1)[:1], photometric="MINISBLACK")
    told(model, one, "takes band red", bands=("nir",))
    dark = make_scene(tmp_path / "dark.tif", np.ones((3, 64, 64), np.uint8))
    told(model, dark, "predict images of the kind")
    for changes, match in (
        ({"inputs": "image+osm"}, "a file of pixels has no OSM objects"),
        ({"gsd_m": 10.0}, "pixels of 2 m are not what"),
        ({"checkpoint": str(tmp_path / "gone")}, "say with --checkpoint where it lies"),
        ({"encoder_checksum": "0"}, "holds other weights"),
        ({"kind": "change", "task": "change"}, "compares two dates"),
        ({"checksum": "0"}, "is not the file"),
    ):
        copy = tmp_path / "changed"
        shutil.copytree(model, copy, dirs_exist_ok=True)
        about = json.loads((copy / "model.json").read_text())
        (copy / "model.json").write_text(json.dumps(about | changes))
        told(copy, scene, match)


def test_the_command_prints_what_was_mapped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = make_scene(tmp_path / "s.tif", paint(blobs(64, 64, 1), 1))
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(model), str(scene), "--out", str(tmp_path / "m"), "--accelerator",
              "cpu"])  # fmt: skip
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "bright" in said
    assert "polygons.parquet" in said
