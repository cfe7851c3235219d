"""Checks of values that users type; each raises UserError naming the key as it is typed."""

import math
from numbers import Real
from typing import Any

from dp_synth.errors import UserError


def positive(key: str, value: Any) -> float:
    """The value as a float; UserError unless it is a finite number above 0."""
    good = isinstance(value, Real) and not isinstance(value, bool)
    if not good or not (math.isfinite(value) and value > 0):
        raise UserError(f"{key}={value!r} must be a finite number above 0.")
    return float(value)


def whole(key: str, value: Any) -> int:
    """The value as an int; UserError unless it is a whole number, 0 or more."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else -1.0
    if number < 0 or not number.is_integer():
        raise UserError(f"{key}={value!r} must be a whole number, 0 or more.")
    return int(value)


def count(key: str, value: Any) -> int:
    """The value as an int; UserError unless it is a whole number, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 1:
        raise UserError(f"{key}={value!r} must be a whole number, 1 or more.")
    return whole(key, value)


def one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """UserError unless the value is among the choices."""
    if value not in choices:
        raise UserError(f"{key}={value!r} is unknown; use {' or '.join(choices)}.")
