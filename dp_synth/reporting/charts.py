"""The charts of a report, as inline SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dp_synth.reporting.drawing import Axis, Baseline, Plot
from dp_synth.reporting.scales import Interval, Scale, linear_scale, log_scale, proportion_scale


def epsilon_curve(points: Sequence[tuple[int, float]]) -> Markup:
    """eps spent over optimizer steps, with a mark at the last value."""
    last_step, last_eps = points[-1]
    plot = Plot(
        "eps spent over training steps",
        Axis(linear_scale(0, last_step), "training steps", ",.4g" if last_step < 1e4 else ",.0f"),
        Axis(linear_scale(0, max(eps for _, eps in points)), "eps spent", "g"),
    )
    plot.area(points)
    plot.curve(points)
    plot.dot(last_step, Interval(last_eps), "private")
    return plot.svg()


@dataclass(frozen=True)
class Outcome:
    """One run in a chart of quality over eps."""

    name: str
    eps: float
    quality: Interval


def quality_over_eps(
    outcomes: Sequence[Outcome], baselines: Sequence[Baseline], quality: Axis
) -> Markup:
    """Quality over eps (logarithmic), one mark with whiskers a run.

    The line joins the means of runs of one eps, up to 2 digits.

    Args:
        outcomes: at least one, of one data set.
        baselines: level lines.
        quality: the vertical axis.
    """
    # Calibration leaves eps a little below its target: without rounding, 9.99 and 10 would collide.
    groups: dict[float, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.eps):
        groups.setdefault(float(f"{outcome.eps:.2g}"), []).append(outcome)
    plot = Plot(
        f"{quality.label} over eps",
        Axis(log_scale(list(groups)), "eps (log scale)", "g"),
        quality,
    )
    plot.baselines(baselines)
    means = [_mean([o.quality.value for o in group]) for group in groups.values()]
    plot.curve(list(zip(groups, means, strict=True)), "thin")
    for eps, group in groups.items():
        for place, outcome in enumerate(group):
            title = f"{outcome.name}: {outcome.quality.value:.4g}"
            aside = 10 * (place - (len(group) - 1) / 2)
            plot.dot(eps, outcome.quality, "private", title, aside)
    return plot.svg()


def accuracy_over_size(
    points: Sequence[tuple[int, Interval]], baselines: Sequence[Baseline]
) -> Markup:
    """Accuracy over the number of synthetic images trained on (logarithmic).

    Args:
        points: (images, accuracy), by ascending number, at least one.
        baselines: level lines.
    """
    known = [Interval(baseline.value) for baseline in baselines]
    plot = Plot(
        "Accuracy over the number of synthetic images",
        Axis(log_scale([size for size, _ in points]), "synthetic images (log scale)", ",.0f"),
        percent_axis(proportion_scale([*(i for _, i in points), *known]), "accuracy"),
    )
    plot.baselines(baselines)
    plot.curve([(size, interval.value) for size, interval in points], "thin")
    for size, interval in points:
        plot.dot(size, interval, "private", f"{size:,} images: {interval.value:.1%}")
    return plot.svg()


@dataclass(frozen=True)
class Setting:
    """One setting of a classifier in the scatter plot.

    Attributes:
        name: shown where the pointer rests.
        on_synthetic: accuracy by which it would be chosen, 0..1.
        on_real: accuracy that it reaches on real data, 0..1.
        chosen: whether it is the one that synthetic data choose.
    """

    name: str
    on_synthetic: float
    on_real: float
    chosen: bool


def tuning_scatter(settings: Sequence[Setting]) -> Markup:
    """Accuracy on real over accuracy on synthetic data, one mark a setting, at least one."""
    xs, ys = ([getattr(s, name) for s in settings] for name in ("on_synthetic", "on_real"))
    plot = Plot(
        "Accuracy of each setting on real over that on synthetic data",
        percent_axis(linear_scale(min(xs), max(xs)), "accuracy on synthetic images"),
        percent_axis(linear_scale(min(ys), max(ys)), "accuracy on real images"),
    )
    # The chosen one last, so that no other covers it.
    for setting in sorted(settings, key=lambda setting: setting.chosen):
        kind = "private" if setting.chosen else "open"
        plot.dot(setting.on_synthetic, Interval(setting.on_real), kind, setting.name)
    return plot.svg()


def percent_axis(scale: Scale, label: str) -> Axis:
    """An axis of proportions, in per cent with as many digits as its ticks need."""
    whole = all(abs(100 * tick - round(100 * tick)) < 1e-9 for tick in scale.ticks)
    return Axis(scale, label, ".0%" if whole else ".1%")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
