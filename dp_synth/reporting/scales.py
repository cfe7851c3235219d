"""Values with intervals, and the axes that they are drawn on."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, whose ends may be unknown."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The ends where they are known, else the value twice."""
        if self.low is None or self.high is None:
            return self.value, self.value
        return self.low, self.high

    def known(self) -> bool:
        """Whether the interval has ends."""
        return self.low is not None and self.high is not None


@dataclass(frozen=True)
class Scale:
    """An axis with marks.

    Attributes:
        ticks: values that are marked, ascending; on a linear axis its ends are the first and last.
        log: whether the axis is logarithmic; then all values are positive.
        margin: share of the axis that is left free at each end.
    """

    ticks: tuple[float, ...]
    log: bool = False
    margin: float = 0.0

    def share(self, value: float) -> float:
        """Where ``value`` lies on the axis, 0..1, held inside it."""
        low, high, place = (
            math.log(v) if self.log else v for v in (self.ticks[0], self.ticks[-1], value)
        )
        inside = 0.5 if low == high else min(max((place - low) / (high - low), 0.0), 1.0)
        return self.margin + (1 - 2 * self.margin) * inside

    def labelled(self, gap: float) -> list[float]:
        """The ticks to write out: those at least ``gap``, a share of the axis, from the last one."""
        chosen: list[float] = []
        for tick in self.ticks:
            if not chosen or self.share(tick) - self.share(chosen[-1]) >= gap - 1e-9:
                chosen.append(tick)
        return chosen


def linear_scale(low: float, high: float, about: int = 5) -> Scale:
    """An axis with some ``about`` round ticks that holds ``low`` and ``high``."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return Scale(tuple(round(k * step, 12) for k in range(first, last + 1)))


def proportion_scale(intervals: Iterable[Interval]) -> Scale:
    """An axis of proportions that ends at 1 and begins at a round value below every interval."""
    lowest = min((min(i.value, *i.ends) for i in intervals), default=0)
    return linear_scale(max(0.0, min(lowest, 0.9)), 1.0, about=4)


def log_scale(values: Sequence[float]) -> Scale:
    """A logarithmic axis with a tick at each of the ``values``, at least 1 and positive."""
    return Scale(tuple(sorted(set(values))), log=True, margin=0.1)
