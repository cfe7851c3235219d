"""From the scores of many trials, with and without a canary, to what they prove about a claim.

A trial is one execution of a mechanism, independent of the others, on a data set that holds the
canary or has it zeroed out; its score is larger the more the output looks as if the canary was in.
Whatever an output is used for, (eps, delta)-DP bounds how well the two kinds of trial can be told
apart, so rates that are too good refute it (Jagielski et al. 2020, arXiv 2006.07709; Nasr et al.
2021, arXiv 2101.04535).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.special import betaincinv

from dp_synth.privacy import accounting

# Where a claim is looked at, as fractions of its delta at eps = 0: lines e^eps x + delta that follow
# the curves of Gaussian mechanisms to within 0.01.
_FRACTIONS = (*np.geomspace(1e-5, 0.1, 7).tolist(), *np.linspace(0.2, 0.95, 9).tolist())
# One trial in so many chooses the threshold and is not judged: a choice needs less than a proof.
_CHOOSING = 4


class TradeOff:
    """What a claim lets a test of membership achieve: the largest power at each false alarm rate.

    A mechanism that is (eps, delta)-DP at each of the given points, under an adjacency that is
    symmetric, has for every set S of outputs P(S) <= e^eps Q(S) + delta, P and Q being the laws
    with and without the canary or the other way round. The lower envelope of these lines bounds
    the trade-off curve of Dong et al. 2022 (arXiv 1905.02383), and is that curve where the points
    are many: so that a claim of eps = 1 can be refuted by its typical losses, where the (eps,
    delta) of a small delta alone speaks of events that no thousands of trials would show.

    Args:
        points: pairs (eps, delta) that the claim implies; eps >= 0 or infinite, delta in [0, 1].
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        # An infinite eps claims nothing.
        self._lines = [(math.exp(eps), delta) for eps, delta in points if math.isfinite(eps)]

    @classmethod
    def claimed(cls, mechanisms: Sequence[accounting.Mechanism], accountant: str = "prv") -> Self:
        """The curve of the mechanisms composed, as the accountant bounds it: some 16 times its price."""
        total = accounting.delta_spent(mechanisms, eps=0.0, accountant=accountant)
        deltas = [fraction * total for fraction in _FRACTIONS] if total else []
        spent = [
            accounting.composed(mechanisms, delta=delta, accountant=accountant) for delta in deltas
        ]
        points = zip((each.eps for each in spent), deltas, strict=True)
        return cls([(0.0, total), *points])

    def power(self, false_alarms: np.ndarray | float) -> np.ndarray:
        """The largest probability, with the canary, of a set of outputs.

        Args:
            false_alarms: that set's probability without the canary, in [0, 1], any shape.

        Returns:
            Float64 in [0, 1], of the same shape.
        """
        rate = np.asarray(false_alarms, dtype=np.float64)
        largest = np.ones_like(rate)
        for ratio, delta in self._lines:
            of_set = ratio * rate + delta
            # Of its complement, the laws exchanged: 1 - rate <= ratio (1 - power) + delta.
            of_complement = 1 - (1 - rate - delta) / ratio
            largest = np.minimum(largest, np.minimum(of_set, of_complement))
        return largest


@dataclass(frozen=True)
class Verdict:
    """Rates of a test of membership, and the best that the claim allows.

    Attributes:
        power: at least so probable is a score above the threshold with the canary.
        false_alarms: at most so probable is it without.
        allowed: the largest power that the claim allows at these false alarms.
    """

    power: float
    false_alarms: float
    allowed: float

    @property
    def refuted(self) -> bool:
        """Whether the claim is refuted, at the confidence that was asked for."""
        return self.power > self.allowed


def judge(
    with_canary: np.ndarray, without: np.ndarray, claim: TradeOff, *, confidence: float = 0.95
) -> Verdict:
    """Test the whole trade-off curve of a claim (Nasr et al. 2023, arXiv 2302.07956, section 4).

    If the claim holds and trials are independent, it is refuted with probability at most
    1 - `confidence`, whatever the scores and however few the trials: the threshold is chosen on
    trials of its own, and the bounds on both rates are exact (Clopper and Pearson 1934).

    Args:
        with_canary: float [n], the scores of the trials with it, n >= 2.
        without: float [m], of those without, m >= 2.
        claim: what is claimed of one trial.
        confidence: in (0, 1).

    Raises:
        ValueError: too few scores, or one that is not finite.
    """
    power, false_alarms = _rates(
        with_canary, without, lambda power, alarms: power - claim.power(alarms), confidence
    )
    return Verdict(power, false_alarms, float(claim.power(false_alarms)))


