"""Places found by tag and by example, against orders and figures worked out otherwise."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyproj import Transformer
from sklearn.metrics import average_precision_score

from geolink.cli import main
from geolink.models.base import PretrainModel
from geolink.reader import open_dataset, read_shard
from geolink.search.index import Index, make_index, open_aligned
from geolink.search.query import chip_at, find_tags, project_tags
from geolink.search.rank import best, chance, measure, scores, search_like, search_tags
from geolink.search.run import search
from schemas.errors import GeoLinkError
from tests.shards import make_dataset, tag_id
from tests.tasks import make_checkpoint

WOOD, ROAD = "natural=tree", "highway=residential"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_checkpoint(folder / "run")
    make_dataset(folder / "d", shards=6, chips=9, objects=8, splits=("train", "val", "test"))
    return folder


@pytest.fixture(scope="module")
def opened(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, PretrainModel]:
    dataset = open_dataset(world / "d")
    encoder = open_aligned(dataset, world / "run", "cpu", "checkpoint")
    assert isinstance(encoder.module, PretrainModel)
    index = make_index(dataset, encoder, tmp_path_factory.mktemp("index"))
    return index, encoder.module


def has_tag(index: Index, *names: str) -> Any:
    """By reading whole shards, chip by chip and object by object."""
    found = []
    for row in index.dataset.split_rows(None):
        a = read_shard(index.dataset, row)
        for n in range(row.chips):
            tags = set()
            for m in range(a["object_offset"][n], a["object_offset"][n + 1]):
                own = a["object_tag"][a["object_tag_offset"][m] : a["object_tag_offset"][m + 1]]
                tags |= {int(a["tag"][t]) for t in own}
            found.append({tag_id(name) for name in names} <= tags)
    return np.array(found)


def test_which_chips_have_tags_is_what_their_shards_say(opened: tuple[Index, Any]) -> None:
    index, _ = opened
    for names in ((WOOD,), (ROAD,), (WOOD, ROAD)):
        tags = find_tags(index, names)
        np.testing.assert_array_equal(tags.has, has_tag(index, *names))
        assert 0 < tags.has.sum() < len(index)


def test_chips_are_projected_in_the_order_of_their_shards(opened: tuple[Index, Any]) -> None:
    index, model = opened
    for n, row in enumerate(index.dataset.split_rows(None)):
        a = read_shard(index.dataset, row)
        part = slice(index.start[n], index.start[n + 1])
        np.testing.assert_array_equal(index.lonlat[part], a["center_lonlat"])
        images = (torch.from_numpy(a["image"]).float() - 127) / 73
        with torch.inference_mode():
            found = model.img_consistency_prj(model.embed_image(images)).numpy()
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        np.testing.assert_allclose(index.image[part], found, atol=1e-5)
        assert set(index.split[part]) == {row.split}
    assert index.place(int(index.start[3]) + 2) == (3, 2)


def test_in_a_world_made_by_hand_the_chips_with_the_tag_come_first(
    opened: tuple[Index, Any],
) -> None:
    """OSM and images of chips with trees point north, the others east; two images lie."""
    index, model = opened
    tags = find_tags(index, (WOOD,))
    north, east = np.float32([0, 1, 0, 0]), np.float32([1, 0, 0, 0])
    image = np.where(tags.has[:, None], north, east)
    liar, false = (np.flatnonzero((index.split == "test") & (tags.has == t))[0] for t in (1, 0))
    image[liar], image[false] = east, north
    region = np.where(tags.has[:, None], north, east)
    made = replace(index, image=image, region=region)
    found = search_tags(made, model, tags, count=5, split="test")
    assert found.method == "regions"
    assert set(index.split[found.chips]) == {"test"}
    right = np.flatnonzero((index.split == "test") & (image[:, 1] == 1))
    np.testing.assert_array_equal(found.chips, right[:5])
    np.testing.assert_allclose(found.score, 1)
    held = index.split != "train"
    assert (found.held_out, found.relevant) == (held.sum(), (tags.has & held).sum())
    expected = (tags.has[held] & (image[held, 1] == 1)).nonzero()[0]
    hits = np.isin(np.flatnonzero(image[held, 1] == 1)[:5], expected).sum()
    assert found.found["regions"]["precision"] == hits / 5
    assert found.found["regions"]["recall"] == hits / (tags.has & held).sum()
    assert set(found.found) == {"regions", "tag", "bands", "random"}


def test_objects_of_held_out_chips_change_nothing_about_the_order(
    opened: tuple[Index, Any],
) -> None:
    index, model = opened
    tags = find_tags(index, (WOOD,))
    region = np.array(index.region)
    region[index.split != "train"] = np.random.default_rng(0).normal(size=(36, 4))
    first, again = (
        search_tags(i, model, tags, count=20, split=None)
        for i in (index, replace(index, region=region))
    )
    np.testing.assert_array_equal(first.chips, again.chips)


def test_where_no_training_chip_has_the_tag_its_text_alone_is_asked(
    opened: tuple[Index, Any],
) -> None:
    index, model = opened
    tags = find_tags(index, (WOOD,))
    only_held = replace(tags, has=tags.has & (index.split != "train"))
    found = search_tags(index, model, only_held, count=5, split=None)
    assert found.method == "tag"
    query = project_tags(model, tags)
    assert np.linalg.norm(query) == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(found.chips, np.argsort(-(index.image @ query))[:5])


def test_a_place_is_not_like_itself_but_like_its_twin(opened: tuple[Index, Any]) -> None:
    index, _ = opened
    lon, lat = index.lonlat[17].tolist()
    assert chip_at(index, lon + 1e-5, lat - 1e-5) == 17
    image = np.array(index.image)
    image[40] = image[17]
    found = search_like(replace(index, image=image), 17, count=53, split=None)
    assert found.chips[0] == 40
    assert 17 not in found.chips
    with pytest.raises(GeoLinkError, match=r"no chip .* lies at"):
        chip_at(index, lon + 1, lat)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_the_best_are_those_of_a_stable_sort(values: list[int], count: int) -> None:
    score = np.array(values, np.float32)
    np.testing.assert_array_equal(best(score, count), np.argsort(-score, kind="stable")[:count])


@given(st.lists(st.booleans(), min_size=2, max_size=40).filter(any), st.integers(1, 10),
       st.integers(0, 99))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_figures_are_those_of_scikit_learn(truth: list[bool], count: int, seed: int) -> None:
    relevant = np.array(truth)
    score = np.random.default_rng(seed).permutation(len(truth)).astype(np.float32)
    found = measure(score, relevant, count)
    assert found["average_precision"] == pytest.approx(average_precision_score(relevant, score))
    first = relevant[np.argsort(-score)][:count]
    assert found["recall"] == first.sum() / relevant.sum()


def test_chance_is_what_random_orders_have_on_average() -> None:
    rng = np.random.default_rng(0)
    relevant = np.arange(20) < 4
    drawn = [measure(rng.permutation(20).astype(np.float32), relevant, 5) for _ in range(4000)]
    for name, value in chance(4, 20, 5).items():
        assert value == pytest.approx(np.mean([d[name] for d in drawn]), rel=0.03)


def test_scores_in_blocks_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geolink.search.rank._BLOCK", 7)
    vectors = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    query = np.float32([1, -2, 3])
    np.testing.assert_allclose(scores(vectors, query), vectors @ query, rtol=1e-5)


def test_a_search_writes_outlines_pictures_and_figures(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main(["search", str(world / "d"), str(out), WOOD, "--checkpoint", str(world / "run"),
              "--count", "4", "--cache", str(tmp_path / "cache"), "--accelerator", "cpu",
              "--json"])  # fmt: skip
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["count"] == 4
    places = json.loads((out / "places.geojson").read_text())["features"]
    assert [p["properties"]["rank"] for p in places] == [1, 2, 3, 4]
    to_utm = Transformer.from_crs(4326, 32632, always_xy=True)
    for place in places:
        ring = np.array(place["geometry"]["coordinates"][0])
        x, y = to_utm.transform(*ring.T)
        column, row = (int(v) for v in place["properties"]["chip"].split("-")[-2:])
        np.testing.assert_allclose(x.min() / 320, column, atol=1e-4)
        np.testing.assert_allclose(y.max() / 320, row + 1, atol=1e-4)
    with Image.open(out / "sheet.png") as sheet:
        assert min(sheet.size) > 200
    kept = sorted((tmp_path / "cache").rglob("*.npy"))
    before = [f.stat().st_mtime_ns for f in kept]
    like = places[0]["properties"]
    search(world / "d", world / "run", tmp_path / "like", like=(like["lon"], like["lat"]),
           count=3, cache=tmp_path / "cache", accelerator="cpu")  # fmt: skip
    assert [f.stat().st_mtime_ns for f in kept] == before
    assert len(json.loads((tmp_path / "like" / "places.geojson").read_text())["features"]) == 3


def test_what_cannot_be_searched_is_told(world: Path, tmp_path: Path) -> None:
    def ask(run: Path = world / "run", **options: Any) -> None:
        search(world / "d", run, tmp_path / "out", accelerator="cpu", **options)

    with pytest.raises(GeoLinkError, match="either tags"):
        ask()
    with pytest.raises(GeoLinkError, match=r"no object of .*natural=tre'.*natural=tree"):
        ask(tags=("natural=tre",))
    blind = make_checkpoint(tmp_path / "run", contrast_weight=0.0)
    with pytest.raises(GeoLinkError, match="without contrast"):
        ask(blind, tags=(WOOD,))
