"""What a report says about several runs together."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dp_synth.privacy.wording import round_up
from dp_synth.reporting.charts import Outcome, percent_axis, quality_over_eps
from dp_synth.reporting.closeness import DISTANCES
from dp_synth.reporting.content import Content
from dp_synth.reporting.drawing import Axis, Baseline
from dp_synth.reporting.numbers import decimal
from dp_synth.reporting.scales import Interval, linear_scale, proportion_scale
from dp_synth.reporting.usefulness import accuracy_baselines


@dataclass(frozen=True)
class Group:
    """The runs on one data set.

    Attributes:
        dataset: its name.
        charts: (title, chart) of quality over eps.
        totals: sentences on what the private ones spend together.
    """

    dataset: str
    charts: list[tuple[str, Markup]]
    totals: list[str]


def compare(contents: Sequence[Content]) -> list[Group]:
    """The runs by data set: charts of quality over eps, and what they spend together.

    Runs without privacy, with a void guarantee or without metrics have no place on a chart; two
    that have one are the least for a chart.
    """
    groups = []
    for dataset in sorted({content.dataset for content in contents}):
        here = [content for content in contents if content.dataset == dataset]
        valid = [c for c in here if c.eps is not None and c.eps > 0 and not c.void]
        charts = [
            (title, chart)
            for title, chart in (
                ("Accuracy over eps, larger is better", _accuracy_chart(valid, here)),
                ("Distance to the real images, smaller is closer", _distance_chart(valid, here)),
            )
            if chart is not None
        ]
        groups.append(Group(dataset, charts, _totals(dataset, valid)))
    return groups


def _accuracy_chart(valid: Sequence[Content], here: Sequence[Content]) -> Markup | None:
    outcomes = _outcomes(valid, "utility/accuracy")
    if len(outcomes) < 2:
        return None
    baselines = accuracy_baselines([content.numbers for content in here])
    shown = [*(o.quality for o in outcomes), *(Interval(b.value) for b in baselines)]
    return quality_over_eps(outcomes, baselines, percent_axis(proportion_scale(shown), "accuracy"))


def _distance_chart(valid: Sequence[Content], here: Sequence[Content]) -> Markup | None:
    """The first distance that all of the runs have."""
    for key, label in DISTANCES:
        outcomes = _outcomes(valid, key)
        if len(outcomes) < 2 or len(outcomes) < len(valid):
            continue
        baselines = [
            Baseline(name, sum(values) / len(values), kind, right=kind == "public")
            for name, suffix, kind in (
                ("public model alone", "public_only", "public"),
                ("real images", "real_floor", "real"),
            )
            if (values := _values(here, f"{key}.{suffix}"))
        ]
        highest = max(
            *(max(o.quality.value, *o.quality.ends) for o in outcomes),
            *(b.value for b in baselines),
        )
        axis = Axis(linear_scale(0, highest), label, ",.0f" if highest >= 1000 else ".4g")
        return quality_over_eps(outcomes, baselines, axis)
    return None


def _outcomes(contents: Sequence[Content], key: str) -> list[Outcome]:
    return [
        Outcome(content.name, content.eps, metric.interval)
        for content in contents
        if content.eps is not None and (metric := content.numbers.find(key)) is not None
    ]


def _values(contents: Sequence[Content], key: str) -> list[float]:
    return [m.value for content in contents if (m := content.numbers.find(key)) is not None]


def _totals(dataset: str, valid: Sequence[Content]) -> list[str]:
    """The basic composition, for each unit: eps and delta of runs on the same images add up."""
    sentences = []
    for unit in sorted({content.unit for content in valid}):
        together = [content for content in valid if content.unit == unit]
        if len(together) < 2:
            continue
        eps = sum(content.eps or 0 for content in together)
        delta = sum(content.delta or 0 for content in together)
        sentences.append(
            f"The {len(together)} private runs on {dataset} together spend at most "
            f"eps = {round_up(eps)} at delta = {decimal(delta)} for one {together[0].one}, if they "
            "saw the same private images. Every further run adds its own, released or not."
        )
    return sentences