def eps_lower_bound(
    with_canary: np.ndarray, without: np.ndarray, *, delta: float, confidence: float = 0.95
) -> float:
    """A bound on eps: with probability at least `confidence`, no smaller one holds at `delta`.

    Never below 0. From one event and exact bounds on its two rates, as in Jagielski et al. 2020.
    A Bayesian interval (Zanella-Beguelin et al. 2023, arXiv 2206.05199) would be shorter, but
    credible only; many canaries in one run (Steinke et al. 2023, arXiv 2305.08846) need fewer runs,
    but not fewer canaries. n trials of each kind show no more than about
    log(n / log(2 / (1 - confidence))), whatever the mechanism leaks.

    Args:
        with_canary: float [n], the scores of the trials with the canary, n >= 2.
        without: float [m], of those without, m >= 2.
        delta: in [0, 1).
        confidence: in (0, 1).

    Raises:
        ValueError: too few scores, or one that is not finite.
    """

    def eps(power: np.ndarray, false_alarms: np.ndarray) -> np.ndarray:
        """The larger of what the event and its complement show."""
        above = (power - delta) / false_alarms
        below = (1 - false_alarms - delta) / (1 - power)
        return np.log(np.maximum(np.maximum(above, below), 1.0))

    rates = _rates(with_canary, without, eps, confidence)
    return float(eps(*map(np.asarray, rates)))


Merit = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (power, false alarms), of any shape


def _rates(
    with_canary: np.ndarray, without: np.ndarray, merit: Merit, confidence: float
) -> tuple[float, float]:
    """Bounds (power from below, false alarms from above) that hold together with `confidence`.

    They are of the event that the score exceeds the threshold of the largest merit.
    """
    chooses, judged = _split(with_canary)
    chooses_without, judged_without = _split(without)
    sizes = len(judged), len(judged_without)
    thresholds = _thresholds(np.concatenate([chooses, chooses_without]))
    # What the judged trials would show if they came out as those that choose.
    expected = _bounds(
        _exceeding(chooses, thresholds) * (sizes[0] / len(chooses)),
        _exceeding(chooses_without, thresholds) * (sizes[1] / len(chooses_without)),
        sizes,
        confidence,
    )
    threshold = thresholds[[merit(*expected).argmax()]]
    power, false_alarms = _bounds(
        _exceeding(judged, threshold), _exceeding(judged_without, threshold), sizes, confidence
    )
    return float(power[0]), float(false_alarms[0])


def _split(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores that choose the threshold and scores that are judged by it; both in turn."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or len(scores) < 2 or not np.isfinite(scores).all():
        raise ValueError("scores must be one row of at least two finite numbers")
    chooses = np.arange(len(scores)) % _CHOOSING == 0
    return scores[chooses], scores[~chooses]


def _thresholds(scores: np.ndarray) -> np.ndarray:
    """One below each different score but the first, and one above all."""
    values = np.unique(scores)
    return np.append(values[:-1] / 2 + values[1:] / 2, values[-1])


def _exceeding(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many scores lie above each threshold."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="right")


def _bounds(
    hits: np.ndarray, alarms: np.ndarray, sizes: tuple[int, int], confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Clopper-Pearson: a lower bound from hits of sizes[0], an upper one from alarms of sizes[1].

    Each fails with half of what `confidence` leaves.
    """
    failing = (1 - confidence) / 2
    n, m = sizes
    lower = np.where(hits > 0, betaincinv(np.maximum(hits, 1e-9), n - hits + 1, failing), 0.0)
    upper = np.where(
        alarms < m, betaincinv(alarms + 1, np.maximum(m - alarms, 1e-9), 1 - failing), 1.0
    )
    return lower, upper
