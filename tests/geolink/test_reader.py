"""Reading datasets: pinned snapshots, tag vocabulary, band statistics, damage."""

import json
import math
import multiprocessing
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from geolink.reader import (
    Dataset,
    band_statistics,
    open_dataset,
    read_shard,
    read_shard_at,
    tag_rows,
    tag_table,
)
from pipelines.snapshot import latest_rows, publish
from schemas.dataset import tag_table_name, vocabulary_name
from schemas.errors import GeoLinkError
from schemas.grid import Block
from tests.shards import TAGS, make_dataset, random_arrays, store_row, tag_id


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return open_dataset(make_dataset(tmp_path, splits=("train", "val")))


def test_a_pinned_dataset_is_undisturbed_by_what_is_published_later(dataset: Dataset) -> None:
    before = read_shard(dataset, dataset.rows[0])
    new = store_row(dataset.path, Block(32632, 10, 100), random_arrays(99))
    assert new.shard == dataset.rows[0].shard
    rows = [new, *latest_rows(dataset.path)[1:]]
    publish(dataset.path, rows, dataset.vocabulary_key, dataset.info)
    pinned, later = open_dataset(dataset.path, 1), open_dataset(dataset.path)
    assert (pinned.snapshot, later.snapshot) == (1, 2)
    np.testing.assert_array_equal(read_shard(pinned, pinned.rows[0])["image"], before["image"])
    assert not np.array_equal(read_shard(later, later.rows[0])["image"], before["image"])


def test_what_is_no_published_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GeoLinkError, match="no GeoLink dataset"):
        open_dataset(tmp_path)
    make_dataset(tmp_path, shards=1)
    (tmp_path / "snapshots" / "00000001.parquet").unlink()
    with pytest.raises(GeoLinkError, match="no snapshot yet"):
        open_dataset(tmp_path)


def test_a_dataset_of_a_newer_version_is_refused(dataset: Dataset) -> None:
    path = dataset.path / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(GeoLinkError, match=r"schema 99.*upgrade"):
        open_dataset(dataset.path)


def test_a_missing_array_is_named(dataset: Dataset) -> None:
    row = dataset.rows[1]
    shutil.rmtree(dataset.path / row.path / "patch")
    with pytest.raises(GeoLinkError, match=f"{row.shard}.*'patch' is missing or damaged"):
        read_shard(dataset, row)
    assert set(read_shard(dataset, row, ["edge", "valid"])) == {"edge", "valid"}
    for file in sorted((dataset.path / row.path).rglob("zarr.json")):
        file.unlink()
    with pytest.raises(GeoLinkError, match=f"shard .*{row.shard}.* is missing or damaged"):
        read_shard_at(dataset.path / row.path)


def test_tags_find_their_rows(dataset: Dataset) -> None:
    shard = read_shard(dataset, dataset.rows[0])
    text = shard["tag_text"].tobytes()
    offset = shard["tag_text_offset"]
    names = [text[a:b].decode() for a, b in pairwise(offset)]
    expected = sorted(TAGS, key=tag_id)
    assert [expected[i] for i in tag_rows(dataset, shard["tag"])] == names
    with pytest.raises(GeoLinkError, match="vocabulary of snapshot 1 lacks"):
        tag_rows(dataset, np.append(shard["tag"], np.uint64(2**64 - 1)))
    assert len(tag_rows(dataset, np.zeros(0, np.uint64))) == 0


def test_a_tag_weighs_the_log_of_how_often_its_key_is_used(dataset: Dataset) -> None:
    texts = sorted(TAGS, key=tag_id)
    count: dict[str, int] = {}
    for objects, text in enumerate(texts, start=1):
        key = text.partition("=")[0]
        count[key] = count.get(key, 0) + objects
    expected = [math.log(count[text.partition("=")[0]]) for text in texts]
    np.testing.assert_allclose(dataset.key_weight, expected, rtol=1e-6)


def test_a_damaged_vocabulary_or_tag_table_is_named(dataset: Dataset) -> None:
    table = dataset.path / tag_table_name("fabricated", "wordllama")
    assert tag_table(dataset).shape == (len(TAGS), 16)
    np.save(table, np.zeros((3, 16), np.float16))
    with pytest.raises(GeoLinkError, match=r"float16 \[3, 16\], not float16"):
        tag_table(dataset)
    table.write_bytes(b"no array")
    with pytest.raises(GeoLinkError, match=r"wordllama\.npy is missing or damaged"):
        tag_table(dataset)
    vocabulary = dataset.path / vocabulary_name("fabricated")
    vocabulary.write_bytes(vocabulary.read_bytes()[:50])
    with pytest.raises(GeoLinkError, match=r"fabricated\.parquet is missing or damaged"):
        open_dataset(dataset.path)


def test_band_statistics_are_those_of_the_splits_pixels(dataset: Dataset) -> None:
    for split in ("train", None):
        rows = dataset.split_rows(split)
        assert len(rows) == (2 if split else 4)
        pixels = np.concatenate([read_shard(dataset, r)["image"] for r in rows]).astype(float)
        mean, std = band_statistics(dataset, split)
        np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-9)
    with pytest.raises(GeoLinkError, match="no chips in split test: train 12, val 12, test 0"):
        band_statistics(dataset, "test")
    with pytest.raises(GeoLinkError, match="unknown split 'training'; known: train, val, test"):
        band_statistics(dataset, "training")


def test_a_forked_process_reads_after_its_parent_did(dataset: Dataset) -> None:
    read_shard(dataset, dataset.rows[0])
    child = multiprocessing.get_context("fork").Process(
        target=read_shard, args=(dataset, dataset.rows[1])
    )
    child.start()
    child.join(30)
    assert child.exitcode == 0
