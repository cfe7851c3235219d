"""The Gaussian mechanism in closed form (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""

import math
from collections.abc import Iterable

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtri_exp

# With less noise than this the second term of the formula is nothing but rounding. Without it the
# formula is an upper bound, and exact but for that term.
_LITTLE_NOISE = 1e-6


def merged_noise(noises_and_steps: Iterable[tuple[float, int]]) -> float:
    """The noise multiplier of the one Gaussian that all these Gaussian steps together amount to."""
    return 1 / math.hypot(*(math.sqrt(steps) / noise for noise, steps in noises_and_steps))


def epsilon(noise_multiplier: float, delta: float) -> float:
    """The exact eps of one Gaussian mechanism of sensitivity 1; 0 where delta alone covers it."""
    target = math.log(delta)
    if noise_multiplier < _LITTLE_NOISE:
        return (0.5 / noise_multiplier - float(ndtri_exp(target))) / noise_multiplier
    if _log_delta(noise_multiplier, 0.0) <= target:
        return 0.0
    high = 1.0
    while _log_delta(noise_multiplier, high) > target:
        high *= 2

    def excess(eps: float) -> float:
        # Finite stand-in for log(0): brentq interpolates between the values that it sees.
        return max(_log_delta(noise_multiplier, eps), 2 * target - 1) - target

    return float(brentq(excess, 0.0, high, rtol=1e-12)) * (1 + 1e-9)


def delta(noise_multiplier: float, eps: float) -> float:
    """The exact delta of one Gaussian mechanism of sensitivity 1 at `eps`, 0 or more."""
    return min(math.exp(_log_delta(noise_multiplier, eps)) * (1 + 1e-9), 1.0)


def _log_delta(noise_multiplier: float, eps: float) -> float:
    half, shift = 0.5 / noise_multiplier, eps * noise_multiplier
    first, second = log_ndtr(half - shift), eps + log_ndtr(-half - shift)
    if noise_multiplier < _LITTLE_NOISE:
        return float(first)
    # Rounding can put the second term level with the first where their difference underflows.
    return float(first + math.log1p(-math.exp(second - first))) if second < first else -math.inf
