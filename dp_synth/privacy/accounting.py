"""From noise to eps and back, for the Poisson-subsampled Gaussian mechanism.

Every number is an upper bound. Opacus' accountants do the numerical work; this module chooses their
precision, catches their failures, and says which of them a number came from.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from opacus.accountants.analysis import rdp as opacus_rdp
from opacus.accountants.analysis.prv import (
    Domain,
    PoissonSubsampledGaussianPRV,
    TruncatedPrivacyRandomVariable,
    compose_heterogeneous,
    discretize,
)
from scipy.fft import next_fast_len
from scipy.optimize import brentq
from scipy.special import log_ndtr

from dp_synth.errors import UserError

ACCOUNTANTS = ("prv", "rdp")

# Orders of the Renyi bound. Wide enough that the best order is inside for eps from 0.01 to 100.
_ORDERS = tuple(1 + x for x in np.geomspace(0.01, 10, 100).tolist()) + tuple(
    sorted({round(x) for x in np.geomspace(12, 4096, 150)})
)
_PRV_RELATIVE_ERROR = 1e-3  # of eps; Opacus' default of 0.01 is absolute, 10 % of an eps of 0.1
_PRV_MAX_POINTS = 3_000_000  # of the discretised privacy loss: about a second and 300 MB
_PRV_MAX_LOSS = 700.0  # exp() of a larger privacy loss overflows a double
_MAX_NOISE_MULTIPLIER = 1e7
_CALIBRATION_TOLERANCE = 1e-3  # of the target eps, on the safe side


@dataclass(frozen=True)
class Spent:
    """An upper bound on eps and the accountant that it came from.

    `accountant` is "prv", "rdp", "gaussian" (closed form, where every example is in every batch),
    or "rdp (...)" with the reason why PRV was asked for and not used.
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
    """eps of `steps` Poisson-subsampled Gaussian mechanisms at `delta`; see `spent`."""
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
    """An upper bound on eps, and which accountant produced it.

    The mechanism: each unit enters each step on its own with probability `sample_rate`; the sum of
    contributions of L2 norm at most C gets Gaussian noise of standard deviation
    `noise_multiplier` * C. Adjacency: one unit's contribution becomes zero.

    "rdp" is Mironov et al. 2019 (arXiv 1908.10530) with the conversion of Balle et al. 2020.
    "prv" is the smaller of Gopi et al. 2021 (arXiv 2106.02848) and "rdp", both upper bounds: within
    about 0.3 % of the exact value for eps in 0.1 .. 30. With `sample_rate` 1 it is the exact closed
    form of Balle and Wang 2018 (arXiv 1805.06530, theorem 8).

    No step costs 0; steps without noise cost infinity. Raises UserError for values out of range.
    """
    _check(noise_multiplier, sample_rate, steps, delta, accountant)
    if steps == 0 or sample_rate == 0:
        return Spent(0.0, accountant)
    if noise_multiplier == 0:
        return Spent(math.inf, accountant)
    return _spent(float(noise_multiplier), float(sample_rate), int(steps), float(delta), accountant)


def calibrate(
    *, eps: float, delta: float, sample_rate: float, steps: int, accountant: str = "prv"
) -> float:
    """The smallest noise multiplier whose `epsilon` does not exceed `eps`.

    The eps it gives is never above the target and at most 0.1 % below it.
    Raises UserError where no noise multiplier up to 1e7 meets the target.
    """
    if not (eps > 0 and math.isfinite(eps)):
        raise UserError(f"privacy.eps={eps} must be a finite number above 0.")
    _check(1.0, sample_rate, steps, delta, accountant)
    if steps == 0 or sample_rate == 0:
        return 0.0
    return _calibrate(float(eps), float(delta), float(sample_rate), int(steps), accountant)


