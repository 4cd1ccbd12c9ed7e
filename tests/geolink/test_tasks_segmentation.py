"""Segmentation: confusions by hand, heads of every size, learning what pixels show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from geolink.tasks.contracts import IGNORE
from geolink.tasks.dense import mask_confusion
from geolink.tasks.evaluate import evaluate
from geolink.tasks.heads import make_head
from geolink.tasks.sources import open_data
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from tests.shards import make_dataset
from tests.tasks import make_checkpoint


def make_folder(folder: Path, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    """Images in which bright pixels are of class 1; some pixels are not scored."""
    for number, split in enumerate(splits):
        rng = np.random.default_rng(number)
        for name in ("images", "masks"):
            (folder / split / name).mkdir(parents=True)
        for n in range(24):
            mask = np.kron(rng.random((4, 4)) < 0.4, np.ones((8, 8))).astype(np.uint8)
            pixels = np.clip(70 + 110 * mask[..., None] + rng.normal(0, 12, (32, 32, 3)), 1, 255)
            mask[:2] = IGNORE
            Image.fromarray(pixels.astype(np.uint8)).save(folder / split / "images" / f"{n}.jpg")
            Image.fromarray(mask).save(folder / split / "masks" / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("run") / "run", variant="geolink2")


def config(run: Path, data: Path, **changes: Any) -> TaskConfig:
    training = {"epochs": 6, "batch_size": 8, "lr": [3e-3], "head": "linear", "layer_decay": 1.0}
    return TaskConfig(
        **{
            "task": "segmentation", "checkpoint": run, "data": data, "training": training,
            "bootstrap": 50, "baselines": ("majority",), **changes,
        }
    )  # fmt: skip


@pytest.mark.parametrize("head", ["linear", "fpn", "upernet"])
@pytest.mark.parametrize("grid", [1, 4, 7])
def test_heads_take_maps_of_any_grid(head: str, grid: int) -> None:
    maps = [torch.randn(2, width, grid, grid) for width in (8, 8, 8, 6)]
    made = make_head(head, (8, 8, 8, 6), 5)
    logits = made(maps)
    assert logits.shape[:2] == (2, 5)
    assert logits.shape[2] >= grid
    logits.sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def test_confusions_are_counted_image_by_image_without_what_is_ignored() -> None:
    rng = np.random.default_rng(0)
    truth, guess = (rng.integers(0, 3, (4, 5, 6)).astype(np.uint8) for _ in range(2))
    truth[1, :2] = IGNORE
    found = mask_confusion(truth, guess, 3, np.arange(4).astype(str))
    for n in range(4):
        scored = truth[n] != IGNORE
        expected = confusion_matrix(truth[n][scored], guess[n][scored], labels=range(3))
        assert np.array_equal(found[n], expected)
    truth[2, 3, 3] = 7
    with pytest.raises(GeoLinkError, match="the mask of image 2 holds 7, but classes go from 0"):
        mask_confusion(truth, guess, 3, np.arange(4).astype(str))


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_what_pixels_show_is_learnt(head: str, run: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f")
    training = {"epochs": 8, "batch_size": 8, "lr": [3e-3], "head": head, "layer_decay": 1.0}
    result = evaluate(config(run, folder, training=training, output=tmp_path / "out"))
    assert result["scores"]["encoder"]["score"]["mean_iou"] > 0.7
    assert result["scores"]["majority"]["difference"]["mean_iou"][1] > 0.2
    confusion = np.array(result["scores"]["encoder"]["confusion"])
    assert confusion.sum() == 24 * 30 * 32  # what is ignored is not counted
    share = confusion.sum(1) / confusion.sum()
    majority = result["scores"]["majority"]["score"]
    assert majority["accuracy"] == pytest.approx(share.max())
    assert majority["mean_iou"] == pytest.approx(share.max() / 2)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + 8


@pytest.mark.parametrize("inputs", ["image", "image+osm"])
def test_masks_of_shards_are_learnt_from(inputs: str, run: Path, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "d", shards=3, chips=4, splits=("train", "val", "test"))
    training = {"epochs": 2, "batch_size": 4, "head": "fpn"}
    result = evaluate(config(run, folder, labels="patch", inputs=inputs, training=training))
    assert result["kind"] == "mask"
    assert result["scores"]["encoder"]["labels"] == 4


def test_bad_masks_are_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f")
    mask = folder / "val" / "masks" / "3.png"
    Image.fromarray(np.full((32, 32), 9, np.uint8)).save(mask)
    with pytest.raises(GeoLinkError, match=r"masks/3.png holds 9, but classes go from 0 to 1"):
        open_data(config(run, folder))
    Image.fromarray(np.zeros((16, 32), np.uint8)).save(mask)
    with pytest.raises(GeoLinkError, match=r"masks/3.png is \[16, 32\] \[y, x\], its image is"):
        open_data(config(run, folder))
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(mask)
    with pytest.raises(GeoLinkError, match="it takes one band of class numbers"):
        open_data(config(run, folder))
    mask.unlink()
    with pytest.raises(GeoLinkError, match=r"image .*images/3.jpg has no mask .*masks/3.png"):
        open_data(config(run, folder))
    with pytest.raises(GeoLinkError, match="inputs osm have none: use image or image"):
        evaluate(
            config(
                run, make_dataset(tmp_path / "d", shards=3, splits=("train", "val", "test")),
                labels="pixel", inputs="osm",
            )
        )  # fmt: skip
