"""kNN evaluation against scikit-learn, and its intervals against what they promise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from geolink.checkpoint import (
    MODEL,
    OPTIMIZER,
    CheckpointMeta,
    host_copy,
    load_model,
    model_tensors,
    save_checkpoint,
)
from geolink.device import normalise
from geolink.models import GeoLink
from geolink.reader import band_statistics, open_dataset, read_shard
from geolink.tasks import scores as scoring
from geolink.tasks.features import band_features, pixel_features
from geolink.tasks.knn import compare, evaluate, evaluate_seeds, knn_predict, standardise
from schemas.errors import GeoLinkError
from schemas.evaluation import EvaluateConfig
from schemas.training import ModelConfig, TrainConfig
from tests.shards import make_dataset

CLASSES = 5


def clouds(n: int, seed: int, dim: int = 12) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Points of overlapping clusters, one a class."""
    centre = np.random.default_rng(99).normal(size=(CLASSES, dim))
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n)
    points = centre[label] + rng.normal(scale=1.5, size=(n, dim)) * np.arange(1, dim + 1) + 3
    return torch.from_numpy(points.astype(np.float32)), label


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0)])
def test_neighbours_vote_as_in_scikit_learn(
    k: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geolink.tasks.knn._SIMILARITIES", 7 * 300)  # several chunks
    (x, label), (query, _) = clouds(300, 0), clouds(101, 1)
    found = knn_predict(*standardise(x, query), label, CLASSES, k=k, temperature=temperature)
    scaler = StandardScaler().fit(x.numpy())
    oracle = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(scaler.transform(x.numpy()), label)
    assert (found == oracle.predict(scaler.transform(query.numpy()))).mean() >= 0.99


def test_a_constant_feature_has_no_say() -> None:
    (x, label), (query, _) = clouds(60, 0), clouds(20, 1)
    wider = [torch.cat([part, torch.full((len(part), 1), 0.1)], 1) for part in (x, query)]
    plain = knn_predict(*standardise(x, query), label, CLASSES, k=5, temperature=0.1)
    same = knn_predict(*standardise(*wider), label, CLASSES, k=5, temperature=0.1)
    assert np.array_equal(plain, same)


def test_scores_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, 200), rng.integers(0, CLASSES, 200)
    confusion = scoring.confusion_matrix(truth, predicted, CLASSES)
    assert np.array_equal(confusion, confusion_matrix(truth, predicted, labels=range(CLASSES)))
    np.testing.assert_allclose(
        scoring.scores(confusion),
        [
            accuracy_score(truth, predicted),
            balanced_accuracy_score(truth, predicted),
            f1_score(truth, predicted, labels=range(4), average="macro"),
        ],
    )


def test_resamples_are_the_same_for_every_method_and_block_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 50)
    methods = {"a": truth, "b": truth.copy(), "c": rng.integers(0, 3, 50)}
    drawn = scoring.bootstrap(truth, methods, 3, resamples=40, seed=5)
    assert np.array_equal(drawn["a"], drawn["b"])
    assert (drawn["a"] == 1).all()
    assert drawn["c"].shape == (40, 3)
    monkeypatch.setattr(scoring, "_CELLS", 7 * 50)
    again = scoring.bootstrap(truth, methods, 3, resamples=40, seed=5)
    assert np.array_equal(again["c"], drawn["c"])


def test_the_interval_holds_the_true_accuracy_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    accuracy, chips, held = 0.7, 150, 0
    for n in range(200):
        truth = rng.integers(0, 3, chips)
        right = rng.random(chips) < accuracy
        predicted = np.where(right, truth, (truth + 1) % 3)
        drawn = scoring.bootstrap(truth, {"m": predicted}, 3, resamples=200, seed=n)
        low, high = scoring.interval(drawn["m"])[:, 0]
        held += bool(low <= accuracy <= high)
    assert 178 <= held <= 199


def test_the_difference_to_a_baseline_is_paired() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    encoder = np.where(rng.random(300) < 0.8, truth, (truth + 1) % 3)
    worse = encoder.copy()
    worse[np.flatnonzero(encoder == truth)[:15]] = 3 - 1 - truth[encoder == truth][:15]
    result = compare(truth, {"encoder": encoder, "pixels": worse}, 3, resamples=500, seed=0)
    value, low, high = result["pixels"]["difference"]
    assert value == pytest.approx(result["encoder"]["accuracy"] - result["pixels"]["accuracy"])
    assert 0 < low < value < high
    width = np.diff(result["encoder"]["interval"])[0]
    assert high - low < width  # a paired interval is narrower than that of either accuracy
    assert "difference" not in result["encoder"]
    json.dumps(result)


