"""A lower bound on eps from one run: many canaries, each in or out by a coin, and guesses of the coins.

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run" (arXiv 2305.08846).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from scipy.stats import binom

Scores = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]

# Of the canaries, how many are guessed; about the rest nothing is said. Which share is best depends
# on what is to be found: few guesses for a weak signal, all that are not doubtful for a strong one.
_SHARES = (0.9, 0.5, 0.25)
_TOLERANCE = 1e-4  # of the bound, on the safe side


@dataclass(frozen=True)
class OneRunBound:
    """What one attack shows.

    Attributes:
        canaries: m.
        guesses: how many of them the best of the tried rules guessed.
        right: how many of the guesses were right.
        eps_lower: with probability `confidence` or more, eps is not below it.
        ceiling: the highest `eps_lower` that so many canaries could show, with every guess right.
        delta: at which eps is meant.
        confidence: of the bound, for all tried rules together.
    """

    canaries: int
    guesses: int
    right: int
    eps_lower: float
    ceiling: float
    delta: float
    confidence: float


def one_run_bound(
    scores: Scores, coins: Coins, *, delta: float, confidence: float = 0.95
) -> OneRunBound:
    """Guess from scores which canaries are in, and bound eps from below by how many are right.

    With k fixed beforehand, the k canaries of highest score are guessed to be in, the k of lowest
    to be out. Three values of k are tried, each at a third of the error (Bonferroni), and the best
    bound is reported: the confidence holds for all three together.

    Guarantee: for a mechanism that is (eps, delta) differentially private when any one canary is
    put in or left out, `eps_lower` exceeds eps with probability at most 1 - `confidence`, whatever
    the scores are, provided that they depend on the coins through the mechanism's output alone.

    Args:
        scores: [m], larger where a canary looks more as if it were in; a NaN counts as largest.
        coins: [m], independent and fair: which canaries are in.
        delta: in 0 .. 1.
        confidence: above 1/2 and below 1.
    """
    if scores.shape != coins.shape or scores.ndim != 1:
        raise ValueError(f"{scores.shape} scores do not fit {coins.shape} coins")
    canaries = len(coins)
    # Stable: equal scores are told apart by their place, which knows nothing of the coins.
    order = np.argsort(scores, kind="stable")
    ceiling, best = 0.0, (0.0, 0, 0)
    for k in guesses_a_side(canaries):
        right = int((~coins[order[:k]]).sum() + coins[order[canaries - k :]].sum())
        bound = _bound_of_one_rule(canaries, 2 * k, right, delta, confidence)
        best = max(best, (bound, 2 * k, right))
        ceiling = max(ceiling, _bound_of_one_rule(canaries, 2 * k, 2 * k, delta, confidence))
    eps_lower, guesses, right = best
    return OneRunBound(canaries, guesses, right, eps_lower, ceiling, delta, confidence)


def guesses_a_side(canaries: int) -> list[int]:
    """The values of k that are tried, ascending; they depend on the number of canaries alone."""
    return sorted({int(share * canaries / 2) for share in _SHARES} - {0})


@lru_cache(maxsize=4096)
def _bound_of_one_rule(
    canaries: int, guesses: int, right: int, delta: float, confidence: float
) -> float:
    error = (1 - confidence) / len(guesses_a_side(canaries))
    return eps_lower_bound(canaries, guesses, right, delta=delta, confidence=1 - error)


def eps_lower_bound(
    canaries: int, guesses: int, right: int, *, delta: float, confidence: float = 0.95
) -> float:
    """The largest eps that `right` of `guesses` right guesses reject; 0 if they reject none.

    At most 1e-4 too small, never too large. The number of guesses must have been fixed beforehand.
    """
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 1/2 and 1")
    error = 1 - confidence

    def rejected(eps: float) -> bool:
        return p_value(canaries, guesses, right, eps=eps, delta=delta) < error

    if not rejected(0.0):
        return 0.0
    # Below 1/2 the p-value only grows with eps, so that the rejected eps are an interval from 0.
    low, high = 0.0, 1.0
    while rejected(high):
        low, high = high, 2 * high
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def p_value(canaries: int, guesses: int, right: int, *, eps: float, delta: float) -> float:
    """An upper bound on the probability of so many right guesses under (eps, delta) privacy.

    Corollary 5.4 of Steinke et al.: with W binomial, of `guesses` trials that each succeed with
    probability e^eps / (1 + e^eps), and v = `right`, it is
    P[W >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= W < v] / i.

    Args:
        canaries: m, those about which nothing was guessed included.
        guesses: 0 .. m.
        right: 0 .. `guesses`.
        eps: 0 or more.
        delta: in 0 .. 1.
    """
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"{right} right of {guesses} guesses about {canaries} canaries cannot be")
    if not (eps >= 0 and math.isfinite(eps) and 0 <= delta <= 1):
        raise ValueError(f"eps={eps} or delta={delta} is out of range")
    chance = float(expit(eps))
    tail = float(binom.sf(right - 1, guesses, chance))
    if delta == 0 or right == 0:
        return tail
    steps = np.arange(1, right + 1)
    just_below = binom.pmf(right - steps, guesses, chance).cumsum()
    return min(1.0, tail + 2 * canaries * delta * float((just_below / steps).max()))
