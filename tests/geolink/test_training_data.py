"""Runs on several datasets, and on datasets with damaged shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from geolink.checkpoint import checkpoints, load_model
from geolink.reader import band_statistics, open_dataset
from geolink.training import loop
from geolink.training.log import read_log
from geolink.training.loop import pretrain
from pipelines.snapshot import latest_rows, publish
from schemas.errors import GeoLinkError
from schemas.grid import Block
from schemas.load import load_config
from schemas.pins import read_pins
from schemas.training import MixedDataset, ModelConfig, TrainConfig
from tests.shards import make_dataset, make_grid, random_arrays, store_row

TINY = ModelConfig(
    image_size=32, patch_size=8, bands=3, embed_dim=16, depth=1, num_heads=2, tag_dim=16,
    osm_dim=8, fusion_dim=8, fusion_heads=2, projection_dim=4, decoder_dim=8, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip


@pytest.fixture
def datasets(tmp_path: Path) -> list[Path]:
    return [make_dataset(tmp_path / str(n), shards=3, chips=7, seed=n) for n in range(2)]


def config(datasets: list[Path], run: Path, **changes: Any) -> TrainConfig:
    """A run of 5 steps an epoch, 3 on the first dataset and 2 on the second, if there is one."""
    return TrainConfig(**{
        "dataset": datasets[0], "run": run, "model": TINY, "epochs": 2, "batch_size": 6,
        "mix": [MixedDataset(dataset=d, weight=0.6) for d in datasets[1:]], "accelerator": "cpu",
        "log_every": 2, "checkpoint_every": 3, **changes,
    })  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1] / "model.safetensors")


def test_a_run_on_two_datasets_goes_on_as_if_it_had_not_been_stopped(
    datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain(config(datasets, tmp_path / "whole"))
    assert (whole.finished, whole.steps) == (True, 10)
    sources, plain = [], loop.train_step

    class Killed(Exception):
        pass

    def watched(t: Any, batch: Any, lr: float) -> Any:
        sources.append(batch.source)
        if t.step == 5 and len(sources) == 5:
            assert [len(read_pins(d)) for d in datasets] == [1, 1]
            raise Killed
        return plain(t, batch, lr)

    monkeypatch.setattr(loop, "train_step", watched)
    run = config(datasets, tmp_path / "run")
    with pytest.raises(Killed):
        pretrain(run)
    # What is published meanwhile does not disturb it.
    for folder in datasets:
        new = store_row(folder, Block(32632, 10, 100), random_arrays(99))
        opened = open_dataset(folder)
        rows = [new, *latest_rows(folder)[1:]]
        publish(folder, rows, opened.vocabulary_key, opened.info)
    assert pretrain(run).finished
    assert sorted(sources[:3] + sources[5:]) == [0] * 6 + [1] * 4
    ours, theirs = weights(run.run), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    _, meta = load_model(run.run)
    (mixed,) = meta.mixed
    assert (mixed.snapshot, mixed.dataset) == (1, "fabricated")
    np.testing.assert_allclose(mixed.mean, band_statistics(open_dataset(datasets[1], 1))[0])
    assert [read_pins(d) for d in datasets] == [{}, {}]


def test_pixels_are_normalised_by_their_own_dataset(
    datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, list[float]]] = []
    plain = loop.prepare

    def watched(batch: Any, t: Any, draw: Any) -> Any:
        given.append((batch.source, t.pixels[batch.source].mean.tolist()))
        return plain(batch, t, draw)

    monkeypatch.setattr(loop, "prepare", watched)
    pretrain(config(datasets, tmp_path / "run", epochs=1))
    for source, mean in given:
        expected, _ = band_statistics(open_dataset(datasets[source]))
        np.testing.assert_allclose(mean, expected, rtol=1e-6)
    assert {source for source, _ in given} == {0, 1}


def test_datasets_that_cannot_be_mixed_are_refused(datasets: list[Path], tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", grid=make_grid(size=64))
    with pytest.raises(GeoLinkError, match=r"cannot be mixed: pixels a side differ \(32 and 64\)"):
        pretrain(config([datasets[0], other], tmp_path / "a"))
    mix = [MixedDataset(dataset=datasets[1], weight=0.01)]
    with pytest.raises(GeoLinkError, match="dataset 1 of the mix gives no batch"):
        pretrain(config(datasets, tmp_path / "b", mix=mix))


def test_lanes_that_devices_cannot_share_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lanes 4 must be a multiple of devices 3 and divide"):
        config([tmp_path], tmp_path, lanes=4, devices=3, batch_size=12)
    assert config([tmp_path], tmp_path, lanes=6, devices=3, batch_size=12).lanes == 6


def test_folders_of_a_mix_are_taken_from_the_configs_folder(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("dataset: a\nrun: r\nmix:\n- dataset: b\n  weight: 2\n- dataset: s3://x/y\n")
    found = load_config(path, TrainConfig).mix
    assert [part.dataset for part in found] == [tmp_path / "b", "s3://x/y"]


def test_the_log_tells_of_shards_that_were_skipped(datasets: list[Path], tmp_path: Path) -> None:
    row = open_dataset(datasets[0]).rows[1]
    (datasets[0] / row.path / "image" / "c.0.0.0.0").write_bytes(b"x")
    with pytest.raises(GeoLinkError, match=f"{row.shard}.*is missing or damaged"):
        pretrain(config(datasets[:1], tmp_path / "fail"))
    result = pretrain(config(datasets[:1], tmp_path / "skip", on_corrupt="skip"))
    assert (result.finished, result.steps) == (True, 6)
    told = [n["message"] for n in read_log(tmp_path / "skip") if row.shard in n.get("message", "")]
    assert len(told) == 1
    assert "chips of other shards take its place (shards skipped so far: 1)" in told[0]
