"""Composition by privacy loss distributions (Gopi et al. 2021, arXiv 2106.02848).

Built from the parts of Opacus' PRVAccountant, which fixes an absolute error, looks at units that
are removed and not at units that are added, and spends most of its time on the size of its domain.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from opacus.accountants.analysis.prv import (
    DiscretePRV,
    Domain,
    compose_heterogeneous,
    discretize,
)
from scipy.fft import next_fast_len
from scipy.special import ndtr

from dp_synth.privacy.accounting import renyi
from dp_synth.privacy.accounting.mechanisms import SubsampledGaussian
from dp_synth.privacy.accounting.renyi import Curve

# What Opacus' code and the checks here are known to raise where a number cannot be trusted.
ERRORS = (ArithmeticError, LookupError, MemoryError, RuntimeError, ValueError)

# Of eps; Opacus' default of 0.01 is absolute, 10 % of an eps of 0.1. Coarser for many members, each
# of which costs time.
_RELATIVE_ERROR = 1e-3
_LARGEST_RELATIVE_ERROR = 4e-3
_DELTA_SHARE = 1e-3  # of delta, for privacy losses beyond the domain
_LOSS_SHARE = 3e-4  # of the domain: the error in eps where delta is asked for and eps is 0
_TOGETHER = 8  # members composed at once: many more would fill the memory
_MAX_POINTS = 3_000_000  # of the discretised privacy loss: about a second and 300 MB
_MAX_LOSS = 700.0  # exp() of a larger privacy loss overflows a double


def epsilon(members: Sequence[SubsampledGaussian], curve: Curve, delta: float) -> float:
    """eps of the members together at `delta`, an upper bound within about 0.3 % (many: 1 %).

    `curve` is the members' Renyi curve. Raises one of ERRORS where no number can be trusted.
    """
    composition = _Composition(members, curve, delta * _DELTA_SHARE)
    rough = renyi.epsilon(curve, delta) / 50
    relative_error = min(_RELATIVE_ERROR * math.sqrt(len(members)), _LARGEST_RELATIVE_ERROR)
    # Invalid values are ignored while they occur and refused in the result.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        removed = composition.epsilon(delta, rough, removed=True)
        fine = removed * relative_error
        if removed > 0:
            removed = composition.epsilon(delta, fine, removed=True)
        if removed <= 0:
            raise ArithmeticError(f"it returned {removed}")
        # A unit that is added seems never to lose more than one that is removed, which is proven
        # for one step and not for many.
        added = composition.epsilon(delta, rough, removed=False)
        if added > removed:
            added = composition.epsilon(delta, fine, removed=False)
    return max(removed, added)


def delta(members: Sequence[SubsampledGaussian], curve: Curve, eps: float) -> float:
    """delta of the members together at `eps`, an upper bound within a few per cent.

    `curve` is the members' Renyi curve. Raises one of ERRORS where no number can be trusted.
    """
    delta_error = renyi.delta(curve, eps) * _DELTA_SHARE
    composition = _Composition(members, curve, delta_error)
    error = min(composition.largest_loss * _LOSS_SHARE, (eps or math.inf) * _RELATIVE_ERROR)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = max(composition.delta(eps, error, removed=removed) for removed in (True, False))
    if not found > 0:  # not a number, too
        raise ArithmeticError(f"it returned {found}")
    return found


class _Composition:
    """The privacy loss of the members together, discretised as finely as an error in eps asks.

    Raises ArithmeticError where doubles cannot hold what is to be computed.
    """

    def __init__(
        self, members: Sequence[SubsampledGaussian], curve: Curve, delta_error: float
    ) -> None:
        steps = sum(member.steps for member in members)
        # Composition raises Fourier coefficients near 1 to the power `steps`, and their rounding
        # with them: an error in delta below that rounding would be answered with noise.
        if (steps + len(members)) * np.finfo(float).eps > delta_error:
            raise ArithmeticError("delta is too small for double precision")
        self._members = members
        self._delta_error = delta_error
        # Remark 5.6: losses beyond this bound have a probability that delta_error covers.
        self.largest_loss = 3 + max(
            renyi.epsilon(curve, delta_error / 4),
            *(renyi.epsilon(_one_step(member), delta_error / (8 * steps)) for member in members),
        )
        if not self.largest_loss < _MAX_LOSS:
            raise ArithmeticError(f"privacy losses up to {self.largest_loss:.3g} overflow")
        # Theorem 5.5: the mesh for a given error in eps.
        self._mesh_per_error = 1 / math.sqrt(steps * math.log(12 / delta_error) / 2)
        self._smallest_error = 2 * self.largest_loss / (self._mesh_per_error * _MAX_POINTS)

    def epsilon(self, delta: float, error: float, *, removed: bool) -> float:
        """eps at `delta`, too large by `error` or by what the largest grid allows."""
        error = max(error, self._smallest_error)
        eps = float(self._loss(error, removed).compute_epsilon(delta, self._delta_error, error)[2])
        if not math.isfinite(eps):
            raise ArithmeticError(f"it returned {eps}")
        return eps

    def delta(self, eps: float, error: float, *, removed: bool) -> float:
        """delta at `eps`, too large by what an `error` in eps and the domain's end make of it."""
        error = max(error, self._smallest_error)
        estimate = self._loss(error, removed).compute_delta_estimate(eps - error)
        return float(estimate) + self._delta_error

    def _loss(self, error: float, removed: bool) -> DiscretePRV:
        mesh = error * self._mesh_per_error
        # A domain of 2 * half + 2 points, widened to a size whose Fourier transform is fast.
        half = next_fast_len(math.ceil(self.largest_loss / mesh) + 1, real=True) - 1
        domain = Domain.create_aligned((0.5 - half) * mesh, (half - 0.5) * mesh, mesh)
        composed: list[DiscretePRV] = []
        for start in range(0, len(self._members), _TOGETHER):
            group = self._members[start : start + _TOGETHER]
            losses = [
                discretize(_Loss(member.noise_multiplier, member.sample_rate, removed), domain)
                for member in group
            ]
            steps = [member.steps for member in group]
            composed = [compose_heterogeneous(composed + losses, [1] * len(composed) + steps)]
        return composed[0]


