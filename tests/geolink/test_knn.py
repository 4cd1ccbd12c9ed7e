"""kNN evaluation against scikit-learn, and its intervals against what they promise."""

import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from geolink.tasks import scores as scoring
from geolink.tasks.features import band_features, pixel_features
from geolink.tasks.knn import compare, knn_predict, standardise

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
