"""Scores of sets of images against one set of real ones, in one space of features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dp_synth.metrics.frechet import FrechetDistance
from dp_synth.metrics.intervals import half_sampling_interval
from dp_synth.metrics.kernel_distance import KernelDistance
from dp_synth.metrics.manifolds import NEIGHBOURS, Manifolds, squared_radii

# All pairs of images are compared: 5000 a side are 200 MB of distances.
_MOST = 5000


@dataclass(frozen=True)
class Score:
    """One number about a set of images.

    Attributes:
        metric: which: ``frechet``, ``kid``, ``precision``, ``recall``, ``density``, ``coverage``.
        value: the number.
        interval: approximate 95 % interval for the draw of the images that are judged, if any.
        n: images a side; of ``frechet``, those that are judged.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None
    n: int


class Comparison:
    """Compares sets of n images each with one reference.

    The Frechet distance takes the whole reference, the other metrics a random part of as many
    images as are judged, at most 5000.

    Args:
        reference: features ``[M, D]`` of real images, M >= 2; may lie in a file.
        n: images of each set, at least 2.
        seed: fixes subsets and halves.
    """

    def __init__(self, reference: npt.NDArray[np.float32], n: int, seed: int) -> None:
        self._frechet = FrechetDistance(reference)
        self._n = min(n, len(reference), _MOST)
        rows = np.random.default_rng(seed).permutation(len(reference))[: self._n]
        self._reference = np.asarray(reference[np.sort(rows)])
        self._radii = squared_radii(self._reference) if self._n > NEIGHBOURS else None
        self._seed = seed

    def scores(self, features: npt.NDArray[np.float32]) -> Iterator[Score]:
        """Yield the scores of one set of images, features ``[n, D]`` in random order.

        With 5 images or fewer there are no neighbourhoods, and only distances come.
        """
        frechet = self._frechet(features)
        interval = self._frechet.interval(features, frechet, self._seed)
        yield Score("frechet", frechet, interval, len(features))
        sample = features[: self._n]
        kernel = KernelDistance(self._reference, sample, self._seed)
        kid = kernel.value()
        yield Score("kid", kid, kernel.interval(kid), self._n)
        if self._radii is not None:
            yield from self._neighbourhoods(Manifolds(self._reference, self._radii, sample))

    def _neighbourhoods(self, manifolds: Manifolds) -> Iterator[Score]:
        for metric, measure, highest in (
            ("precision", manifolds.precision, 1.0),
            ("recall", manifolds.recall, 1.0),
            ("density", manifolds.density, np.inf),
            ("coverage", manifolds.coverage, 1.0),
        ):
            value = measure()
            interval = half_sampling_interval(value, measure, self._n, self._seed, 0.0, highest)
            yield Score(metric, value, interval, self._n)
