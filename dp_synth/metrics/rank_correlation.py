"""Rank correlations of two scores, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Scores = npt.NDArray[np.float64]
Correlation = Callable[[Scores, Scores], Scores]

_DRAWS = 2_000
_FEWEST = 5  # points; of fewer, too few resamples differ


def spearman(x: Scores, y: Scores) -> Scores:
    """Return Spearman's rho of ``x`` and ``y`` ``[..., n]`` along the last axis, NaN if undefined.

    It is the correlation of the ranks, ties sharing their mean; undefined where a score is
    constant.
    """
    return _correlation(*(_centred(rankdata(scores, axis=-1)) for scores in (x, y)))


def kendall(x: Scores, y: Scores) -> Scores:
    """Return Kendall's tau-b of ``x`` and ``y`` ``[..., n]`` along the last axis, NaN if undefined.

    It is the correlation of the signs of all differences; undefined where a score is constant.
    """
    return _correlation(*(_signs(scores) for scores in (x, y)))


def bootstrap_interval(
    correlation: Correlation, x: Scores, y: Scores, seed: int
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of a correlation over resampled points.

    Args:
        correlation: ``spearman`` or ``kendall``.
        x: ``[n]``.
        y: ``[n]``.
        seed: of the 2,000 resamples; those in which a score is constant are left out.

    Returns:
        The ends, or None where n is less than 5 or a score is constant.
    """
    n = len(x)
    if n < _FEWEST:
        return None
    rows = np.random.default_rng(seed).integers(n, size=(_DRAWS, n))
    values = correlation(x[rows], y[rows])
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _centred(scores: Scores) -> Scores:
    return scores - scores.mean(axis=-1, keepdims=True)


def _signs(scores: Scores) -> Scores:
    differences = np.sign(scores[..., :, None] - scores[..., None, :])
    return differences.reshape(*scores.shape[:-1], -1)


def _correlation(x: Scores, y: Scores) -> Scores:
    """Return the cosine of vectors along the last axis, NaN where one of them is 0."""
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.divide((x * y).sum(-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)
