"""What a report says about several runs together."""

from collections.abc import Sequence

from markupsafe import Markup

from dp_synth.reporting.charts import Outcome, accuracy_over_eps
from dp_synth.reporting.content import Content


def accuracy_charts(contents: Sequence[Content]) -> list[tuple[str, Markup]]:
    """(data set, chart of accuracy over eps) for each data set that has two private runs or more.

    Runs without privacy, with a void guarantee or without metrics have no place on the axis.
    """
    charts = []
    for dataset in sorted({content.dataset for content in contents}):
        here = [content for content in contents if content.dataset == dataset]
        outcomes = [
            Outcome(content.name, content.eps, metric.interval)
            for content in here
            if content.eps is not None and content.eps > 0 and not content.void
            if (metric := content.usefulness.find("utility/accuracy")) is not None
        ]
        if len(outcomes) > 1:
            chart = accuracy_over_eps(
                outcomes,
                public_only=_mean(here, "utility/accuracy.public_only"),
                real=_mean(here, "utility/accuracy.real"),
            )
            charts.append((dataset, chart))
    return charts


def _mean(contents: Sequence[Content], key: str) -> float | None:
    found = [content.usefulness.find(key) for content in contents]
    values = [metric.interval.value for metric in found if metric is not None]
    return sum(values) / len(values) if values else None
