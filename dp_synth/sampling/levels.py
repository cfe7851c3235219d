"""Stretches of noise levels, as users type them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dp_synth.checks import not_negative, positive
from dp_synth.errors import UserError


class Levels(NamedTuple):
    """The noise levels sigma from ``low`` to ``high``, both included."""

    low: float
    high: float

    def hold(self, sigma: float) -> bool:
        """Whether a noise level is one of them."""
        return self.low <= sigma <= self.high


def levels(key: str, value: Any) -> Levels | None:
    """The noise levels that ``key=[low,high]`` names; None for null.

    Raises:
        UserError: it is neither, or the lower one does not come first.
    """
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise UserError(f"{key}={value!r} must be null or two noise levels, such as [0.1,10].")
    low, high = not_negative(f"{key}[0]", value[0]), positive(f"{key}[1]", value[1])
    if low >= high:
        raise UserError(f"{key}={list(value)} must have the lower noise level first.")
    return Levels(low, high)
