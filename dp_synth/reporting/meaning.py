"""What eps and delta mean for one person, in words."""

import math

_LIMIT = 50  # e to the power of more is no number that helps a reader
_PER_CENT = "\N{NO-BREAK SPACE}%"


def odds_factor(eps: float) -> str:
    """e to the eps, for a sentence."""
    if eps > _LIMIT:
        return "an astronomical factor"
    return f"a factor of {_figures(math.exp(eps))}"


def odds_after(eps: float) -> str:
    """The odds that 1 to 1,000 can become at most, by a conclusion from the release."""
    return f"{_figures(math.exp(eps))} to 1,000" if eps <= _LIMIT else "near certainty"


def guess(eps: float, delta: float) -> str:
    """How often somebody can be right at most who tells "in" from "out" at even odds.

    The sum of the two error rates of any test is at least ``2 (1 - delta) / (1 + e^eps)`` (Kairouz
    et al. 2015, arXiv 1311.0776, theorem 2.1), so that at most ``(e^eps + delta) / (1 + e^eps)``
    of the guesses are right.
    """
    return _all_but(max(0.0, 1 - delta) / (1 + math.exp(min(eps, _LIMIT))))


def guess_by_advantage(advantage: float) -> str:
    """The same from what is known of a mechanism: its delta at eps 0, the total variation distance.

    At even odds the best test is right ``(1 + advantage) / 2`` of the time.
    """
    return _all_but(max(0.0, (1 - advantage) / 2))


def found(eps: float, delta: float, accused: float) -> str:
    """How many of those who are in the data anybody finds at most who accuses few who are not.

    No rate of true positives is above ``e^eps a + delta``, nor above ``1 - e^-eps (1 - a - delta)``,
    at a rate ``a`` of false ones (Kairouz et al. 2015, arXiv 1311.0776, theorem 2.1).

    Args:
        eps, delta: what is promised.
        accused: the share that is accused of those who are not in the data.
    """
    factor = math.exp(min(eps, _LIMIT))
    missed = max(1 - factor * accused - delta, (1 - accused - delta) / factor, 0.0)
    return _all_but(missed)


def _all_but(wrong: float) -> str:
    """1 - wrong in per cent, with as many digits as tell it from 100 %."""
    if wrong < 1e-8:
        return f"100{_PER_CENT}"
    decimals = max(1, math.ceil(-math.log10(100 * wrong)))
    # What is wrong is rounded down: a bound must not look tighter than it is.
    shown = math.floor(100 * wrong * 10**decimals + 1e-9) / 10**decimals
    return f"{100 - shown:.{decimals}f}{_PER_CENT}"


def _figures(value: float) -> str:
    """A number of 1 or more with 3 or more digits, rounded up, as a bound must be."""
    if value >= 100:
        return f"{math.ceil(value - 1e-9):,}"
    return f"{math.ceil(100 * value - 1e-9) / 100:.2f}"
