"""Charts as inline SVG, drawn with CSS variables so that they follow light and dark mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from markupsafe import Markup

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 16, 46


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, whose ends may be unknown."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Scale:
    """An axis from ``ticks[0]`` to ``ticks[-1]``, linear."""

    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where ``value`` lies on the axis, 0..1, held inside it."""
        low, high = self.ticks[0], self.ticks[-1]
        return min(max((value - low) / (high - low), 0.0), 1.0)


def linear_scale(low: float, high: float, about: int = 5) -> Scale:
    """An axis with some ``about`` round ticks that holds ``low`` and ``high``."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return Scale(tuple(round(k * step, 12) for k in range(first, last + 1)))


def proportion_scale(intervals: Sequence[Interval]) -> Scale:
    """An axis of proportions that ends at 1 and begins at a round value below every interval."""
    lowest = min((min(i.value, i.value if i.low is None else i.low) for i in intervals), default=0)
    return linear_scale(max(0.0, min(lowest, 0.9)), 1.0, about=4)


def interval_bar(interval: Interval, scale: Scale, kind: str) -> Markup:
    """A dot with its interval; lengths in per cent, so that it stretches and its strokes do not.

    Args:
        interval: what to show.
        scale: shared by the rows of one table.
        kind: a CSS class: ``private``, ``public`` or ``real``.
    """
    grid = [
        _line(f"{_percent(scale, t)}%", "0", f"{_percent(scale, t)}%", "100%", "grid")
        for t in scale.ticks
    ]
    whisker = (
        []
        if interval.low is None or interval.high is None
        else [
            _line(
                f"{_percent(scale, interval.low)}%",
                "50%",
                f"{_percent(scale, interval.high)}%",
                "50%",
                f"whisker {escape(kind)}",
            )
        ]
    )
    dot = f'<circle cx="{_percent(scale, interval.value)}%" cy="50%" r="4.5" class="dot {kind}"/>'
    return Markup(f'<svg class="bar" aria-hidden="true">{"".join([*grid, *whisker, dot])}</svg>')


def scale_legend(scale: Scale) -> Markup:
    """The ends of an axis of proportions as the heading of a column of ``interval_bar``."""
    labels = "".join(
        f'<text x="{_percent(scale, tick)}%" y="12" text-anchor="{anchor}">{tick:.0%}</text>'
        for tick, anchor in ((scale.ticks[0], "start"), (scale.ticks[-1], "end"))
    )
    return Markup(f'<svg class="bar legend" aria-hidden="true">{labels}</svg>')


def epsilon_curve(points: Sequence[tuple[int, float]]) -> Markup:
    """eps spent over optimizer steps, with the last value written at its point."""
    xs = linear_scale(0, points[-1][0])
    ys = linear_scale(0, max(eps for _, eps in points))
    path = " ".join(f"{_x(xs.share(step)):.1f},{_y(ys.share(eps)):.1f}" for step, eps in points)
    last_x, last_y = _x(xs.share(points[-1][0])), _y(ys.share(points[-1][1]))
    base = _y(0)
    area = f"{_x(0):.1f},{base:.1f} {path} {last_x:.1f},{base:.1f}"
    body = [
        *_axes(xs.ticks, [xs.share(t) for t in xs.ticks], ys, "training steps", "eps spent", "g"),
        f'<polygon points="{area}" class="area"/>',
        f'<polyline points="{path}" class="curve"/>',
        f'<circle cx="{last_x:.1f}" cy="{last_y:.1f}" r="4.5" class="dot private"/>',
    ]
    return _figure(body, "eps spent over training steps")


@dataclass(frozen=True)
class Outcome:
    """One run in the chart of accuracy over eps."""

    name: str
    eps: float
    accuracy: Interval


def accuracy_over_eps(
    outcomes: Sequence[Outcome], public_only: float | None, real: float | None
) -> Markup:
    """Accuracy of private synthetic data over eps (logarithmic), one mark with whiskers a run.

    The line joins the means of runs of one eps, up to 2 digits; dashed lines are mean baselines.

    Args:
        outcomes: at least one, of one data set.
        public_only: accuracy of the public model's data (eps = 0).
        real: accuracy of the real training data.
    """
    baselines = [("public only", public_only, "public"), ("real data", real, "real")]
    known = [Interval(value) for _, value, _ in baselines if value is not None]
    ys = proportion_scale([*(o.accuracy for o in outcomes), *known])
    # Calibration leaves eps a little below its target: without rounding, 9.99 and 10 would collide.
    groups: dict[float, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.eps):
        groups.setdefault(float(f"{outcome.eps:.2g}"), []).append(outcome)
    ticks = list(groups)
    shares = _log_shares(ticks)
    body = _axes(ticks, [shares[t] for t in ticks], ys, "eps (log scale)", "accuracy", ".0%")
    for label, value, kind in baselines:
        if value is not None:
            y = f"{_y(ys.share(value)):.1f}"
            body.append(_line(str(_LEFT), y, str(_WIDTH - _RIGHT), y, f"baseline {kind}"))
            body.append(
                f'<text x="{_LEFT + 6}" y="{float(y) - 6:.1f}" class="{kind}">{label}</text>'
            )
    means = [_mean([o.accuracy.value for o in group]) for group in groups.values()]
    path = " ".join(
        f"{_x(shares[eps]):.1f},{_y(ys.share(mean)):.1f}"
        for eps, mean in zip(ticks, means, strict=True)
    )
    body.append(f'<polyline points="{path}" class="curve thin"/>')
    for eps, group in groups.items():
        for place, outcome in enumerate(group):
            x = _x(shares[eps]) + 10 * (place - (len(group) - 1) / 2)
            body.append(_outcome(outcome, x, ys))
    return _figure(body, "Accuracy over eps")


def _outcome(outcome: Outcome, x: float, ys: Scale) -> str:
    accuracy = outcome.accuracy
    whisker = (
        ""
        if accuracy.low is None or accuracy.high is None
        else _line(
            f"{x:.1f}",
            f"{_y(ys.share(accuracy.low)):.1f}",
            f"{x:.1f}",
            f"{_y(ys.share(accuracy.high)):.1f}",
            "whisker private",
        )
    )
    return (
        f"<g><title>{escape(outcome.name)}: {accuracy.value:.1%}</title>{whisker}"
        f'<circle cx="{x:.1f}" cy="{_y(ys.share(accuracy.value)):.1f}" r="5" '
        'class="dot private"/></g>'
    )


def _log_shares(values: Sequence[float]) -> dict[float, float]:
    """Places 0.1..0.9 of increasing positive values on a logarithmic axis."""
    if len(values) == 1:
        return {values[0]: 0.5}
    low, high = math.log(values[0]), math.log(values[-1])
    return {value: 0.1 + 0.8 * (math.log(value) - low) / (high - low) for value in values}


def _axes(
    x_ticks: Sequence[float],
    x_shares: Sequence[float],
    ys: Scale,
    x_label: str,
    y_label: str,
    y_format: str,
) -> list[str]:
    parts = []
    for tick in ys.ticks:
        y = _y(ys.share(tick))
        parts.append(_line(str(_LEFT), f"{y:.1f}", str(_WIDTH - _RIGHT), f"{y:.1f}", "grid"))
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:{y_format}}</text>'
        )
    for tick, share in zip(x_ticks, x_shares, strict=True):
        text = f"{tick:,.4g}" if tick < 1e4 else f"{tick:,.0f}"
        parts.append(
            f'<text x="{_x(share):.1f}" y="{_HEIGHT - _BOTTOM + 18}" '
            f'text-anchor="middle">{text}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle" class="label">{x_label}</text>'
    )
    half = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text x="12" y="{half}" text-anchor="middle" class="label" '
        f'transform="rotate(-90 12 {half})">{y_label}</text>'
    )
    return parts


def _figure(body: Sequence[str], title: str) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def _line(x1: str, y1: str, x2: str, y2: str, kind: str) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{kind}"/>'


def _percent(scale: Scale, value: float) -> str:
    # Room at both ends, so that a dot at the end of the axis is whole.
    return f"{3 + 94 * scale.share(value):.2f}"


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
