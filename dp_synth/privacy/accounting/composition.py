"""eps and delta of many unlike mechanisms together, and which accountant they came from."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from dp_synth.checks import not_negative, one_of
from dp_synth.errors import UserError
from dp_synth.privacy.accounting import gaussian, prv, renyi
from dp_synth.privacy.accounting.mechanisms import Mechanism, RandomStopping, SubsampledGaussian
from dp_synth.privacy.accounting.renyi import Curve

ACCOUNTANTS = ("prv", "rdp")

_Gaussians = tuple[SubsampledGaussian, ...]
_Stoppings = tuple[RandomStopping, ...]


@dataclass(frozen=True)
class Spent:
    """An upper bound on eps and the accountant that it came from.

    `accountant` is "prv", "rdp", "gaussian" (closed form, where every unit is in every batch),
    "prv + rdp (random stopping)", or "rdp (...)" with the reason why PRV was asked for and not used.
    """

    eps: float
    accountant: str


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "prv",
) -> float:
    """eps of `steps` Poisson-subsampled Gaussian mechanisms at `delta`; see `composed`."""
    return spent(
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        steps=steps,
        delta=delta,
        accountant=accountant,
    ).eps


def spent(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "prv",
) -> Spent:
    """`composed` for one mechanism, given by its numbers."""
    mechanism = SubsampledGaussian(noise_multiplier, sample_rate, steps)
    return composed([mechanism], delta=delta, accountant=accountant)


def composed(mechanisms: Iterable[Mechanism], *, delta: float, accountant: str = "prv") -> Spent:
    """An upper bound on eps of all mechanisms together, and which accountant produced it.

    What a mechanism computes may depend on what earlier ones gave; its noise, rate and steps are
    taken as settled beforehand. Adjacency: one unit's contributions become zero.

    "rdp" is Mironov et al. 2019 (arXiv 1908.10530) with the conversion of Balle et al. 2020
    (arXiv 1905.09982). "prv" is the smaller of Gopi et al. 2021 (arXiv 2106.02848) and "rdp", both
    upper bounds: within about 0.3 % of the exact value for eps in 0.1 .. 30. Where each has
    `sample_rate` 1 it is the exact closed form of Balle and Wang 2018 (arXiv 1805.06530). Random
    stopping has a Renyi bound only: with it "prv" is the smaller of the Renyi bound of everything,
    and PRV for the rest plus the Renyi bound of random stopping, each at half of `delta`.

    Mechanisms that differ in their steps alone cost no more time than one. No mechanism, no step
    and `sample_rate` 0 cost 0; a step without noise costs infinity. Raises UserError for values out
    of range.
    """
    _check_delta(delta)
    one_of("privacy.accountant", accountant, ACCOUNTANTS)
    gaussians, stoppings = _merged(mechanisms)
    if not (gaussians or stoppings):
        return Spent(0.0, accountant)
    if not _noised(gaussians, stoppings):
        return Spent(math.inf, accountant)
    return _spent(gaussians, stoppings, float(delta), accountant)


def delta_spent(mechanisms: Iterable[Mechanism], *, eps: float, accountant: str = "prv") -> float:
    """An upper bound on the delta of all mechanisms together at `eps`, 0 or more.

    By the accountants of `composed`, with an error of a few per cent of delta. Random stopping
    makes it the Renyi bound. Raises UserError for values out of range.
    """
    eps = not_negative("privacy.eps", eps)
    one_of("privacy.accountant", accountant, ACCOUNTANTS)
    gaussians, stoppings = _merged(mechanisms)
    if not (gaussians or stoppings):
        return 0.0
    if not _noised(gaussians, stoppings):
        return 1.0
    curve = _curve(gaussians, stoppings)
    rdp = renyi.delta(curve, eps)
    if accountant == "rdp" or stoppings:
        return rdp
    if _is_gaussian(gaussians):
        return gaussian.delta(gaussians[0].noise_multiplier, eps)
    try:
        return min(prv.delta(gaussians, curve, eps), rdp)
    except prv.ERRORS:
        return rdp


@lru_cache(maxsize=4096)
def _spent(gaussians: _Gaussians, stoppings: _Stoppings, delta: float, accountant: str) -> Spent:
    if stoppings:
        return _spent_with_stopping(gaussians, stoppings, delta, accountant)
    if accountant == "prv" and _is_gaussian(gaussians):
        return Spent(gaussian.epsilon(gaussians[0].noise_multiplier, delta), "gaussian")
    curve = _curve(gaussians)
    rdp = renyi.epsilon(curve, delta)
    if accountant == "rdp":
        return Spent(rdp, "rdp")
    try:
        eps = prv.epsilon(gaussians, curve, delta)
    except prv.ERRORS as error:  # each leaves the Renyi bound as sound as it was
        return Spent(rdp, f"rdp (prv failed: {error or type(error).__name__})")
    if eps <= rdp:
        return Spent(eps, "prv")
    return Spent(rdp, "rdp (the tighter bound here)")


def _spent_with_stopping(
    gaussians: _Gaussians, stoppings: _Stoppings, delta: float, accountant: str
) -> Spent:
    together = renyi.epsilon(_curve(gaussians, stoppings), delta)
    if accountant == "rdp":
        return Spent(together, "rdp")
    if gaussians:
        rest = _spent(gaussians, (), delta / 2, accountant)
        apart = rest.eps + renyi.epsilon(_curve((), stoppings), delta / 2)
        if apart < together:
            return Spent(apart, f"{rest.accountant} + rdp (random stopping)")
    return Spent(together, "rdp (random stopping)")


def _merged(mechanisms: Iterable[Mechanism]) -> tuple[_Gaussians, _Stoppings]:
    """The mechanisms that cost anything, equal ones as one, in an order that theirs has no say in.

    Plain Gaussians become one of a single step, which is exact.
    """
    gaussians: Counter[tuple[float, float]] = Counter()
    stoppings = []
    for mechanism in mechanisms:
        if isinstance(mechanism, RandomStopping):
            candidate, _ = _merged(mechanism.candidate)
            stoppings += [RandomStopping(candidate, mechanism.runs)] if candidate else []
        elif mechanism.steps and mechanism.sample_rate:
            gaussians[mechanism.noise_multiplier, mechanism.sample_rate] += mechanism.steps
    plain = [(noise, steps) for (noise, rate), steps in gaussians.items() if rate == 1]
    merged = [
        SubsampledGaussian(noise, rate, steps)
        for (noise, rate), steps in sorted(gaussians.items())
        if rate < 1
    ]
    if plain:
        merged.append(SubsampledGaussian(gaussian.merged_noise(sorted(plain)), 1.0, 1))
    return tuple(merged), tuple(sorted(stoppings, key=repr))


def _noised(gaussians: _Gaussians, stoppings: _Stoppings) -> bool:
    parts = [*gaussians, *(part for stopping in stoppings for part in stopping.candidate)]
    return all(part.noise_multiplier > 0 for part in parts)


def _is_gaussian(gaussians: _Gaussians) -> bool:
    return len(gaussians) == 1 and gaussians[0].sample_rate == 1


def _curve(gaussians: _Gaussians, stoppings: _Stoppings = ()) -> Curve:
    """The Renyi curve of everything together: Renyi divergences of one order add up."""
    stopped = [stopping.runs.selection(_curve(stopping.candidate)) for stopping in stoppings]

    def curve(order: float) -> float:
        steps = sum(
            part.steps * renyi.subsampled_gaussian(part.noise_multiplier, part.sample_rate, order)
            for part in gaussians
        )
        return steps + sum(stopping(order) for stopping in stopped)

    return curve


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UserError(f"privacy.delta={delta} must lie strictly between 0 and 1.")
