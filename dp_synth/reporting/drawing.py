"""Pieces of inline SVG, drawn with CSS classes so that they follow light and dark mode."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from markupsafe import Markup

from dp_synth.reporting.scales import Interval, Scale

_WIDTH, _HEIGHT = 460, 264
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 34, 48
_LABEL_GAP = 0.1  # of the axis, between the labels of two ticks


@dataclass(frozen=True)
class Axis:
    """A scale with its name and the format of its ticks."""

    scale: Scale
    label: str
    format: str


@dataclass(frozen=True)
class Baseline:
    """A dashed level line; its label stands at the left or at the right end."""

    label: str
    value: float
    kind: str
    right: bool = False


class Plot:
    """A chart in the making: points in the units of its two axes.

    Args:
        title: read out where the chart is not seen.
        x: horizontal axis.
        y: vertical axis.
    """

    def __init__(self, title: str, x: Axis, y: Axis) -> None:
        self._title = title
        self._x, self._y = x, y
        self._parts = [*self._vertical_ticks(), *self._horizontal_ticks(), *self._labels()]

    def area(self, points: Sequence[tuple[float, float]]) -> None:
        """Shade what lies between a curve and the bottom."""
        base = _HEIGHT - _BOTTOM
        first, last = self._across(points[0][0]), self._across(points[-1][0])
        path = f"{first:.1f},{base:.1f} {self._path(points)} {last:.1f},{base:.1f}"
        self._parts.append(f'<polygon points="{path}" class="area"/>')

    def curve(self, points: Sequence[tuple[float, float]], kind: str = "") -> None:
        """Join points by straight lines."""
        self._parts.append(f'<polyline points="{self._path(points)}" class="curve {kind}"/>')

    def baselines(self, baselines: Iterable[Baseline]) -> None:
        """Draw level lines across the chart."""
        for baseline in baselines:
            y = self._down(baseline.value)
            end, anchor = (_WIDTH - _RIGHT - 6, "end") if baseline.right else (_LEFT + 6, "start")
            # Below a line at the very top there is room, above it there is none.
            text_y = y + 14 if y < _TOP + 12 else y - 6
            self._parts += [
                _level(y, f"baseline {baseline.kind}"),
                _text(end, text_y, baseline.label, anchor),
            ]

    def dot(
        self, x: float, interval: Interval, kind: str, title: str = "", aside: float = 0.0
    ) -> None:
        """Mark a value with its interval, ``aside`` pixels to the right of ``x``."""
        centre, y = self._across(x) + aside, self._down(interval.value)
        whisker = ""
        if interval.known():
            low, high = (self._down(end) for end in interval.ends)
            place = f"{centre:.1f}"
            whisker = line(place, f"{low:.1f}", place, f"{high:.1f}", f"whisker {kind}")
        named = f"<title>{escape(title)}</title>" if title else ""
        self._parts.append(
            f'<g>{named}{whisker}<circle cx="{centre:.1f}" cy="{y:.1f}" r="5" '
            f'class="dot {kind}"/></g>'
        )

    def svg(self) -> Markup:
        """The chart."""
        return Markup(
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
            f'aria-label="{escape(self._title)}">{"".join(self._parts)}</svg>'
        )

    def _across(self, x: float) -> float:
        return _LEFT + self._x.scale.share(x) * (_WIDTH - _LEFT - _RIGHT)

    def _down(self, y: float) -> float:
        # SVG counts from the top.
        return _HEIGHT - _BOTTOM - self._y.scale.share(y) * (_HEIGHT - _TOP - _BOTTOM)

    def _path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self._across(x):.1f},{self._down(y):.1f}" for x, y in points)

    def _vertical_ticks(self) -> list[str]:
        parts = []
        for tick in self._y.scale.ticks:
            y = self._down(tick)
            label = f"{tick:{self._y.format}}"
            parts += [_level(y, "grid"), _text(_LEFT - 8, y + 4, label, "end")]
        return parts

    def _horizontal_ticks(self) -> list[str]:
        return [
            _text(self._across(tick), _HEIGHT - _BOTTOM + 18, f"{tick:{self._x.format}}")
            for tick in self._x.scale.labelled(_LABEL_GAP)
        ]

    def _labels(self) -> list[str]:
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        return [
            _text(middle, _HEIGHT - 6, self._x.label),
            _text(4, 13, self._y.label, "start"),
        ]


def line(x1: str, y1: str, x2: str, y2: str, kind: str) -> str:
    """A straight line of a CSS class."""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{kind}"/>'


def _level(y: float, kind: str) -> str:
    return line(f"{_LEFT}", f"{y:.1f}", f"{_WIDTH - _RIGHT}", f"{y:.1f}", kind)


def _text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
