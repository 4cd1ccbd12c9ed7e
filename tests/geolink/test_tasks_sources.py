"""Labelled images come in whole or are refused in one sentence."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from geolink.reader import open_dataset, read_shard
from geolink.tasks.contracts import IGNORE, Leak, TaskData
from geolink.tasks.held import hold
from geolink.tasks.leaks import check_leaks
from geolink.tasks.sources import open_data
from geolink.tasks.subsets import few_labels
from schemas.errors import GeoLinkError
from schemas.evaluation import TaskConfig
from schemas.layout import Kind
from tests.shards import make_dataset
from tests.tasks import CLASSES, make_npz, stripes


def config(data: Path, **changes: Any) -> TaskConfig:
    return TaskConfig(checkpoint="timm:vit_tiny_patch16_224", data=data, **changes)


def make_folder(
    folder: Path, count: int = 30, splits: tuple[str, ...] = (), ending: str = "png"
) -> Path:
    for n, split in enumerate(splits or ("",)):
        image, label = stripes(count, n)
        for i, (pixels, number) in enumerate(zip(image, label, strict=True)):
            path = folder / split / CLASSES[number] / f"{i:03d}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    return folder


def everything(data: TaskData, split: str) -> dict[str, Any]:
    """Images of a split by id, with their class."""
    part, found = data.part(split), {}
    for batch in data.batches(split, batch_size=7):
        assert batch.label is not None
        for n, row in enumerate(batch.rows.tolist()):
            found[str(part.ids[row])] = (batch.image[n].numpy(), batch.label[n])
    return found


def test_a_folder_of_splits_comes_in_image_by_image(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", splits=("train", "val", "test"))
    data = open_data(config(folder))
    assert data.classes == tuple(sorted(CLASSES))
    for split in ("train", "val", "test"):
        found = everything(data, split)
        assert len(found) == 30
        for name, (pixels, label) in found.items():
            with Image.open(folder / name) as image:
                assert np.array_equal(np.asarray(image).transpose(2, 0, 1), pixels)
            assert data.classes[label] == Path(name).parent.name
    check_leaks(data)
    assert data.notes == ()


def test_a_folder_without_splits_is_split_by_the_seed_class_by_class(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", count=60, ending="tif")
    data = open_data(config(folder))
    assert {s: len(p) for s, p in data.splits.items()} == {"train": 36, "val": 12, "test": 12}
    for part in data.splits.values():
        assert part.label is not None
        assert len(set(np.bincount(part.label).tolist())) == 1
    again, other = open_data(config(folder)), open_data(config(folder, seed=5))
    assert again.key == data.key != other.key
    assert any("by the seed" in note for note in data.notes)


def test_lists_of_names_say_which_image_is_of_which_split(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", count=30)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    for split, part in (("train", names[::2]), ("val", names[1::4]), ("test", names[3::4])):
        (folder / f"{split}.txt").write_text("\n".join(part) + "\n")
    data = open_data(config(folder))
    assert sorted(data.part("val").ids.tolist()) == names[1::4]
    (folder / "test.txt").write_text("wood/nothing.png\n")
    with pytest.raises(GeoLinkError, match=r"test.txt names wood/nothing.png"):
        open_data(config(folder))


def _empty_class(folder: Path) -> None:
    (folder / "train" / "moor").mkdir()


def _in_test_alone(folder: Path) -> None:
    path = folder / "test" / "moor" / "a.png"
    path.parent.mkdir()
    Image.fromarray(np.ones((32, 32, 3), np.uint8)).save(path)


def _other_size(folder: Path) -> None:
    Image.fromarray(np.ones((20, 32, 3), np.uint8)).save(folder / "train" / "wood" / "000.png")


def _other_bands(folder: Path) -> None:
    Image.fromarray(np.ones((32, 32), np.uint8)).save(folder / "val" / "wood" / "000.png")


def _no_image(folder: Path) -> None:
    (folder / "val" / "wood" / "000.png").write_text("text")


def _one_sample(folder: Path) -> None:
    for path in sorted((folder / "test").rglob("*.png"))[1:]:
        path.unlink()


def _four_bands(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        Image.fromarray(np.ones((32, 32, 4), np.uint8)).save(path)


def _no_test(folder: Path) -> None:
    (folder / "test").rename(folder.parent / "gone")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_empty_class, "class moor of .* has no image: remove its folder, or fill it"),
        (_in_test_alone, "class moor of .* has images in split test and none in train"),
        (_other_size, r"wood/000.png is uint8 \[3, 20, 32\], .* \[3, 32, 32\]"),
        (_other_bands, r"000.png is uint8 \[1, 32, 32\]"),
        (_no_image, "000.png cannot be read as an image"),
        (_one_sample, "split test of .* has 1 labelled images, at least 2 are needed"),
        (_four_bands, r"has 4 bands, and none are named: name them .*bands: \["),
        (_no_test, "has no images of split test"),
    ],
)
def test_bad_folders_are_refused_in_a_sentence(spoil: Any, text: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", count=6, splits=("train", "val", "test"))
    spoil(folder)
    with pytest.raises(GeoLinkError, match=text) as error:
        open_data(config(folder))
    assert "\n" not in str(error.value)


def test_images_that_two_splits_share_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "f", count=12, splits=("train", "val", "test"))
    (folder / "test" / "wood" / "copy.png").write_bytes(
        (folder / "val" / "wood" / "001.png").read_bytes()
    )
    with pytest.raises(
        Leak, match=r"1 images of f have the same pixels in both test and val.*copy"
    ):
        check_leaks(open_data(config(folder)))


def test_images_that_lie_on_each_other_are_named(tmp_path: Path) -> None:
    split = np.array(["train"] * 60 + ["val"] * 15 + ["test"] * 15)
    west = np.arange(90) * 0.01
    box = np.stack([west, np.zeros(90), west + 0.01, np.full(90, 0.01)], 1)
    apart = open_data(config(make_npz(tmp_path / "a.npz", split=split, bounds_lonlat=box)))
    assert "places" in check_leaks(apart)["compared"]
    box[80] = box[10] + [0.004, 0.004, 0.004, 0.004]
    with pytest.raises(
        Leak, match=r"2 images of b lie on each other in both train and test, .*: 10 and 80"
    ):
        check_leaks(open_data(config(make_npz(tmp_path / "b.npz", split=split, bounds_lonlat=box))))


def test_an_image_of_one_colour_may_be_in_two_splits(tmp_path: Path) -> None:
    image, _ = stripes(90, 0)
    split = np.array(["train"] * 60 + ["val"] * 15 + ["test"] * 15)
    image[[3, 70, 88]] = 7
    check_leaks(open_data(config(make_npz(tmp_path / "a.npz", image=image, split=split))))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("d") / "d"
    return make_dataset(folder, shards=6, chips=12, splits=("train", "val", "test"))


def test_labels_of_regions_are_the_class_of_most_area(dataset: Path) -> None:
    data, opened = open_data(config(dataset)), open_dataset(dataset)
    names = opened.info.taxonomy.names
    for split in ("train", "val", "test"):
        share = np.concatenate(
            [read_shard(opened, r)["label_region"] for r in opened.rows if r.split == split]
        )
        expected = [names[n] for n in share.argmax(1)]
        kept = [name for name in expected if name in data.classes]
        label = data.part(split).label
        assert label is not None
        assert [data.classes[n] for n in label.tolist()] == kept
        left_out = data.part(split).left_out.get("class_not_in_train", 0)
        assert left_out == len(expected) - len(kept)
    assert data.labels_are_osm


def test_labels_of_objects_are_the_class_of_the_largest_polygon(dataset: Path) -> None:
    data, opened = open_data(config(dataset, labels="object")), open_dataset(dataset)
    names, expected = opened.info.taxonomy.names, []
    for row in (r for r in opened.rows if r.split == "train"):
        a = read_shard(opened, row)
        for first, last in zip(a["object_offset"][:-1], a["object_offset"][1:], strict=True):
            mine = [
                (float(a["object_size"][n]), names[a["object_class"][n] - 1])
                for n in range(first, last)
                if a["object_kind"][n] == Kind.POLYGON and a["object_class"][n] > 0
            ]
            expected += [max(mine)[1]] if mine else []
    label = data.part("train").label
    assert label is not None
    assert [data.classes[n] for n in label.tolist()] == expected


def test_masks_are_those_of_the_shards(dataset: Path) -> None:
    opened = open_dataset(dataset)
    data = open_data(config(dataset, labels="pixel"))
    rows = [r for r in opened.rows if r.split == "test"]
    stored = np.concatenate([read_shard(opened, r)["label_pixel"] for r in rows])
    masks = [b.mask.numpy() for b in data.batches("test") if b.mask is not None]
    found = np.concatenate(masks)
    assert np.array_equal(found == IGNORE, stored == 0)
    assert np.array_equal(found[stored > 0], stored[stored > 0] - 1)
    patches = open_data(config(dataset, labels="patch"))
    share = np.concatenate([read_shard(opened, r)["label_patch"] for r in rows])
    coarse = np.concatenate([b.mask.numpy() for b in patches.batches("test") if b.mask is not None])
    assert np.array_equal(coarse[:, ::8, ::8], share.argmax(-1))


def test_a_table_of_labels_is_joined_by_chip_id(dataset: Path, tmp_path: Path) -> None:
    ids = np.concatenate([p.ids for p in open_data(config(dataset)).splits.values()])
    lines = [f"{name},{'even' if n % 2 == 0 else 'odd'}" for n, name in enumerate(ids[1:].tolist())]
    (tmp_path / "l.csv").write_text("id,label\n" + "\n".join(lines) + "\n")
    data = open_data(config(dataset, labels=tmp_path / "l.csv"))
    assert data.classes == ("even", "odd")
    assert sum(len(p) for p in data.splits.values()) == len(lines)
    assert not data.labels_are_osm


def test_held_images_are_those_that_were_read(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(config(dataset))
    rows = np.array([1, 4, 9])
    read = next(data.batches("train", rows))
    for memory in (2 << 30, 0):
        monkeypatch.setattr("geolink.tasks.held.MEMORY", memory)
        held = hold(data, "train", rows)
        assert (held.folder is not None) == (memory == 0)
        taken = held.take(np.array([2, 0]))
        assert np.array_equal(taken.image.numpy(), read.image.numpy()[[2, 0]])
        assert taken.graph is not None
        assert taken.graph.chips == 2


def test_a_split_that_is_hidden_cannot_be_read(dataset: Path) -> None:
    hidden = open_data(config(dataset)).hide("test")
    for look in (hidden.part, hidden.batches):
        with pytest.raises(Leak, match=r"split test .* is not to be seen"):
            look("test")
    assert len(hidden.part("val"))


@pytest.mark.parametrize("several", [False, True])
def test_few_labels_are_among_those_of_more_and_hold_every_class(several: bool) -> None:
    rng = np.random.default_rng(0)
    label = np.concatenate([np.arange(8), rng.integers(0, 8, 392) % 5])
    many = (rng.random((400, 6)) < 0.05).astype(np.uint8)
    many[7, 5] = 1
    given = many if several else label
    sets = [few_labels(given, 400, share, 3) for share in (0.01, 0.05, 0.1, 1.0)]
    for less, more in pairwise(sets):
        assert set(less.tolist()) <= set(more.tolist())
        assert (np.diff(less) > 0).all()
    assert len(sets[-1]) == 400
    assert given[sets[0]].any(0).all() if several else len(np.unique(label[sets[0]])) == 8
    assert not np.array_equal(sets[0], few_labels(given, 400, 0.01, 4))
    if not several:
        assert np.bincount(label[sets[2]]).tolist() == [
            max(round(0.1 * n), 1) for n in np.bincount(label).tolist()
        ]
