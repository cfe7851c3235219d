"""What a report says about several runs together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dp_synth.privacy.accounting import composed
from dp_synth.privacy.wording import EXAMPLE
from dp_synth.reporting.charts import Outcome, percent_axis, quality_over_eps
from dp_synth.reporting.closeness import DISTANCES
from dp_synth.reporting.content import Content
from dp_synth.reporting.drawing import Axis, Baseline
from dp_synth.reporting.scales import Interval, linear_scale, proportion_scale
from dp_synth.reporting.usefulness import accuracy_baselines


@dataclass(frozen=True)
class Cost:
    """What several private runs on one data set cost together, one unit of it.

    Attributes:
        one: the unit, in a word.
        runs: how many there are.
        eps, delta: of all their queries, composed at the smallest delta of theirs.
        how: the accountant, or that eps and delta were added up.
    """

    one: str
    runs: int
    eps: float
    delta: float
    how: str


@dataclass(frozen=True)
class Group:
    """The runs on one data set.

    Attributes:
        dataset: its name.
        charts: (title, chart) of quality over eps.
        together: what the private ones cost together, for each unit that several of them protect.
        warnings: sentences on what is in no such sum.
    """

    dataset: str
    charts: list[tuple[str, Markup]]
    together: list[Cost]
    warnings: list[str]


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
        groups.append(Group(dataset, charts, _together(valid), list(_warnings(here, valid))))
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


def _together(valid: Sequence[Content]) -> list[Cost]:
    """A cost for each unit that at least two runs have a bound for."""
    costs = []
    for unit in sorted({content.unit for content in valid}):
        # Whoever zeroes a patient zeroes the patient's images: for an image, all runs count. For a
        # patient, who may have any number of images, only those do that count patients.
        counted = [content for content in valid if unit in (EXAMPLE, content.unit)]
        if len(counted) > 1:
            one = next(content.one for content in counted if content.unit == unit)
            costs.append(_cost(one, counted))
    return costs


def _cost(one: str, runs: Sequence[Content]) -> Cost:
    """Of the statements' queries; of eps and delta alone where a statement does not list them."""
    if all(run.mechanisms and run.delta for run in runs):
        delta = min(run.delta for run in runs if run.delta)
        spent = composed((one for run in runs for one in run.mechanisms), delta=delta)
        return Cost(one, len(runs), spent.eps, delta, f"composed, {spent.accountant}")
    eps, delta = (sum(getattr(run, key) or 0 for run in runs) for key in ("eps", "delta"))
    return Cost(one, len(runs), eps, delta, "added up")


def _warnings(here: Sequence[Content], valid: Sequence[Content]) -> Iterator[str]:
    """What no eps of several runs covers."""
    dataset = here[0].dataset
    if looks := sum(len(content.looks) for content in here):
        yield (
            f"On {dataset} there {_were(looks, 'look')} at private images without noise, which no "
            "finite eps covers. To choose by what they gave is such a look, too."
        )
    if without := len(here) - len(valid):
        yield (
            f"On {dataset} there {_were(without, 'run')} without a guarantee: to publish anything "
            "of these, or to choose by them, has no eps at all."
        )
    named = sorted({content.unit for content in valid} - {EXAMPLE})
    for unit in named if len(valid) > 1 else []:
        if others := sum(content.unit != unit for content in valid):
            yield (
                f"On {dataset} there {_were(others, 'run')} that did not count by {unit}: the sums "
                f"for a {unit} leave {'it' if others == 1 else 'them'} out."
            )


def _were(count: int, what: str) -> str:
    return f"was 1 {what}" if count == 1 else f"were {count} {what}s"
