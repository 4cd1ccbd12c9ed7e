"""Nearest neighbours against scikit-learn, in parts and in bounded memory."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from geolink.tasks import knn
from geolink.tasks.knn import feature_scale, knn_votes

CLASSES = 5
CPU = torch.device("cpu")
Floats = NDArray[np.float32]


def clouds(n: int, seed: int, dim: int = 12) -> tuple[Floats, NDArray[np.int64]]:
    """Points of overlapping clusters, one a class."""
    centre = np.random.default_rng(99).normal(size=(CLASSES, dim))
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n)
    points = centre[label] + rng.normal(scale=1.5, size=(n, dim)) * np.arange(1, dim + 1) + 3
    return points.astype(np.float32), label


def votes(
    x: Floats, label: NDArray[np.int64], query: Floats, k: int, temperature: float = 0.07,
    rows: NDArray[np.int64] | None = None,
) -> Floats:  # fmt: skip
    rows = np.arange(len(x)) if rows is None else rows
    target = np.eye(CLASSES, dtype=np.uint8)[label[rows]]
    return knn_votes(
        x, rows, target, query, feature_scale(x, rows), k=k, temperature=temperature, device=CPU
    )


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0)])
def test_neighbours_vote_as_in_scikit_learn(
    k: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "_SIMILARITIES", 7 * 64)  # several parts of queries
    monkeypatch.setattr(knn, "_ROWS", 64)  # and of those that vote
    (x, label), (query, _) = clouds(300, 0), clouds(101, 1)
    found = votes(x, label, query, k, temperature)
    scaler = StandardScaler().fit(x)
    oracle = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(scaler.transform(x), label)
    expected = oracle.predict_proba(scaler.transform(query))
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_only_images_whose_labels_are_used_vote() -> None:
    (x, label), (query, _) = clouds(200, 0), clouds(50, 1)
    rows = np.sort(np.random.default_rng(2).choice(200, 60, replace=False))
    some = votes(x, label, query, 7, rows=rows)
    np.testing.assert_allclose(some, votes(x[rows], label[rows], query, 7), atol=1e-5)


def test_a_constant_feature_has_no_say() -> None:
    (x, label), (query, _) = clouds(60, 0), clouds(20, 1)
    wider = [np.concatenate([p, np.full((len(p), 1), 0.1, np.float32)], 1) for p in (x, query)]
    np.testing.assert_allclose(
        votes(x, label, query, 5), votes(wider[0], label, wider[1], 5), atol=1e-5
    )


def test_memory_does_not_grow_with_the_number_of_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak memory of numpy over maps on disk, four times as many rows."""
    monkeypatch.setattr(knn, "_SIMILARITIES", 1 << 18)
    monkeypatch.setattr(knn, "_ROWS", 1 << 10)
    peaks = []
    for n, count in enumerate((4_000, 16_000)):
        rng = np.random.default_rng(0)
        path = tmp_path / f"{n}.npy"
        np.save(path, rng.normal(size=(count, 64)).astype(np.float32))
        mapped = np.load(path, mmap_mode="r")
        label = rng.integers(0, CLASSES, count)
        tracemalloc.start()
        votes(mapped, label, mapped[:500], 5)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # What is held of each row is its number and its class, not its features.
    assert peaks[1] - peaks[0] < 12_000 * 64 * 4 / 2
