"""Intervals of metrics that compare sets of images, where resampling with repeats would mislead."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

_DRAWS = 30
_FEWEST = 40  # images; from halves of fewer, k nearest neighbours tell little
_Z = 1.959963984540054  # of a 95 % interval


def half_sampling_interval(
    value: float,
    on_rows: Callable[[Rows], float],
    n: int,
    seed: int,
    lowest: float = -math.inf,
    highest: float = math.inf,
) -> tuple[float, float] | None:
    """Return an approximate 95 % interval of a statistic of n images, for the draw of these images.

    The statistic is computed on 30 random halves of the images, all else held fixed. Its standard
    deviation over halves drawn without repeats estimates its standard error on all n (the delete-d
    jackknife with d = n / 2, Shao and Wu 1989, doi:10.1214/aos/1176347263); the interval is the
    value plus and minus 1.96 times as much. A bootstrap would draw images repeatedly: repeats make
    covariances flatter and nearest neighbours nearer, which biases a Frechet distance upwards and
    recall downwards. Halves are biased too, but all alike, and only their spread is used. What bias
    the value itself has at n images, such as a Frechet distance's, the interval does not cover. For
    distances close to 0, where errors are quadratic, it is wider than need be.

    Args:
        value: the statistic of all images.
        on_rows: the statistic of the images at given rows.
        n: images.
        seed: fixes the halves.
        lowest: least value that the statistic can have.
        highest: greatest value that it can have.

    Returns:
        The ends, or None where n is less than 40.
    """
    if n < _FEWEST:
        return None
    rng = np.random.default_rng(seed)
    values = [on_rows(rng.permutation(n)[: n // 2]) for _ in range(_DRAWS)]
    error = _Z * float(np.std(values, ddof=1))
    return max(lowest, value - error), min(highest, value + error)
