"""Membership inference on a finished model: how well its losses tell training from held-out images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import beta, norm, rankdata

from dp_synth.metrics.estimates import Estimate
from dp_synth.privacy.audit.one_run import Scores

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Membership:
    """What an attack by one score shows.

    Attributes:
        auc: area under the ROC curve; 0.5 for an attack that knows nothing.
        tpr: true positive rate at each false positive rate, or None where there are too few
            held-out units for that rate.
        eps_lower: see `roc_eps_lower_bound`.
        ceiling: the highest `eps_lower` that so many units could show.
        members: units trained on.
        others: held-out units.
    """

    auc: Estimate
    tpr: dict[float, Estimate | None]
    eps_lower: float
    ceiling: float
    members: int
    others: int


def membership(
    members: Scores, others: Scores, *, delta: float, confidence: float = 0.95, seed: int = 0
) -> Membership:
    """Judge an attack by its scores, larger where a unit looks more as if it had been trained on.

    Args:
        members: [n], of units that were trained on, n >= 2.
        others: [m], of held-out units, m >= 2.
        delta: at which eps is meant.
        confidence: of each interval and of the bound, above 1/2 and below 1.
        seed: of the halves that `roc_eps_lower_bound` makes.
    """
    return Membership(
        auc=auc(members, others, confidence),
        tpr={
            rate: true_positive_rate(members, others, rate, confidence)
            for rate in FALSE_POSITIVE_RATES
        },
        eps_lower=roc_eps_lower_bound(
            members, others, delta=delta, confidence=confidence, seed=seed
        ),
        ceiling=roc_ceiling(len(members), len(others), delta=delta, confidence=confidence),
        members=len(members),
        others=len(others),
    )


def auc(members: Scores, others: Scores, confidence: float = 0.95) -> Estimate:
    """The probability that a member scores above another unit, ties counting half.

    The interval is Newcombe's (2006, doi:10.1002/sim.2324, method 5), which is Wilson's idea with
    the variance of Hanley and McNeil: unlike others it has a width at 0 and at 1, too.
    """
    n, m = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))[:n]
    value = float((ranks.sum() - n * (n + 1) / 2) / (n * m))
    quantile = float(norm.ppf((1 + confidence) / 2))

    def excess(truth: float) -> float:
        """How much farther than `quantile` standard errors the value lies from a truth."""
        both = (n + m) / 2 - 1
        spread = 1 + both * ((1 - truth) / (2 - truth) + truth / (1 + truth))
        return (value - truth) ** 2 - quantile**2 * truth * (1 - truth) * spread / (n * m)

    low = 0.0 if value == 0 else float(brentq(excess, 0.0, value))
    high = 1.0 if value == 1 else float(brentq(excess, value, 1.0))
    return Estimate(value, low, high, n + m)


def true_positive_rate(
    members: Scores, others: Scores, false_positive_rate: float, confidence: float = 0.95
) -> Estimate | None:
    """The share of members above the score that at most such a share of the others exceeds.

    The interval is Clopper's and Pearson's for that very score; that other held-out units would
    have set it elsewhere is not in it.

    Returns:
        None where one of the others alone is more than the rate allows.
    """
    allowed = math.floor(false_positive_rate * len(others) * (1 + 1e-12))
    if allowed < 1:
        return None
    threshold = np.sort(others)[::-1][allowed]
    found, n, error = int((members > threshold).sum()), len(members), (1 - confidence) / 2
    return Estimate(found / n, float(_lower(found, n, error)), float(_upper(found, n, error)), n)


def roc_eps_lower_bound(
    members: Scores, others: Scores, *, delta: float, confidence: float = 0.95, seed: int = 0
) -> float:
    """The eps that the ROC curve shows: the largest log((TPR - delta) / FPR), or 0.

    A threshold, and whether what is above or what is below it is to be pointed out, are chosen on a
    random half of the units; on the other half, Clopper's and Pearson's bounds of the two rates
    give the bound. It is what an (eps, delta) private mechanism could not show of units that each
    went in by a coin of their own in a run of their own. Units of one run, split once and for all,
    only suggest it; canaries prove it.
    """
    rng = np.random.default_rng(seed)
    some_members, other_members = _halves(members, rng)
    some_others, other_others = _halves(others, rng)
    thresholds = np.unique(np.concatenate([some_members, some_others]))
    bounds = [
        _bounds(*rates, delta=delta, confidence=confidence)
        for rates in _pointed_out(some_members, some_others, thresholds)
    ]
    direction, place = np.unravel_index(np.argmax(bounds), np.shape(bounds))
    chosen = thresholds[place : place + 1]
    rates = _pointed_out(other_members, other_others, chosen)[direction]
    return float(_bounds(*rates, delta=delta, confidence=confidence)[0])


def roc_ceiling(members: int, others: int, *, delta: float, confidence: float = 0.95) -> float:
    """The highest `roc_eps_lower_bound` that so many units can show, by an attack without error."""
    n, m = members - members // 2, others - others // 2
    everyone, nobody = np.array([1]), np.array([0])
    return float(
        max(
            _bounds(everyone * n, n, nobody, m, delta=delta, confidence=confidence)[0],
            _bounds(everyone * m, m, nobody, n, delta=delta, confidence=confidence)[0],
        )
    )


def unit_means(values: Scores, units: npt.NDArray[np.int64] | None) -> Scores:
    """The mean over the images of each unit, [num_units]; the values where there are no units."""
    if units is None:
        return values
    _, places, counts = np.unique(units, return_inverse=True, return_counts=True)
    return np.bincount(places, weights=values) / counts


def _halves(scores: Scores, rng: np.random.Generator) -> tuple[Scores, Scores]:
    shuffled = rng.permutation(scores)
    return shuffled[: len(scores) // 2], shuffled[len(scores) // 2 :]


def _pointed_out(
    members: Scores, others: Scores, thresholds: Scores
) -> list[tuple[Counts, int, Counts, int]]:
    """Hits and false alarms at each threshold, of pointing out members above, others below it."""
    n, m = len(members), len(others)
    members_below = np.searchsorted(np.sort(members), thresholds, side="right")
    others_below = np.searchsorted(np.sort(others), thresholds, side="right")
    return [
        (n - members_below, n, m - others_below, m),
        (others_below, m, members_below, n),
    ]


def _bounds(
    hits: Counts, n: int, alarms: Counts, m: int, *, delta: float, confidence: float
) -> Scores:
    """Lower bounds on log((TPR - delta) / FPR), 0 or more, each with this confidence."""
    error = (1 - confidence) / 2
    rate = np.maximum(_lower(hits, n, error) - delta, 0)
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(rate / _upper(alarms, m, error)), 0)


def _lower(hits: Counts | int, n: int, error: float) -> npt.NDArray[np.float64]:
    """Clopper's and Pearson's one-sided lower bound of a rate, with this error."""
    bound = beta.ppf(error, hits, n - np.asarray(hits) + 1)
    return np.where(np.asarray(hits) == 0, 0.0, bound)


def _upper(hits: Counts | int, n: int, error: float) -> npt.NDArray[np.float64]:
    """Clopper's and Pearson's one-sided upper bound of a rate, with this error."""
    bound = beta.ppf(1 - error, np.asarray(hits) + 1, n - np.asarray(hits))
    return np.where(np.asarray(hits) == n, 1.0, bound)
