"""Scores, intervals, tests and calibration against scikit-learn, scipy and counting by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
)

from geolink.tasks import significance
from geolink.tasks.calibration import BINS, calibration, confidence_bins, outcome_bins
from geolink.tasks.contracts import Labels, Masks
from geolink.tasks.measures import MEASURES, class_scores, scores_of
from geolink.tasks.measures import confusion_matrix as counted
from geolink.tasks.significance import bootstrap, interval, paired_test, score

CLASSES = 5


def labels(truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> Labels:
    """Sure predictions."""
    return Labels(
        np.arange(len(truth)).astype(str), truth, np.eye(classes, dtype=np.float32)[predicted]
    )


def test_scores_of_classes_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, 200), rng.integers(0, CLASSES, 200)
    confusion = counted(truth, predicted, CLASSES)
    assert np.array_equal(confusion, confusion_matrix(truth, predicted, labels=range(CLASSES)))
    occurring = {"labels": range(4), "average": "macro"}
    expected = [
        accuracy_score(truth, predicted),
        balanced_accuracy_score(truth, predicted),
        f1_score(truth, predicted, **occurring),
    ]
    np.testing.assert_allclose(scores_of(confusion, "class"), expected)
    np.testing.assert_allclose(score(labels(truth, predicted, CLASSES), "class"), expected)
    iou = jaccard_score(truth, predicted, **occurring)
    assert scores_of(confusion, "mask")[0] == pytest.approx(iou)
    np.testing.assert_allclose(
        class_scores(confusion)["iou"],
        jaccard_score(truth, predicted, labels=range(CLASSES), average=None),
    )


def test_scores_of_change_are_of_the_second_class() -> None:
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    expected = [
        jaccard_score(truth, predicted), f1_score(truth, predicted),
        accuracy_score(truth, predicted),
    ]  # fmt: skip
    np.testing.assert_allclose(scores_of(counted(truth, predicted, 2), "change"), expected)


def test_scores_of_several_classes_an_image_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    truth = (rng.random((150, 4)) < (0.5, 0.3, 0.1, 0.7)).astype(np.uint8)
    p = np.round(np.clip(0.4 * truth + 0.6 * rng.random((150, 4)), 0, 1), 1).astype(np.float32)
    found = score(Labels(np.arange(150).astype(str), truth, p), "multilabel")
    expected = [
        f1_score(truth, p >= 0.5, average="macro"), f1_score(truth, p >= 0.5, average="micro"),
        average_precision_score(truth, p, average="macro"),
    ]  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-6)  # ties included


def test_a_bootstrap_of_masks_scores_the_sums_of_the_images_drawn() -> None:
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 50, (12, 3, 3))
    masks = Masks(np.arange(12).astype(str), counts, np.zeros((BINS, 3)))
    found = bootstrap([masks], "mask", resamples=6, seed=4)
    drawn = np.random.default_rng(4).integers(12, size=(6, 12))
    for n, rows in enumerate(drawn):
        np.testing.assert_allclose(found[n], scores_of(counts[rows].sum(0), "mask"))


def test_resamples_are_the_same_for_every_method_and_block_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 50)
    right, some = labels(truth, truth, 3), labels(truth, rng.integers(0, 3, 50), 3)
    assert (bootstrap([right], "class", resamples=40, seed=5) == 1).all()
    drawn = bootstrap([some], "class", resamples=40, seed=5)
    assert drawn.shape == (40, 3)
    # Each draw is scored as scikit-learn scores it.
    rows = np.random.default_rng(5).integers(50, size=(40, 50))
    predicted = some.probability.argmax(1)
    assert drawn[7, 0] == pytest.approx(accuracy_score(truth[rows[7]], predicted[rows[7]]))
    monkeypatch.setattr(significance, "_CELLS", 7 * 50)
    assert np.array_equal(bootstrap([some], "class", resamples=40, seed=5), drawn)


def test_the_interval_holds_the_true_accuracy_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    accuracy, images, held = 0.7, 150, 0
    for n in range(200):
        truth = rng.integers(0, 3, images)
        predicted = np.where(rng.random(images) < accuracy, truth, (truth + 1) % 3)
        drawn = bootstrap([labels(truth, predicted, 3)], "class", resamples=200, seed=n)
        low, high = interval(drawn)[:, 0]
        held += bool(low <= accuracy <= high)
    assert 178 <= held <= 199


@pytest.mark.parametrize(("ours_alone", "theirs_alone"), [(15, 5), (9, 7), (6, 0)])
def test_a_paired_test_of_accuracy_is_an_exact_sign_test(
    ours_alone: int, theirs_alone: int
) -> None:
    truth = np.zeros(100, np.int64)
    ours, theirs = np.zeros(100, np.int64), np.zeros(100, np.int64)
    theirs[:ours_alone] = 1
    ours[ours_alone : ours_alone + theirs_alone] = 1
    p = paired_test(
        [labels(truth, ours, 2)], [labels(truth, theirs, 2)], "class", permutations=20_000, seed=0
    )[0]
    expected = binomtest(ours_alone, ours_alone + theirs_alone).pvalue
    assert p == pytest.approx(expected, abs=0.012)


def test_models_that_are_alike_differ_by_chance_in_one_of_twenty_tests() -> None:
    rng = np.random.default_rng(1)
    found = []
    for n in range(120):
        truth = rng.integers(0, 3, 60)
        a, b = (np.where(rng.random(60) < 0.6, truth, (truth + 1) % 3) for _ in range(2))
        found.append(
            paired_test(
                [labels(truth, a, 3)], [labels(truth, b, 3)], "class", permutations=99, seed=n
            )[2]
        )
    assert (np.array(found) <= 0.05).mean() < 0.12


def test_calibration_is_counted_by_hand() -> None:
    confidence = np.array([0.95, 0.9, 0.95, 0.55, 1.0])
    right = np.array([True, False, True, True, True])
    bins = confidence_bins(confidence, right)
    found = calibration(bins)
    # Bins of a fifteenth: 0.55 alone; 0.9 alone (0.867 to 0.933); 0.95, 0.95, 1 together.
    expected = (abs(0.55 - 1) + abs(0.9 - 0) + 3 * abs(2.9 / 3 - 1)) / 5
    assert found["ece"] == pytest.approx(expected)
    assert sum(found["count"]) == 5
    assert [r for r in found["right"] if r is not None] == [1.0, 0.0, 1.0]


def test_a_model_that_says_what_it_knows_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet((0.6, 0.6, 0.6), 40_000).astype(np.float32)
    truth = (p.cumsum(1) > rng.random((40_000, 1))).argmax(1)
    ids = np.arange(40_000).astype(str)
    assert calibration(outcome_bins(Labels(ids, truth, p)))["ece"] < 0.015
    sure = np.eye(3, dtype=np.float32)[p.argmax(1)]
    wrong = 1 - accuracy_score(truth, p.argmax(1))
    found = calibration(outcome_bins(Labels(ids, truth, sure)))["ece"]
    assert found == pytest.approx(wrong, abs=1e-6)


def test_every_kind_of_label_has_measures() -> None:
    assert all(len(set(names)) == 3 for names in MEASURES.values())