def _one_step(member: SubsampledGaussian) -> Curve:
    return lambda order: renyi.subsampled_gaussian(
        member.noise_multiplier, member.sample_rate, order
    )


@dataclass(frozen=True)
class _Loss:
    """The privacy loss of one step: log p(x) / q(x) for x drawn from p.

    With the unit the sum is N(1, noise^2) with probability `sample_rate`, else N(0, noise^2);
    without it N(0, noise^2). Where the unit is `removed`, p is with it; where it is added, without.
    Its tails beyond the domain are dropped: delta_error covers them.
    """

    noise_multiplier: float
    sample_rate: float
    removed: bool

    def cdf(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """The probability that the loss is at most `t`."""
        noise, q = self.noise_multiplier, self.sample_rate
        if not self.removed:
            return ndtr(-self._outcome(-t) / noise)
        x = self._outcome(t)
        return (1 - q) * ndtr(x / noise) + q * ndtr((x - 1) / noise)

    def mean(self) -> float:
        """The expected loss by the trapezoidal rule, which errs by rounding alone here.

        Opacus' adaptive quadrature errs by up to 1e-9, which a million steps make 1e-3.
        """
        noise, q = self.noise_multiplier, self.sample_rate
        step = min(noise, noise**2) / 8
        x = np.arange(-10 * noise, 1 + 10 * noise, step)
        shift = (x - 0.5) / noise**2
        # Two forms of log(1 - q + q * exp(shift)): the one keeps its digits near 0, the other
        # everywhere else.
        near = np.log1p(q * np.expm1(shift))
        loss = np.where(abs(shift) < 1, near, np.logaddexp(np.log1p(-q), np.log(q) + shift))
        without = np.exp(-((x / noise) ** 2) / 2)
        density = (1 - q) * without + q * np.exp(-(((x - 1) / noise) ** 2) / 2)
        area = density @ loss if self.removed else -(without @ loss)
        return float(area * step / (noise * math.sqrt(2 * math.pi)))

    def _outcome(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """The outcome x at which log p_with(x) / p_without(x) is t; -inf where it is always more."""
        q = self.sample_rate
        # Two forms of log((exp(t) + q - 1) / q): the one loses its digits near 0, the other far
        # below it.
        near = np.log1p(np.maximum(np.expm1(t) / q, -1))
        below = np.log(np.maximum(np.exp(t) - (1 - q), 0) / q)
        return self.noise_multiplier**2 * np.where(t > -1, near, below) + 0.5
