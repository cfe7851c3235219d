"""Values with intervals in the rows of a table, on one axis."""

from xml.sax.saxutils import escape

from markupsafe import Markup

from dp_synth.reporting.drawing import line
from dp_synth.reporting.scales import Interval, Scale


def interval_bar(interval: Interval, scale: Scale, kind: str) -> Markup:
    """A dot with its interval; lengths in per cent, so that it stretches and its strokes do not.

    Args:
        interval: what to show.
        scale: shared by the rows of one table.
        kind: a CSS class of ``page.css``, such as ``private``.
    """
    parts = [
        line(f"{_percent(scale, tick)}%", "0", f"{_percent(scale, tick)}%", "100%", "grid")
        for tick in scale.ticks
    ]
    if interval.known():
        low, high = (f"{_percent(scale, end)}%" for end in interval.ends)
        parts.append(line(low, "50%", high, "50%", f"whisker {escape(kind)}"))
    centre = _percent(scale, interval.value)
    parts.append(f'<circle cx="{centre}%" cy="50%" r="4.5" class="dot {escape(kind)}"/>')
    return Markup(f'<svg class="bar" aria-hidden="true">{"".join(parts)}</svg>')


def scale_legend(scale: Scale) -> Markup:
    """The ends of an axis of proportions as the heading of a column of ``interval_bar``."""
    labels = "".join(
        f'<text x="{_percent(scale, tick)}%" y="12" text-anchor="{anchor}">{tick:.0%}</text>'
        for tick, anchor in ((scale.ticks[0], "start"), (scale.ticks[-1], "end"))
    )
    return Markup(f'<svg class="bar legend" aria-hidden="true">{labels}</svg>')


def _percent(scale: Scale, value: float) -> str:
    # Room at both ends, so that a dot at the end of the axis is whole.
    return f"{3 + 94 * scale.share(value):.2f}"
