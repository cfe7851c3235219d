"""Renyi differential privacy: curves over orders, and what they say in eps and delta."""

import math
import warnings
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
from opacus.accountants.analysis import rdp as opacus_rdp

Curve = Callable[[float], float]  # order above 1 -> a bound on the Renyi divergence of that order

# Wide enough that the best order is inside for eps from 0.01 to 100.
_ORDERS = tuple(1 + x for x in np.geomspace(0.01, 10, 100).tolist()) + tuple(
    float(order) for order in sorted({round(x) for x in np.geomspace(12, 4096, 150)})
)
# Opacus ends its series for a fractional order at terms below exp(-30), and logarithms of sums near
# 1 round: what it leaves out must not count in favour of the claim, step after step.
_SERIES_ERROR = 3e-13


@lru_cache(maxsize=65536)
def subsampled_gaussian(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """The Renyi divergence of one step, infinite where this order has no bound to give.

    Mironov et al. 2019 (arXiv 1908.10530), for a unit that is added as for one that is removed.
    """
    if sample_rate == 1:
        return order / 2 / noise_multiplier / noise_multiplier
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            (rdp,) = opacus_rdp.compute_rdp(
                q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=[order]
            )
        except (ValueError, OverflowError, ZeroDivisionError):
            return math.inf
    return math.inf if math.isnan(rdp) else max(float(rdp), 0.0) + _SERIES_ERROR / (order - 1)


def epsilon(curve: Curve, delta: float) -> float:
    """eps at `delta`, 0 or more, by the best order.

    Balle et al. 2020 (arXiv 1905.09982, theorem 21).
    """

    def bound(order: float) -> float:
        offset = math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        return curve(order) + offset

    return max(smallest(bound), 0.0)


def delta(curve: Curve, eps: float) -> float:
    """delta at `eps`, at most 1, by the best order: the same theorem read the other way."""

    def log_bound(order: float) -> float:
        return (order - 1) * (curve(order) + math.log1p(-1 / order) - eps) - math.log(order)

    return math.exp(min(smallest(log_bound), 0.0))


def smallest(bound: Curve) -> float:
    """The smallest value that a search over the orders finds; sound wherever it ends.

    Every order bounds. Such bounds fall and then rise with the order, and overflow makes them
    infinite from some order on: the search halves its way to the lowest point.
    """
    bound = cache(bound)
    low, high = 0, len(_ORDERS) - 1
    while low < high:
        middle = (low + high) // 2
        if bound(_ORDERS[middle]) <= bound(_ORDERS[middle + 1]):
            high = middle
        else:
            low = middle + 1
    return bound(_ORDERS[low])