def _check(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str
) -> None:
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise UserError(f"noise_multiplier={noise_multiplier} must be a finite number, 0 or more.")
    if not 0 <= sample_rate <= 1:
        raise UserError(f"sample_rate={sample_rate} must lie between 0 and 1.")
    if not (steps >= 0 and steps == int(steps)):
        raise UserError(f"privacy.steps={steps} must be a whole number, 0 or more.")
    if not 0 < delta < 1:
        raise UserError(f"privacy.delta={delta} must lie strictly between 0 and 1.")
    if accountant not in ACCOUNTANTS:
        raise UserError(f"privacy.accountant={accountant} is unknown; use prv or rdp.")


@lru_cache(maxsize=4096)
def _spent(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: str
) -> Spent:
    if accountant == "prv" and sample_rate == 1:
        return Spent(_gaussian(noise_multiplier / math.sqrt(steps), delta), "gaussian")
    rdp = _rdp(noise_multiplier, sample_rate, steps, delta)
    if accountant == "rdp":
        return Spent(rdp, "rdp")
    try:
        prv = _prv(noise_multiplier, sample_rate, steps, delta, rdp)
    # What Opacus' PRV code is known to raise; each leaves the RDP bound as sound as it was.
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, ValueError) as error:
        return Spent(rdp, f"rdp (prv failed: {error or type(error).__name__})")
    if prv <= rdp:
        return Spent(prv, "prv")
    return Spent(rdp, "rdp (the tighter bound here)")


def _gaussian(noise_multiplier: float, delta: float) -> float:
    """The exact eps of one Gaussian mechanism of sensitivity 1; 0 where delta alone covers it."""

    def log_delta(eps: float) -> float:
        half, shift = 0.5 / noise_multiplier, eps * noise_multiplier
        first, second = log_ndtr(half - shift), eps + log_ndtr(-half - shift)
        # Rounding can put the second term level with the first where their difference underflows.
        return float(first + math.log1p(-math.exp(second - first))) if second < first else -math.inf

    target = math.log(delta)
    if log_delta(0.0) <= target:
        return 0.0
    high = 1.0
    while log_delta(high) > target:
        high *= 2
    # Finite stand-in for log(0): brentq interpolates between the values that it sees.
    root = brentq(lambda eps: max(log_delta(eps), 2 * target - 1) - target, 0.0, high, rtol=1e-12)
    return float(root) * (1 + 1e-9)


