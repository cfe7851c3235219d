"""Proportions of images, each with its interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from dp_synth.data.images import Images


@dataclass(frozen=True)
class Estimate:
    """A proportion with its 95 % Wilson interval.

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
    def of(cls, correct: npt.NDArray[np.bool_]) -> Estimate:
        """Estimate the share of true entries of ``correct`` ``[n]``.

        Raises:
            ValueError: n is 0; nothing has no proportion.
        """
        n, hits = len(correct), int(correct.sum())
        if n == 0:
            raise ValueError("a proportion of 0 images cannot be estimated.")
        interval = binomtest(hits, n).proportion_ci(0.95, method="wilson")
        return cls(hits / n, float(interval.low), float(interval.high), n)


def accuracy(predicted: npt.NDArray[np.int64], images: Images) -> Estimate:
    """Return the share of ``predicted`` labels ``[N]`` that are right.

    Raises:
        ValueError: N is 0.
    """
    return Estimate.of(predicted == images.labels)


def class_recall(predicted: npt.NDArray[np.int64], images: Images) -> dict[str, Estimate]:
    """Return, for each class that has an image, the share of its images labelled right."""
    correct = predicted == images.labels
    return {
        name: Estimate.of(correct[images.labels == label])
        for label, name in enumerate(images.classes)
        if (images.labels == label).any()
    }
