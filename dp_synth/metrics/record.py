"""Metrics as they are collected: each number together with what it is."""

from __future__ import annotations

from typing import Any

from dp_synth.metrics.estimates import Estimate


class Metrics:
    """Numbers by name, and by the same names what they are.

    Attributes:
        values: flat ``{name: number}``.
        meta: ``{name: {"private": bool, "n": int, "what": str}}`` with the same keys: whether the
            number depends on a look at private images, the images it was computed on, a sentence.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.meta: dict[str, dict[str, Any]] = {}

    def add(self, name: str, value: float, *, private: bool, n: int, what: str) -> None:
        """Add one number."""
        self.values[name] = value
        self.meta[name] = {"private": private, "n": n, "what": what}

    def add_estimate(self, name: str, estimate: Estimate, *, private: bool, what: str) -> None:
        """Add a proportion as ``name`` and the ends of its interval, ``.ci_low`` and ``.ci_high``."""
        n = estimate.n
        self.add(name, estimate.value, private=private, n=n, what=what)
        for suffix, value, end in (
            ("ci_low", estimate.ci_low, "Lower"),
            ("ci_high", estimate.ci_high, "Upper"),
        ):
            sentence = f"{end} end of the 95 % Wilson interval of {name}."
            self.add(f"{name}.{suffix}", value, private=private, n=n, what=sentence)
