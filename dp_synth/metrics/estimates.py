"""What predictions are worth: proportions of right ones with intervals, and calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import t as student
from torchmetrics.functional.classification import multiclass_calibration_error

from dp_synth.data.images import Images

_BINS = 15  # of confidence, as Guo et al. have


@dataclass(frozen=True)
class Estimate:
    """A proportion with its 95 % interval.

    Attributes:
        value: the observed proportion, 0..1.
        ci_low: lower end of the interval.
        ci_high: upper end of the interval.
        n: how many images it was counted on.
    """

    value: float
    ci_low: float
    ci_high: float
    n: int

    @classmethod
    def of(cls, correct: npt.NDArray[np.bool_] | npt.NDArray[np.float64]) -> Estimate:
        """Estimate the mean of ``correct``: for each image whether, or how often, it is right.

        For one classifier it is the Wilson interval. For several, trained from as many seeds, it is
        one for the mean accuracy of all such classifiers on all such images. The variance of the
        mean is that of the images' means plus that of the seeds' means (which counts what is
        neither's twice, on the safe side). It gives an effective number of images, at most n; the
        interval is Wilson's for so many, with Student's quantile at Satterthwaite's degrees of
        freedom, since few seeds tell their variance poorly. From 3 seeds on it covers at least as
        often as it says, nearly; from 2 seeds that differ much, in some 87 % of cases.

        Args:
            correct: bool or float in 0..1, ``[n]``, or ``[S, n]`` for S seeds.

        Raises:
            ValueError: n is 0; nothing has no proportion.
        """
        rows = np.atleast_2d(correct).astype(np.float64)
        n = rows.shape[1]
        if n == 0:
            raise ValueError("a proportion of 0 images cannot be estimated.")
        value = float(rows.mean())
        by_images = float(rows.mean(axis=0).var()) / n
        by_seeds = float(rows.mean(axis=1).var(ddof=1)) / len(rows) if len(rows) > 1 else 0.0
        variance = by_images + by_seeds
        effective, quantile = float(n), float(student.ppf(0.975, math.inf))
        if variance > 0:
            effective = min(effective, value * (1 - value) / variance)
        if by_seeds > 0:
            freedom = (len(rows) - 1) * (variance / by_seeds) ** 2
            quantile = float(student.ppf(0.975, freedom))
        low, high = _wilson(value, effective, quantile)
        return cls(value, low, high, n)


def accuracy(predicted: npt.NDArray[np.int64], images: Images) -> Estimate:
    """Return the share of ``predicted`` labels, ``[N]`` or ``[S, N]`` of S seeds, that are right.

    Raises:
        ValueError: N is 0.
    """
    return Estimate.of(predicted == images.labels)


def class_recall(predicted: npt.NDArray[np.int64], images: Images) -> dict[str, Estimate]:
    """Return, for each class that has an image, the share of its images labelled right.

    Args:
        predicted: labels ``[N]``, or ``[S, N]`` of S seeds.
        images: with their true labels.
    """
    correct = predicted == images.labels
    return {
        name: Estimate.of(correct[..., images.labels == label])
        for label, name in enumerate(images.classes)
        if (images.labels == label).any()
    }


def calibration_error(
    probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
) -> float:
    """Return the expected calibration error in 15 bins of equal width, 0..1.

    It is how far confidence and accuracy are apart, averaged over the images (Guo et al. 2017,
    arXiv 1706.04599, eq. 3).

    Args:
        probabilities: of the classes, ``[N, num_classes]``, N >= 1.
        labels: the true ones, ``[N]``.
    """
    error = multiclass_calibration_error(
        torch.from_numpy(probabilities),
        torch.from_numpy(labels),
        num_classes=probabilities.shape[1],
        n_bins=_BINS,
        norm="l1",
        validate_args=False,  # it would refuse a single class, whose error is 0
    )
    return float(error)


def _wilson(value: float, n: float, quantile: float) -> tuple[float, float]:
    """Return the ends of Wilson's interval (Wilson 1927) for ``value`` seen in ``n`` trials."""
    square = quantile**2 / n
    centre = (value + square / 2) / (1 + square)
    half = quantile / (1 + square) * math.sqrt(value * (1 - value) / n + square / (4 * n))
    # Rounding must not leave the observed value, or 0..1, outside.
    return max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half))