def test_band_statistics_and_pixels_are_what_they_are_called() -> None:
    images = torch.randn(5, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    bands = band_features(images).reshape(5, 3, 7).numpy()
    pixels = images.flatten(2).numpy()
    np.testing.assert_allclose(bands[..., 0], pixels.mean(2), atol=1e-6)
    np.testing.assert_allclose(bands[..., 1], pixels.std(2, ddof=1), rtol=1e-5)
    quantiles = np.quantile(pixels, (0.05, 0.25, 0.5, 0.75, 0.95), axis=2, method="nearest")
    np.testing.assert_allclose(bands[..., 2:], np.moveaxis(quantiles, 0, 2))
    assert pixel_features(images).shape == (5, 3 * 16 * 16)
    small = images[:, :, :8, :8]
    assert torch.allclose(pixel_features(small), small.flatten(1))


TINY = ModelConfig(
    image_size=32, patch_size=8, bands=3, embed_dim=16, depth=1, num_heads=2, tag_dim=16,
    osm_dim=8, fusion_dim=8, fusion_heads=2, projection_dim=4, decoder_dim=8, decoder_depth=1,
    decoder_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A dataset with three splits, and checkpoints of two seeds."""
    root = tmp_path_factory.mktemp("knn")
    folder = make_dataset(root / "d", shards=6, chips=8, splits=("train", "val", "test"))
    mean, std = band_statistics(open_dataset(folder))
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        meta = CheckpointMeta(
            geolink="0", revision=None, step=1, steps=1, dataset="fabricated", snapshot=1,
            tag_encoder="wordllama", bands=("red", "green", "blue"), nodata=0,
            mean=tuple(mean.tolist()), std=tuple(std.tolist()),
            config=TrainConfig(dataset=folder, run=root, model=TINY, seed=seed),
        )  # fmt: skip
        tensors = {MODEL: host_copy(model_tensors(GeoLink(TINY))), OPTIMIZER: {}}
        found.append(save_checkpoint(root / f"run-{seed}", tensors, meta, {}))
    return folder, found


def knn(places: tuple[Path, list[Path]], **changes: Any) -> EvaluateConfig:
    return EvaluateConfig(
        **{"checkpoint": places[1][0], "dataset": places[0], "k": 3, "bootstrap": 20, **changes}
    )


def test_a_checkpoint_is_scored_on_held_out_chips(
    places: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """Accuracy of the encoder against scikit-learn on features and labels made by hand."""
    result = evaluate(knn(places, output=tmp_path / "new" / "knn.json"))
    assert json.loads((tmp_path / "new" / "knn.json").read_text()) == result
    assert list(result["scores"]) == ["encoder", "random", "pixels", "bands", "majority"]

    dataset = open_dataset(places[0])
    model, meta = load_model(places[1][0])
    x: dict[bool, list[NDArray[np.float32]]] = {True: [], False: []}
    y: dict[bool, list[NDArray[np.int64]]] = {True: [], False: []}
    for row in dataset.rows:
        shard = read_shard(dataset, row)
        pixels, scale = torch.from_numpy(shard["image"]), meta.band_scale(torch.device("cpu"))
        images = normalise(pixels, *scale, meta.nodata)
        with torch.no_grad():
            x[row.split == "train"].append(model.encode_image(images)[:, 1:].mean(1).numpy())
        y[row.split == "train"].append(shard["label_region"].argmax(1))
    scaler = StandardScaler().fit(np.concatenate(x[True]))
    fit, held_out = (scaler.transform(np.concatenate(x[of_train])) for of_train in (True, False))
    oracle = KNeighborsClassifier(3, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    oracle.fit(fit, np.concatenate(y[True]))
    truth = np.concatenate(y[False])
    accuracy = accuracy_score(truth, oracle.predict(held_out))
    assert result["scores"]["encoder"]["accuracy"] == pytest.approx(accuracy, abs=1 / 32)
    assert (result["fit"], result["held_out"]) == (16, 32)
    assert sum(result["class_chips"]["held_out"]) == 32
    low, high = result["scores"]["encoder"]["interval"]
    assert low <= result["scores"]["encoder"]["accuracy"] <= high


def test_chips_without_a_label_or_with_a_small_share_are_counted(
    places: tuple[Path, list[Path]],
) -> None:
    dataset = open_dataset(places[0])
    share = {
        split: np.concatenate(
            [
                read_shard(dataset, r)["label_region"].max(1)
                for r in dataset.rows
                if r.split == split
            ]
        )
        for split in ("train", "test")
    }
    middle = float(np.median(share["test"]))
    result = evaluate(knn(places, held_out=("test",), min_share=middle, k=1))
    for name, split in (("fit", "train"), ("held_out", "test")):
        below = int((share[split] < middle).sum())
        assert result["left_out"][name] == {"no_label": 0, "below_min_share": below}
        assert result[name] == 16 - below


def test_seeds_are_summed_up_by_mean_and_spread(
    places: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    result = evaluate_seeds(knn(places, output=tmp_path / "knn.json"), places[1])
    values = [run["scores"]["encoder"]["accuracy"] for run in result["runs"]]
    spread = result["scores"]["encoder"]["accuracy"]
    assert spread["mean"] == pytest.approx(np.mean(values))
    assert spread["std"] == pytest.approx(np.std(values, ddof=1))
    assert (spread["low"], spread["high"]) == (min(values), max(values))
    assert "difference" in result["scores"]["pixels"]
    assert json.loads((tmp_path / "knn.json").read_text()) == result


def test_evaluations_that_cannot_be_say_why(
    places: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    other = make_dataset(tmp_path / "d", shards=1, chips=4, objects=0.0)
    (tmp_path / "file").write_text("x")
    for changes, text in (
        ({"k": 17}, "k is 17, but only 16 chips of train"),
        ({"min_share": 1.0}, "fit: no chip of split train .*16 below_min_share"),
        ({"fit": ("train", "val")}, "'val' is in both"),
        ({"dataset": other}, "held_out: no chip of split val or test"),
        ({"checkpoint": tmp_path / "nothing"}, "does not exist"),
        ({"output": tmp_path / "file" / "x.json"}, "cannot write"),
    ):
        with pytest.raises(GeoLinkError, match=text):
            evaluate(knn(places, **changes))
    with pytest.raises(GeoLinkError, match="no checkpoint to evaluate"):
        evaluate_seeds(knn(places), [])
