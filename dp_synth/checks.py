"""Checks of values that users type; each raises UserError naming the key as it is typed."""

import math
from numbers import Real
from typing import Any

from dp_synth.errors import UserError


def positive(key: str, value: Any) -> float:
    """The value as a float; UserError unless it is a finite number above 0."""
    number = _number(value)
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"{key}={value!r} must be a finite number above 0.")
    return number


def finite(key: str, value: Any) -> float:
    """The value as a float; UserError unless it is a finite number."""
    number = _number(value)
    if not math.isfinite(number):
        raise UserError(f"{key}={value!r} must be a finite number.")
    return number


def not_negative(key: str, value: Any) -> float:
    """The value as a float; UserError unless it is a finite number, 0 or more."""
    number = _number(value)
    if not (math.isfinite(number) and number >= 0):
        raise UserError(f"{key}={value!r} must be a finite number, 0 or more.")
    return number


def fraction(key: str, value: Any) -> float:
    """The value as a float; UserError unless it is a number from 0 to 1."""
    number = _number(value)
    if not 0 <= number <= 1:
        raise UserError(f"{key}={value!r} must be a number from 0 to 1.")
    return number


def whole(key: str, value: Any) -> int:
    """The value as an int; UserError unless it is a whole number, 0 or more."""
    number = _number(value)
    if not (number >= 0 and number.is_integer()):
        raise UserError(f"{key}={value!r} must be a whole number, 0 or more.")
    return int(value)


def count(key: str, value: Any) -> int:
    """The value as an int; UserError unless it is a whole number, 1 or more."""
    number = _number(value)
    if not (number >= 1 and number.is_integer()):
        raise UserError(f"{key}={value!r} must be a whole number, 1 or more.")
    return int(value)


def flag(key: str, value: Any) -> None:
    """UserError unless the value is true or false: any other text would count as true."""
    if not isinstance(value, bool):
        raise UserError(f"{key}={value!r} must be true or false.")


def one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """UserError unless the value is among the choices."""
    if value not in choices:
        raise UserError(f"{key}={value!r} is unknown; use {' or '.join(choices)}.")


def _number(value: Any) -> float:
    """The value as a float; NaN, which no range holds, where it is no number."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
