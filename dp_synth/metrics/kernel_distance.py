"""The kernel distance between sets of features: KID, whose expectation is right for few images."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance, poly_kernel

from dp_synth.metrics.intervals import Rows, half_sampling_interval
from dp_synth.metrics.precomputed import Precomputed

# What published values were computed with.
_SUBSETS = 100
_SUBSET_SIZE = 1000


class KernelDistance:
    """KID (Binkowski et al. 2018, arXiv 1801.01401) of a set of features to a reference.

    It is the unbiased estimate of the squared maximum mean discrepancy under the kernel
    ``(x . y / D + 1)^3``, by torchmetrics: the mean over 100 random subsets of 1000 a side, or of
    all where there are no more. Near 0, also below it, for sets from one distribution, however
    small they are.

    Args:
        reference: features ``[N, D]``, N >= 2.
        features: features ``[N, D]``, as many.
        seed: fixes the subsets and the halves of the interval.
    """

    def __init__(
        self,
        reference: npt.NDArray[np.float32],
        features: npt.NDArray[np.float32],
        seed: int,
    ) -> None:
        self._reference = torch.tensor(reference, dtype=torch.float64)
        self._features = torch.tensor(features, dtype=torch.float64)
        self._seed = seed

    def value(self) -> float:
        """Return the distance."""
        n = len(self._features)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")
            metric = KernelInceptionDistance(
                feature=Precomputed(self._features.shape[1]),
                subsets=_SUBSETS if n > _SUBSET_SIZE else 1,  # else they are one and the same
                subset_size=min(n, _SUBSET_SIZE),
            )
        metric.update(self._reference, real=True)
        metric.update(self._features, real=False)
        # Not torch.manual_seed: it would reseed every GPU too, which this fork does not save.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            return float(metric.compute()[0])

    def interval(self, value: float) -> tuple[float, float] | None:
        """Return the half-sampling interval of ``value``.

        What is resampled are the features; the reference stays.
        """
        within = poly_kernel(self._features, self._features).fill_diagonal_(0)
        # The mean over the reference and the reference's own part, which is one number for all
        # halves, so that it does not matter.
        across = poly_kernel(self._features, self._reference).mean(dim=1)

        def on_rows(half: Rows) -> float:
            return _moving_part(within, across, torch.from_numpy(half))

        return half_sampling_interval(value, on_rows, len(self._features), self._seed)


def _moving_part(within: Tensor, across: Tensor, rows: Tensor) -> float:
    """The part of the distance that depends on the features at ``rows``.

    Args:
        within: kernel ``[N, N]`` of the features with each other, 0 on the diagonal.
        across: mean kernel ``[N]`` of each of the features with the reference.
        rows: int64 ``[n]``, n >= 2.
    """
    n = len(rows)
    chosen = torch.zeros(len(across), dtype=across.dtype)
    chosen[rows] = 1
    return float(chosen @ within @ chosen / (n * (n - 1)) - 2 * (chosen @ across) / n)
