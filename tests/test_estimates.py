"""Intervals against their equation and by simulation, calibration against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from toy_images import toy

from dp_synth.data.images import Images
from dp_synth.metrics.estimates import Estimate, accuracy, calibration_error, class_recall


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 7), (3, 7), (353, 360), (360, 360)])
def test_interval_is_the_root_of_wilsons_equation(hits: int, n: int) -> None:
    images = Images(np.zeros((n, 8, 8, 1), np.uint8), np.zeros(n, np.int64), ("a", "b"))
    predicted = (np.arange(n) >= hits).astype(np.int64)
    estimate = accuracy(predicted, images)
    z = 1.959963984540054
    p = hits / n
    # (p - u)^2 = z^2 u (1 - u) / n, solved for u
    roots = np.roots([1 + z**2 / n, -(2 * p + z**2 / n), p**2]).real
    assert estimate.value == p and estimate.n == n
    assert estimate.ci_low == pytest.approx(min(roots), abs=1e-7)
    assert estimate.ci_high == pytest.approx(max(roots), abs=1e-7)


def test_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 images"):
        accuracy(np.zeros(0, np.int64), toy(0, 0))


def test_recall_counts_each_class_and_leaves_out_absent_ones() -> None:
    labels = np.array([0, 0, 0, 2, 2], np.int64)
    images = Images(np.zeros((5, 8, 8, 1), np.uint8), labels, ("a", "b", "c"))
    recall = class_recall(np.array([0, 1, 0, 2, 0], np.int64), images)
    assert list(recall) == ["a", "c"]
    assert (recall["a"].value, recall["a"].n) == (pytest.approx(2 / 3), 3)
    assert (recall["c"].value, recall["c"].n) == (0.5, 2)


def test_recall_is_the_mean_over_seeds() -> None:
    labels = np.array([0, 0, 1, 1, 1], np.int64)
    images = Images(np.zeros((5, 8, 8, 1), np.uint8), labels, ("a", "b"))
    predicted = np.array([[0, 1, 1, 1, 1], [0, 0, 1, 0, 0]], np.int64)
    recall = class_recall(predicted, images)
    assert {name: (found.value, found.n) for name, found in recall.items()} == {
        "a": (0.75, 2),
        "b": (pytest.approx(4 / 6), 3),
    }


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("seeds", "n", "spread"), [(1, 101, 0.0), (3, 50, 0.0), (3, 300, 0.3), (5, 1009, 0.3)]
)
def test_interval_covers_the_mean_accuracy_of_all_seeds_on_all_images(
    seeds: int, n: int, spread: float
) -> None:
    """Images differ in difficulty (standard deviation 2 in log odds) and seeds in skill."""
    rng = np.random.default_rng(0)
    difficulty, skill = rng.normal(2.5, 2, 10**6), rng.normal(0, spread, 10**6)
    truth, trials = sigmoid(difficulty + skill).mean(), 600
    hits = 0
    for _ in range(trials):
        odds = rng.normal(2.5, 2, n) + rng.normal(0, spread, (seeds, 1))
        estimate = Estimate.of(rng.random((seeds, n)) < sigmoid(odds))
        hits += estimate.ci_low <= truth <= estimate.ci_high
    # Wilson's coverage wavers around 95 %; the rest is chance, at 3 standard deviations.
    assert hits / trials > 0.94 - 3 * (0.95 * 0.05 / trials) ** 0.5


def test_interval_of_one_seed_alone_is_too_narrow_for_all_seeds() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random((5, 2000)) < sigmoid(np.array([0.5, 1.0, 1.5, 2.0, 2.5]))[:, None]
    together = Estimate.of(correct)
    widths = [one.ci_high - one.ci_low for one in map(Estimate.of, correct)]
    assert together.value == pytest.approx(correct.mean())
    assert together.ci_high - together.ci_low > 3 * max(widths)


@pytest.mark.parametrize("seeds", [2, 3, 7])
@pytest.mark.parametrize("n", [1, 2, 13])
def test_seeds_that_agree_tell_no_more_than_one(seeds: int, n: int) -> None:
    row = np.random.default_rng(n).random(n) < 0.7
    assert Estimate.of(np.tile(row, (seeds, 1))) == Estimate.of(row)


@pytest.mark.parametrize(("n", "num_classes"), [(1, 2), (7, 3), (997, 10), (5, 1)])
def test_calibration_error_is_that_of_a_loop_over_bins(n: int, num_classes: int) -> None:
    rng = np.random.default_rng(n)
    probabilities = rng.dirichlet(np.full(num_classes, 0.4), n).astype(np.float32)
    labels = rng.integers(num_classes, size=n)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_of_the_true_probabilities_vanishes() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), 200_000).astype(np.float32)
    labels = (rng.random((200_000, 1)) > probabilities.cumsum(axis=1)).sum(axis=1).clip(max=2)
    assert calibration_error(probabilities, labels) < 0.01
    assert calibration_error(np.eye(3, dtype=np.float32)[labels], (labels + 1) % 3) == 1
