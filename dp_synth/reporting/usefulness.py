"""What a classifier gains from the synthetic data: the ``utility/*`` of a run, sorted for the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dp_synth.metrics.names import split_accuracies
from dp_synth.reporting.charts import accuracy_over_size
from dp_synth.reporting.drawing import Baseline
from dp_synth.reporting.grids import natural_order
from dp_synth.reporting.numbers import Metric, Numbers
from dp_synth.reporting.scales import Interval, Scale, proportion_scale

# From what costs nothing to what nobody may have: name, label, hint, CSS class.
_TRAINED_ON = (
    ("utility/accuracy.public_only", "Public model alone", "eps = 0", "public"),
    ("utility/accuracy", "Private synthetic data", "this release", "private"),
    ("utility/accuracy.ensemble", "The same, an ensemble", "several classifiers vote", "private"),
    (
        "utility/accuracy.fresh",
        "Drawn anew each epoch",
        "the generator does not run out",
        "private",
    ),
    (
        "utility/accuracy.dp_classifier",
        "Real data, DP classifier",
        "trained with DP, leaves no images",
        "rival",
    ),
    (
        "utility/accuracy.non_private_generator",
        "Synthetic, no privacy",
        "the generator without noise",
        "open",
    ),
    ("utility/accuracy.real", "Real private data", "no privacy", "real"),
)
_SIZE = "utility/accuracy.size."
_NETWORK = "utility/accuracy.classifier."
_RECALL = "utility/recall."


@dataclass(frozen=True)
class Usefulness:
    """How well classifiers do that were trained on the synthetic data, and on what else there is.

    Attributes:
        accuracy: on the test split, by what the classifier was trained on.
        verdict: sentences that compare them.
        networks: of those trained on synthetic data, by network.
        splits: of those, on other real images, by split.
        validation: of those, on synthetic images.
        calibration: how far their confidence is from their accuracy.
        recall: of those, by class.
        size_chart: accuracy over the number of synthetic images.
    """

    accuracy: list[Metric]
    verdict: list[str]
    networks: list[Metric]
    splits: list[Metric]
    validation: Metric | None
    calibration: Metric | None
    recall: list[Metric]
    size_chart: Markup | None

    @property
    def accuracy_scale(self) -> Scale:
        """The common axis of the accuracies."""
        return proportion_scale([metric.interval for metric in self.accuracy])

    @property
    def recall_scale(self) -> Scale:
        """The common axis of the recalls."""
        return proportion_scale([metric.interval for metric in self.recall])

    @property
    def recall_label_width(self) -> int:
        """Characters that the longest class name takes, up to 14; longer ones are cut."""
        return min(14, max((len(metric.label) for metric in self.recall), default=0))


def read_usefulness(numbers: Numbers, num_samples: int) -> Usefulness:
    """Sort the ``utility/*`` of a run that drew ``num_samples`` images."""
    splits = split_accuracies(metric.key for metric in numbers)
    networks = numbers.under(_NETWORK)
    recall = numbers.under(_RECALL)
    validation = numbers.find("utility/accuracy.synthetic_validation")
    return Usefulness(
        accuracy=[
            metric.named(label, hint, kind)
            for key, label, hint, kind in _TRAINED_ON
            if (metric := numbers.find(key)) is not None
        ],
        verdict=_verdict(numbers),
        networks=[metric.named(name) for name, metric in networks.items()],
        splits=[
            metric.named(split)
            for split, key in splits.items()
            if (metric := numbers.find(key)) is not None
        ],
        validation=validation,
        calibration=numbers.find("utility/calibration_error"),
        recall=[recall[name].named(name) for name in sorted(recall, key=natural_order)],
        size_chart=_size_chart(numbers, num_samples - ((validation and validation.n) or 0)),
    )


def _verdict(numbers: Numbers) -> list[str]:
    synthetic, public, classifier, real = (
        numbers.find(f"utility/accuracy{suffix}")
        for suffix in ("", ".public_only", ".dp_classifier", ".real")
    )
    if synthetic is None:
        return []
    sentences = []
    if public is not None:
        sentences.append(_gain(synthetic, public))
    if classifier is not None:
        sentences.append(_against_classifier(synthetic, classifier))
    if real is not None and real.value > synthetic.value:
        lost = _points(real.value - synthetic.value)
        sentences.append(f"The real images themselves would give {lost} more.")
    return sentences


def _gain(synthetic: Metric, public: Metric) -> str:
    gain = synthetic.value - public.value
    if gain <= 0:
        return (
            "Training on the private data bought nothing that this test can show: the public "
            "model's images, which cost no privacy, do as well."
        )
    sentence = f"For their eps, the private data add {_points(gain)} to what costs no privacy"
    if _overlap(synthetic.interval, public.interval):
        return f"{sentence}; the intervals overlap, so part or all of it may be chance."
    return f"{sentence}, more than chance explains."


def _against_classifier(synthetic: Metric, classifier: Metric) -> str:
    lead = classifier.value - synthetic.value
    sentence = "A classifier trained with DP on the real images, at the same eps,"
    if _overlap(synthetic.interval, classifier.interval):
        return f"{sentence} does about as well, but leaves no images behind."
    if lead < 0:
        return f"{sentence} is {_points(-lead)} worse, and leaves no images behind."
    return (
        f"{sentence} is {_points(lead)} better: who needs one classifier and no images is served "
        "better by that."
    )


def _overlap(one: Interval, other: Interval) -> bool:
    return one.ends[0] <= other.ends[1] and other.ends[0] <= one.ends[1]


def _points(share: float) -> str:
    return f"{100 * share:.1f} percentage points"


def _size_chart(numbers: Numbers, all_images: int) -> Markup | None:
    """None without an accuracy of fewer than all images, and where names do not end in numbers."""
    sizes = {
        int(name): metric.interval
        for name, metric in numbers.under(_SIZE).items()
        if name.isdecimal() and int(name) > 0
    }
    whole = numbers.find("utility/accuracy")
    if whole is not None and all_images > max(sizes, default=all_images):
        sizes[all_images] = whole.interval
    if not sizes:
        return None
    return accuracy_over_size(sorted(sizes.items()), accuracy_baselines([numbers]))


def accuracy_baselines(of_runs: Sequence[Numbers]) -> list[Baseline]:
    """Level lines at the mean accuracies of public and of real data."""
    found = (
        (label, _mean(of_runs, f"utility/accuracy.{suffix}"), kind)
        for label, suffix, kind in (
            ("public model alone", "public_only", "public"),
            ("real data", "real", "real"),
        )
    )
    return [
        Baseline(label, value, kind, right=kind == "public")
        for label, value, kind in found
        if value is not None
    ]


def _mean(of_runs: Sequence[Numbers], key: str) -> float | None:
    values = [metric.value for run in of_runs if (metric := run.find(key)) is not None]
    return sum(values) / len(values) if values else None
