"""How often to run when only the best run is kept, and what keeping it costs.

Papernot and Steinke 2022, "Hyperparameter tuning with Renyi differential privacy"
(arXiv 2110.03620): a random and secret number of runs makes the best of them cost little more than
one. A fixed number would cost as much as publishing every run.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any, ClassVar, Self

from scipy.optimize import brentq

from dp_synth.checks import positive
from dp_synth.errors import UserError
from dp_synth.privacy.accounting import renyi
from dp_synth.privacy.accounting.renyi import Curve

_LEAST_GAMMA = 1e-12
_NEGLIGIBLE = 1e-20  # chance of a number of runs that a draw of double precision cannot tell from 0


@dataclass(frozen=True)
class TruncatedNegativeBinomialRuns:
    """At least one run; `eta` > -1 is the shape, `gamma` in (0, 1) sets how many are expected.

    Definition 1 of the paper. `eta` 1 is the geometric law, 0 the logarithmic one; the smaller it
    is, the less the selection costs and the more the number of runs varies.
    Raises UserError for a value out of range.
    """

    eta: float
    gamma: float

    distribution: ClassVar[str] = "truncated_negative_binomial"

    def __post_init__(self) -> None:
        if not (isinstance(self.eta, Real) and math.isfinite(self.eta) and self.eta > -1):
            raise UserError(f"eta={self.eta!r} must be a finite number above -1.")
        object.__setattr__(self, "eta", float(self.eta))
        gamma = positive("gamma", self.gamma)
        if not gamma < 1:
            raise UserError(f"gamma={gamma} must lie strictly between 0 and 1.")
        object.__setattr__(self, "gamma", gamma)

    @classmethod
    def expecting(cls, runs: float, *, eta: float = 0.0) -> Self:
        """The law of this shape with `runs` expected; UserError unless they are more than 1."""
        if not positive("runs", runs) > 1:
            raise UserError(f"runs={runs} must be above 1: one run at least is always made.")

        def excess(log_gamma: float) -> float:
            return math.log(cls(eta, math.exp(log_gamma)).expected / runs)

        fewest, most = math.log1p(-1e-12), math.log(_LEAST_GAMMA)
        if not excess(fewest) < 0 < excess(most):
            raise UserError(f"runs={runs} cannot be expected with eta={eta}; a larger eta works.")
        return cls(eta, math.exp(brentq(excess, most, fewest, xtol=1e-14, rtol=1e-14)))

    @property
    def expected(self) -> float:
        """The expected number of runs."""
        odds = (1 - self.gamma) / self.gamma
        if self.eta == 0:
            return odds / -math.log(self.gamma)
        return odds * self.eta / -math.expm1(self.eta * math.log(self.gamma))

    def chances(self) -> Iterator[tuple[int, float]]:
        """(k, the probability of k runs) for k from 1 on, without end."""
        if self.eta == 0:
            chance = (1 - self.gamma) / -math.log(self.gamma)
        else:
            chance = (1 - self.gamma) * self.eta / math.expm1(-self.eta * math.log(self.gamma))
        runs = 1
        while True:
            yield runs, chance
            chance *= (1 - self.gamma) * (runs + self.eta) / (runs + 1)
            runs += 1

    def selection(self, candidate: Curve) -> Curve:
        """The Renyi curve of the best run, from that of one run (theorem 2)."""

        def at_another_order(order: float) -> float:
            return (1 - 1 / order) * candidate(order) - math.log(self.gamma) / order

        constant = (1 + self.eta) * renyi.smallest(at_another_order)
        return lambda order: candidate(order) + constant + math.log(self.expected) / (order - 1)


@dataclass(frozen=True)
class PoissonRuns:
    """A Poisson number of runs, `expected` on average; where it is 0, nothing is published.

    Concentrated around its mean, unlike the negative binomial, and dearer where one run alone
    already costs a sizeable eps. Raises UserError unless `expected` is above 0.
    """

    expected: float

    distribution: ClassVar[str] = "poisson"

    def __post_init__(self) -> None:
        object.__setattr__(self, "expected", positive("expected", self.expected))

    def chances(self) -> Iterator[tuple[int, float]]:
        """(k, the probability of k runs) for k from 0 on, without end."""
        runs = 0
        while True:
            log_chance = runs * math.log(self.expected) - self.expected - math.lgamma(runs + 1)
            yield runs, math.exp(log_chance)
            runs += 1

    def selection(self, candidate: Curve) -> Curve:
        """The Renyi curve of the best run, from that of one run (theorem 6).

        The outcome of no run at all, of probability exp(-expected) on neighbouring data sets alike,
        is counted beside the theorem's term for the outcomes of runs: a few per cent at
        `expected` 1, nothing at 10.
        """

        def curve(order: float) -> float:
            delta = renyi.delta(candidate, -math.log1p(-1 / order))
            runs = (order - 1) * (candidate(order) + self.expected * delta)
            return _log_sum(math.log(self.expected) + runs, -self.expected) / (order - 1)

        return curve


NumberOfRuns = TruncatedNegativeBinomialRuns | PoissonRuns


def number_of_runs(law: NumberOfRuns, uniform: float) -> int:
    """The number of runs that a uniform draw from [0, 1) stands for, by inversion of the law.

    The caller brings the draw, from secret entropy: the guarantee holds only while the number of
    runs stays unknown. Raises ValueError for a draw outside [0, 1).
    """
    if not 0 <= uniform < 1:
        raise ValueError(f"uniform={uniform} is not in [0, 1)")
    total = 0.0
    for runs, chance in law.chances():
        total += chance
        # Rounding can keep the total just below a draw that is all but 1.
        if total > uniform or (runs > law.expected and chance < _NEGLIGIBLE):
            return runs
    raise AssertionError("the probabilities of a law have no end")


def law_to_dict(law: NumberOfRuns) -> dict[str, Any]:
    """The law as JSON values."""
    return {"distribution": law.distribution, **asdict(law)}


def law_from_dict(values: dict[str, Any]) -> NumberOfRuns:
    """What `law_to_dict` wrote; UserError naming what is wrong with it."""
    laws = {law.distribution: law for law in (TruncatedNegativeBinomialRuns, PoissonRuns)}
    arguments = dict(values)
    distribution = arguments.pop("distribution", None)
    if distribution not in laws:
        raise UserError(f"distribution={distribution!r} is unknown; use {' or '.join(laws)}.")
    try:
        return laws[distribution](**arguments)
    except TypeError as error:
        raise UserError(f"The {distribution} law does not fit {arguments}: {error}.") from None


def _log_sum(first: float, second: float) -> float:
    """log(exp(first) + exp(second)) without overflow."""
    if math.isinf(first):
        return first
    return max(first, second) + math.log1p(math.exp(-abs(first - second)))
