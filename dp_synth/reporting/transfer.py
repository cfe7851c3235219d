"""Whether settings can be chosen on the synthetic data: the ``tuning/*`` of a run, for the page."""

from dataclasses import dataclass

from markupsafe import Markup

from dp_synth.reporting.charts import Setting, tuning_scatter
from dp_synth.reporting.numbers import Metric, Numbers

_SETTING = "tuning/setting."


@dataclass(frozen=True)
class Transfer:
    """The tuning experiment.

    Attributes:
        num_settings: how many settings have both accuracies.
        chart: accuracy on real over accuracy on synthetic data; None without a setting.
        correlations: rank correlations of the two.
        regret: accuracy lost by the setting that synthetic data choose, against the best.
        regret_of_random: the same by a setting chosen at random.
        verdict: a sentence.
        private: whether any of it looked at private images.
    """

    num_settings: int
    chart: Markup | None
    correlations: list[Metric]
    regret: Metric | None
    regret_of_random: Metric | None
    verdict: str
    private: bool


def read_transfer(numbers: Numbers) -> Transfer | None:
    """The tuning experiment of a run; None where there was none."""
    found = numbers.under("tuning/")
    if not found:
        return None
    settings = _settings(numbers)
    named = (("tuning/spearman", "Spearman"), ("tuning/kendall", "Kendall"))
    correlations = [
        metric.named(label) for key, label in named if (metric := numbers.find(key)) is not None
    ]
    return Transfer(
        num_settings=len(settings),
        chart=tuning_scatter(settings) if settings else None,
        correlations=correlations,
        regret=numbers.find("tuning/regret"),
        regret_of_random=numbers.find("tuning/regret_of_random"),
        verdict=_verdict(correlations[0]) if correlations else "",
        private=any(metric.private for metric in found.values()),
    )


def _settings(numbers: Numbers) -> list[Setting]:
    on_synthetic, on_real = (
        {
            name.removesuffix(ending): metric
            for name, metric in numbers.under(_SETTING).items()
            if name.endswith(ending)
        }
        for ending in (".synthetic_validation", ".real")
    )
    both = on_synthetic.keys() & on_real.keys()
    best = max((on_synthetic[name].value for name in both), default=0.0)
    return [
        Setting(
            on_real[name].what or f"Setting {name}",
            on_synthetic[name].value,
            on_real[name].value,
            chosen=on_synthetic[name].value == best,
        )
        for name in sorted(both)
    ]


def _verdict(correlation: Metric) -> str:
    low, _ = correlation.interval.ends
    if low <= 0:
        return (
            "So few or so similar settings do not show that synthetic data rank settings as real "
            "data do."
        )
    if correlation.value >= 0.8:
        return "Synthetic data rank settings much as real data do: choose on them."
    return (
        "Synthetic data rank settings loosely as real data do: they tell good settings from bad "
        "ones, not the best from the second."
    )
