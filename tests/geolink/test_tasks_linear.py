"""The linear probe against scikit-learn's logistic regression."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from geolink.tasks import linear
from geolink.tasks.knn import feature_scale
from geolink.tasks.linear import fit_weights

CPU = torch.device("cpu")


def points(n: int, classes: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, n)
    centre = rng.normal(size=(classes, 8))
    x = centre[label] + rng.normal(size=(n, 8)) * 1.5
    return (x * np.arange(1, 9) + 5).astype(np.float32), label


@pytest.mark.parametrize("rows_at_once", [1 << 15, 70])
def test_weights_are_those_of_scikit_learn(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_ROWS", rows_at_once)
    x, label = points(300, 4)
    rows = np.arange(0, 300, 2)
    weights = fit_weights(
        x, rows, label[rows], 4, feature_scale(x, rows), penalty=1e-2, steps=500, device=CPU
    ).numpy()
    scaled = StandardScaler().fit_transform(x[rows])
    # scikit-learn: C times the sum of losses plus half the squares.
    oracle = LogisticRegression(C=1 / (1e-2 * len(rows)), max_iter=2000, tol=1e-8)
    oracle.fit(scaled, label[rows])
    np.testing.assert_allclose(weights[:, :-1], oracle.coef_, atol=5e-3)
    bias = weights[:, -1] - weights[:, -1].mean()
    np.testing.assert_allclose(bias, oracle.intercept_ - oracle.intercept_.mean(), atol=5e-3)


def test_several_classes_of_an_image_are_as_many_yes_or_no() -> None:
    x, label = points(200, 3)
    many = np.stack([label == 0, label != 1, x[:, 0] > 5], 1).astype(np.uint8)
    rows = np.arange(200)
    weights = fit_weights(
        x, rows, many, 3, feature_scale(x, rows), penalty=1e-2, steps=500, device=CPU
    ).numpy()
    scaled = StandardScaler().fit_transform(x)
    for c in range(3):
        oracle = LogisticRegression(C=1 / (1e-2 * 200), max_iter=2000, tol=1e-8)
        oracle.fit(scaled, many[:, c])
        np.testing.assert_allclose(weights[c, :-1], oracle.coef_[0], atol=5e-3)
