"""Change between two dates: folders as LEVIR-CD lays them out, a planted change that is learnt."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from geolink.cli.main import main
from geolink.tasks.baselines import default_baselines
from geolink.tasks.change import THRESHOLDS, fit_difference, map_differences
from geolink.tasks.contracts import Imagery, Labels, Leak, Part, TaskBatch, TaskData
from geolink.tasks.dense import image_scores
from geolink.tasks.encoders import open_encoder
from geolink.tasks.evaluate import evaluate
from geolink.tasks.leaks import check_leaks
from geolink.tasks.registry import TASKS
from geolink.tasks.sources import open_data
from geolink.tasks.train import given
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from tests.tasks import make_checkpoint, make_npz

CPU = torch.device("cpu")


def make_pairs(folder: Path, count: int = 16, value: int = 255, size: int = 32) -> Path:
    """<split>/{A,B,label}/<split>_<n>.png as LEVIR-CD has them: in some blocks of the later date
    there are stripes that were not there; all of it is lighter or darker than before. In every
    fourth pair nothing changed."""
    for number, split in enumerate(("train", "val", "test")):
        rng = np.random.default_rng(number)
        for side in ("A", "B", "label"):
            (folder / split / side).mkdir(parents=True)
        for n in range(1, count + 1):
            blocks = (rng.random((size // 8, size // 8)) < 0.25) & (n % 4 > 0)
            changed = np.kron(blocks, np.ones((8, 8))).astype(bool)
            ground = rng.integers(60, 150, (size // 4, size // 4, 3)).repeat(4, 0).repeat(4, 1)
            stripes = np.where(np.arange(size) % 4 < 2, 45, -45)[None, :, None]
            later = ground + changed[..., None] * stripes + rng.integers(-60, 61, 3)
            sides = {"A": ground, "B": later, "label": value * changed.astype(np.uint8)}
            for side, pixels in sides.items():
                noise = rng.normal(0, 4, pixels.shape) * (side != "label")
                image = (pixels + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / split / side / f"{split}_{n}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("run") / "run", variant="geolink2")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs") / "levir")


@pytest.fixture
def own(pairs: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(pairs, tmp_path / "own"))


def config(run: Path, data: Path, **changes: Any) -> TaskConfig:
    training = {
        "epochs": 14, "batch_size": 4, "lr": [3e-3], "layer_decay": 1.0, "patience": 2,
        "head": "fpn",
    }  # fmt: skip
    values = {"task": "change", "checkpoint": run, "data": data, "training": training}
    return TaskConfig(**{**values, "bootstrap": 50, **changes})


def read(path: Path) -> NDArray[Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_pairs_and_masks_are_those_of_the_files(run: Path, pairs: Path) -> None:
    data = open_data(config(run, pairs))
    assert (data.kind, data.classes) == ("change", ("no change", "change"))
    assert {split: len(part) for split, part in data.splits.items()} == dict.fromkeys(
        ("train", "val", "test"), 16
    )
    names = data.part("val").ids.tolist()
    assert sorted(names) == sorted(f"val/A/val_{n}.png" for n in range(1, 17))
    seen = []
    for batch in data.batches("val", np.array([1, 4, 5, 9]), batch_size=3):
        assert batch.second is not None
        assert batch.mask is not None
        for n, row in enumerate(batch.rows.tolist()):
            earlier = pairs / names[row]
            later, mask = (earlier.parents[1] / s / earlier.name for s in ("B", "label"))
            assert np.array_equal(batch.image[n].numpy(), read(earlier).transpose(2, 0, 1))
            assert np.array_equal(batch.second[n].numpy(), read(later).transpose(2, 0, 1))
            assert np.array_equal(batch.mask[n].numpy(), read(mask) // 255)
            seen.append(row)
    assert seen == [1, 4, 5, 9]
    (note,) = [n for n in data.notes if "nothing changed" in n]
    still = sum(not read(p).any() for p in (pairs / "test" / "label").iterdir())
    assert still >= 4
    assert f"{still} of 16 of test" in note


def test_masks_of_ones_are_masks_of_255(run: Path, pairs: Path, tmp_path: Path) -> None:
    ones = open_data(config(run, make_pairs(tmp_path / "ones", value=1)))
    assert ones.key == open_data(config(run, pairs)).key


def test_without_a_val_folder_some_of_train_is_validation(run: Path, own: Path) -> None:
    shutil.rmtree(own / "val")
    data = open_data(config(run, own))
    assert [len(data.part(s)) for s in ("train", "val", "test")] == [13, 3, 16]
    assert any("a fifth of the training images" in note for note in data.notes)
    alone = open_data(config(run, own / "train"))
    assert sum(len(part) for part in alone.splits.values()) == 16


def test_iou_of_change_is_counted_over_all_pixels_by_hand(run: Path, own: Path) -> None:
    out = own.parent / "out"
    training = {"epochs": 1, "batch_size": 8, "head": "linear"}
    result = evaluate(config(run, own, training=training, output=out))
    assert set(result["scores"]) == {"encoder", "random", "difference", "majority"}
    predictions = np.load(out / "predictions.npz")
    (cut,) = [r["chosen"]["threshold"] for r in result["runs"] if r["method"] == "difference"]

    def images(split: str, side: str) -> NDArray[np.float64]:
        paths = sorted((own / split / side).iterdir())
        return np.stack([read(p).astype(np.float64) for p in paths])

    # The baseline by itself: deviations of bands, mean of their differences, a threshold.
    learnt = np.concatenate([images("train", side) for side in ("A", "B")])
    std = learnt.reshape(-1, 3).std(0)

    def iou(split: str, threshold: float) -> float:
        value = (np.abs(images(split, "A") - images(split, "B")) / std).mean(-1)
        told, true = value >= threshold, images(split, "label") > 0
        return float((told & true).sum() / (told | true).sum())

    score = result["scores"]["difference"]["score"]
    assert score["iou_change"] == pytest.approx(iou("test", cut), abs=2e-3)
    on_val = [iou("val", t) for t in THRESHOLDS]
    (trials,) = [r["trials"] for r in result["runs"] if r["method"] == "difference"]
    assert [t["score"] for t in trials] == pytest.approx(on_val, abs=5e-3)
    assert iou("val", cut) == pytest.approx(max(on_val), abs=5e-3)
    # No change everywhere: no IoU, and right wherever nothing changed.
    still = 1 - (images("test", "label") > 0).mean()
    assert result["scores"]["majority"]["score"] == pytest.approx(
        {"iou_change": 0, "f1_change": 0, "accuracy": still}
    )
    for method, found in result["scores"].items():
        counts = predictions[f"{method}/1/0"].sum(0)
        assert counts.sum() == 16 * 32 * 32
        hit, missed, wrong = counts[1, 1], counts[1, 0], counts[0, 1]
        assert found["score"]["iou_change"] == pytest.approx(hit / max(hit + missed + wrong, 1))
        assert found["score"]["f1_change"] == pytest.approx(
            2 * hit / max(2 * hit + missed + wrong, 1)
        )


def test_a_planted_change_is_learnt(run: Path, pairs: Path, tmp_path: Path) -> None:
    result = evaluate(config(run, pairs, baselines=("difference", "majority"), output=tmp_path))
    assert result["measures"][0] == "iou_change"
    assert result["scores"]["encoder"]["score"]["iou_change"] > 0.6
    assert result["scores"]["majority"]["score"]["iou_change"] == 0
    assert result["scores"]["majority"]["difference"]["iou_change"][1] > 0.4
    # Another light changes all pixels; the stripes of what was built tell it apart.
    assert result["scores"]["difference"]["difference"]["iou_change"][1] > 0.2
    (ours,) = [r for r in result["runs"] if r["method"] == "encoder"]
    first = next(c["epoch"] for c in ours["curve"] if c["score"] > 0)
    assert first > 3  # later than patience: nothing is said to change at first
    assert ours["chosen"]["classes_learnt_from"] == "2 of 2"
    page = (tmp_path / "index.html").read_text()
    assert "the earlier date, the later, what changed, what it says" in page
    assert page.count("data:image/png;base64,") == 1 + 8


def test_the_order_of_dates_does_not_matter_and_equal_dates_differ_nowhere(
    run: Path, pairs: Path
) -> None:
    data = open_data(config(run, pairs))
    encoder = open_encoder(run, "image", data.hide("test"), device=CPU)
    batch = next(data.batches("val"))
    assert batch.second is not None
    back = TaskBatch(batch.rows, batch.second, second=batch.image)
    same = TaskBatch(batch.rows, batch.image, second=batch.image)
    with torch.inference_mode():
        one, other, none = (
            map_differences(encoder, given(encoder, b, CPU)) for b in (batch, back, same)
        )
        assert encoder.maps is not None
        maps = [encoder.maps(encoder.prepare(d), None) for d in (batch.image, batch.second)]
    for n, level in enumerate(one):
        assert torch.equal(level, other[n])
        assert torch.equal(level, (maps[0][n] - maps[1][n]).abs())
        assert level.any()
        assert not none[n].any()


def test_pixels_without_data_do_not_differ() -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(1, 99, (4, 2, 8, 8)).astype(np.uint8))
    mask = torch.from_numpy(rng.integers(0, 2, (4, 8, 8)).astype(np.uint8))
    second = torch.where(mask[:, None] > 0, 200, image).to(torch.uint8)
    second[:, :, :2] = 0
    part = Part(np.arange(4).astype(str), None, np.full((4, 4), np.nan))
    data = TaskData(
        "pairs", "key", "change", Imagery(("a", "b"), (None, None), "uint8", 0, (8, 8)),
        ("no change", "change"), dict.fromkeys(("train", "val"), part),
        lambda split, rows, size: iter([TaskBatch(np.arange(4), image, None, None, mask, second)]),
    )  # fmt: skip
    found = fit_difference(data).predict(data, "val")
    assert not isinstance(found, Labels)
    top = int(mask[:, :2].sum())
    assert found.counts.sum(0).tolist() == [
        [int((mask == 0).sum()), 0], [top, int(mask.sum()) - top]
    ]  # fmt: skip


def test_pictures_are_of_pairs_with_a_change() -> None:
    counts = np.array([[[9, 0], [0, 0]], [[5, 1], [1, 2]], [[8, 0], [1, 0]], [[8, 1], [0, 0]]])
    found = image_scores(counts, "change")
    assert np.isnan(found[0])
    assert found[1:].tolist() == [0.5, 0.0, 0.0]
    assert image_scores(counts, "mask") == pytest.approx([1, 7 / 9, 8 / 9, 8 / 9])


@pytest.mark.parametrize(("date", "other"), [("A", "A"), ("B", "B"), ("A", "B")])
def test_an_image_of_either_date_in_two_splits_is_a_leak(
    run: Path, own: Path, date: str, other: str
) -> None:
    shutil.copy(own / "train" / date / "train_3.png", own / "test" / other / "test_7.png")
    data = open_data(config(run, own))
    with pytest.raises(Leak, match=r"train/A/train_3.png = test/A/test_7.png"):
        check_leaks(data)
    # So do sources that have no hashes of their own.
    splits = {s: Part(p.ids, None, p.bounds_lonlat) for s, p in data.splits.items()}
    with pytest.raises(Leak, match=r"train/A/train_3.png = test/A/test_7.png"):
        check_leaks(
            TaskData(data.name, "", "change", data.imagery, data.classes, splits, data.read)
        )


def test_bad_pairs_are_refused_in_a_sentence(run: Path, own: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(GeoLinkError, match=words) as caught:
            open_data(config(run, own))
        assert "\n" not in str(caught.value)

    later, mask = own / "val" / "B" / "val_2.png", own / "val" / "label" / "val_2.png"
    good = mask.read_bytes(), later.read_bytes()
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(mask)
    refused(r"val_2.png holds 7.*: masks take 0 where nothing changed, and either 1 or 255")
    Image.fromarray(np.ones((32, 32), np.uint8)).save(mask)
    refused(r"label/val_2.png holds 1 and .*label/.*.png holds 255: masks take 0")
    Image.fromarray(np.zeros((32, 16), np.uint8)).save(mask)
    refused(r"label/val_2.png is \[32, 16\] \[y, x\], its images are \[32, 32\]")
    mask.write_bytes(good[0])
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(later)
    refused(r"B/val_2.png is uint8 \[3, 16, 16\], the images before it are")
    later.unlink()
    refused(r"pair val_2 of .*val has no file in B: A holds the earlier date")
    later.write_bytes(good[1])
    shutil.copy(later, later.with_suffix(".jpg"))
    refused(r"val_2.jpg and val_2.png are of one pair: keep one")
    later.with_suffix(".jpg").unlink()
    for path in (own / "val" / "label").iterdir():
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    refused(r"nothing changed in the 16 pairs of split val")
    shutil.rmtree(own / "test" / "B")
    refused(r"there is no folder .*test/B: A holds the earlier date, B the later")


def test_what_has_not_two_dates_is_refused(run: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match="task knn needs labels of kind class or multilabel"):
        evaluate(config(run, pairs, task="knn"))
    npz = make_npz(tmp_path / "d.npz")
    with pytest.raises(GeoLinkError, match="task change needs labels of kind change, those of"):
        evaluate(config(run, npz))
    with pytest.raises(GeoLinkError, match="baseline difference is for images of two dates"):
        evaluate(config(run, npz, task="knn", baselines=("difference",)))
    with pytest.raises(GeoLinkError, match="has no OSM objects: use inputs: image"):
        evaluate(config(run, pairs, inputs="image+osm"))
    with pytest.raises(GeoLinkError, match="change needs maps of images, and pixels has none"):
        evaluate(config(run, pairs, baselines=("pixels",), training={"epochs": 1}))
    with pytest.raises(GeoLinkError, match="there are no data"):
        open_data(config(run, tmp_path / "nothing"))
    # Letters are classes like others.
    for name, n in (("A", 1), ("B", 2)):
        (tmp_path / "letters" / name).mkdir(parents=True)
        for k in range(10):
            pixels = np.random.default_rng((n, k)).integers(0, 255, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "letters" / name / f"{k}.png")
    assert open_data(config(run, tmp_path / "letters", task="knn")).classes == ("A", "B")


def test_change_is_compared_with_no_change_and_with_pixels(run: Path, pairs: Path) -> None:
    found = default_baselines(TASKS["change"], config(run, pairs), open_data(config(run, pairs)))
    assert found == ("random", "difference", "majority")


def test_change_is_evaluated_by_the_command(
    run: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(
            ["evaluate", "change", "--checkpoint", str(run), "--data", str(pairs), "--share", "0.5",
             "--baseline", "difference", "--set", "training.epochs=1", "--set", "bootstrap=20",
             "--output", str(tmp_path)],
        )  # fmt: skip
    assert done.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "change on 16 test images of levir, 2 classes: iou change" in shown
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["scores"]["encoder"]["labels"] == 8
    assert "IoU of change" in (tmp_path / "result.md").read_text()