def _rdp(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """The Renyi bound at the best order; sound wherever the search ends, as every order bounds."""

    @cache
    def bound(index: int) -> float:
        order = _ORDERS[index]
        # Opacus warns of a best order at the edge of its list: here the list is one order long.
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                rdp = opacus_rdp.compute_rdp(
                    q=sample_rate, noise_multiplier=noise_multiplier, steps=steps, orders=[order]
                )
                eps, _ = opacus_rdp.get_privacy_spent(orders=[order], rdp=rdp, delta=delta)
            except (
                ValueError,
                OverflowError,
                ZeroDivisionError,
            ):  # this order has no bound to give
                return math.inf
        return math.inf if math.isnan(eps) else max(float(eps), 0.0)

    # The bound falls and then rises with the order; overflow makes the largest orders infinite.
    low, high = 0, len(_ORDERS) - 1
    while low < high:
        middle = (low + high) // 2
        if bound(middle) <= bound(middle + 1):
            high = middle
        else:
            low = middle + 1
    return bound(low)


def _prv(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, rdp: float
) -> float:
    """The PRV bound with a relative error; raises where Opacus' code cannot be trusted.

    Built from the parts of Opacus' PRVAccountant, which fixes an absolute error and spends most of
    its time on the size of its domain.
    """
    delta_error = delta / 1000
    # Composition raises Fourier coefficients near 1 to the power `steps`, and their rounding with
    # them: an error in delta below that rounding would be answered with noise.
    if steps * np.finfo(float).eps > delta_error:
        raise ArithmeticError(f"delta={delta} is too small for double precision")
    # Gopi et al., remark 5.6: losses beyond this bound have a probability that delta_error covers.
    largest_loss = 3 + max(
        _rdp(noise_multiplier, sample_rate, steps, delta_error / 4),
        _rdp(noise_multiplier, sample_rate, 1, delta_error / (8 * steps)),
    )
    if not largest_loss < _PRV_MAX_LOSS:
        raise ArithmeticError(f"privacy losses up to {largest_loss:.3g} overflow")
    # The mesh that Gopi et al. need for a given error in eps.
    mesh_per_error = 1 / math.sqrt(steps * math.log(12 / delta_error) / 2)
    smallest_error = 2 * largest_loss / (mesh_per_error * _PRV_MAX_POINTS)

    def upper(eps_error: float) -> float:
        eps_error = max(eps_error, smallest_error)
        mesh = eps_error * mesh_per_error
        # A domain of 2 * half + 2 points, widened to a size whose Fourier transform is fast.
        half = next_fast_len(math.ceil(largest_loss / mesh) + 1, real=True) - 1
        domain = Domain.create_aligned((0.5 - half) * mesh, (half - 0.5) * mesh, mesh)
        one = PoissonSubsampledGaussianPRV(sample_rate, noise_multiplier)
        truncated = TruncatedPrivacyRandomVariable(one, domain.t_min, domain.t_max)
        composed = compose_heterogeneous([discretize(truncated, domain)], [steps])
        eps = float(composed.compute_epsilon(delta, delta_error, eps_error)[2])
        if not (math.isfinite(eps) and eps > 0):
            raise ArithmeticError(f"it returned {eps}")
        return eps

    # Invalid values are ignored while they occur and refused in the result.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return upper(upper(rdp / 50) * _PRV_RELATIVE_ERROR)


@lru_cache(maxsize=256)
def _calibrate(eps: float, delta: float, sample_rate: float, steps: int, accountant: str) -> float:
    start = 1.0
    if accountant == "prv":
        # RDP costs milliseconds and lands within a few per cent, which saves most PRV evaluations.
        try:
            start = _calibrate(eps, delta, sample_rate, steps, "rdp")
        except UserError:  # a target that only PRV can meet
            start = 1.0

    def spends(noise_multiplier: float) -> float:
        return _spent(noise_multiplier, sample_rate, steps, delta, accountant).eps

    low, high = _bracket(spends, eps, start)
    if high > _MAX_NOISE_MULTIPLIER:
        raise UserError(
            f"privacy.eps={eps} cannot be met at privacy.delta={delta} in {steps} steps with the "
            f"{accountant} accountant; ask for a larger eps or delta, or fewer steps."
        )
    return _search(spends, eps, low, high)


def _bracket(spends: Callable[[float], float], eps: float, start: float) -> tuple[float, float]:
    """Noise multipliers (too small, large enough); the second is beyond the limit if none is."""
    factor, low, high = 1.05, start, start
    if spends(start) <= eps:
        while spends(low) <= eps and low > 1 / _MAX_NOISE_MULTIPLIER:
            high, low, factor = low, low / factor, factor**2
    else:
        while high <= _MAX_NOISE_MULTIPLIER and spends(high) > eps:
            low, high, factor = high, high * factor, factor**2
    return low, high


def _search(spends: Callable[[float], float], eps: float, low: float, high: float) -> float:
    """The large-enough end of a bracket shrunk until it spends at least 99.9 % of `eps`.

    Log eps is nearly linear in log noise: every other probe is the chord's, the rest bisect.
    """
    aim = eps * (1 - _CALIBRATION_TOLERANCE / 2)
    probes = 0
    while spends(high) < eps * (1 - _CALIBRATION_TOLERANCE) and high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        if probes % 3 != 2 and math.isfinite(spends(low)) and spends(high) > 0:
            slope = math.log(spends(high) / spends(low)) / math.log(high / low)
            chord = low * math.exp(math.log(aim / spends(low)) / slope) if slope < 0 else middle
            middle = chord if low < chord < high else middle
        if spends(middle) <= eps:
            high = middle
        else:
            low = middle
        probes += 1
    return high
