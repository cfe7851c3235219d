"""From a target eps to the smallest noise that keeps it, beside whatever else is spent."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from dp_synth.checks import positive
from dp_synth.errors import UserError
from dp_synth.privacy.accounting.composition import composed
from dp_synth.privacy.accounting.mechanisms import Mechanism, SubsampledGaussian

_MAX_NOISE_MULTIPLIER = 1e7
_TOLERANCE = 1e-3  # of what the others leave of the target eps, on the safe side


def calibrate(
    *,
    eps: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "prv",
    others: Sequence[Mechanism] = (),
) -> float:
    """The smallest noise multiplier with which these steps and `others` together keep `eps`.

    The eps that `composed` then gives is never above the target, and at most 0.1 % of what `others`
    leave of it below. Raises UserError where `others` alone take all of `eps`, and where no noise
    multiplier up to 1e7 meets the target.
    """
    eps = positive("privacy.eps", eps)
    taken = composed(others, delta=delta, accountant=accountant).eps
    if taken >= eps:
        raise UserError(
            f"privacy.eps={eps:g} is taken: what is counted beside these steps costs "
            f"eps={taken:.4g} by itself at privacy.delta={delta:g}; ask for a larger eps."
        )
    one = SubsampledGaussian(1.0, sample_rate, steps)
    if one.steps == 0 or one.sample_rate == 0:
        return 0.0
    return _calibrate(eps, float(delta), one.sample_rate, one.steps, accountant, tuple(others))


@lru_cache(maxsize=256)
def _calibrate(
    eps: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str,
    others: tuple[Mechanism, ...],
) -> float:
    def spends(noise_multiplier: float) -> float:
        mechanism = SubsampledGaussian(noise_multiplier, sample_rate, steps)
        return composed([*others, mechanism], delta=delta, accountant=accountant).eps

    start = 1.0
    if accountant == "prv":
        # RDP costs milliseconds and lands within a few per cent, which saves most PRV evaluations.
        try:
            start = calibrate(
                eps=eps,
                delta=delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant="rdp",
                others=others,
            )
        except UserError:  # a target that only PRV can meet
            start = 1.0
    low, high = _bracket(spends, eps, start)
    if high > _MAX_NOISE_MULTIPLIER:
        raise UserError(
            f"privacy.eps={eps} cannot be met at privacy.delta={delta} in {steps} steps with the "
            f"{accountant} accountant; ask for a larger eps or delta, or fewer steps."
        )
    taken = composed(others, delta=delta, accountant=accountant).eps
    return _search(spends, eps, _TOLERANCE * (eps - taken), low, high)


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


def _search(
    spends: Callable[[float], float], eps: float, tolerance: float, low: float, high: float
) -> float:
    """The large-enough end of a bracket shrunk until it spends `eps` but for a tolerance.

    Log eps is nearly linear in log noise: every other probe is the chord's, the rest bisect.
    """
    aim = eps - tolerance / 2
    probes = 0
    while spends(high) < eps - tolerance and high / low > 1 + 1e-9:
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
