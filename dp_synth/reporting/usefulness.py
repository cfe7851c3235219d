"""The metrics of a run, sorted into what the report shows: utility, recall, fidelity, the rest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dp_synth.metrics.names import split_accuracies
from dp_synth.reporting.charts import Interval, Scale, proportion_scale

_ACCURACY = (
    ("utility/accuracy.public_only", "Public model alone", "eps = 0", "public"),
    ("utility/accuracy", "Private synthetic data", "this release", "private"),
    ("utility/accuracy.real", "Real private data", "no privacy", "real"),
)
_RECALL = "utility/recall."
_ENDS = (".ci_low", ".ci_high")
_VARIANTS = ("", ".public_only", ".real_floor")


@dataclass(frozen=True)
class Metric:
    """One number of ``metrics.json`` with what is known about it.

    Attributes:
        key: its name in ``metrics.json``.
        label: its name on the page.
        hint: a few words more.
        kind: CSS class of its mark: ``public``, ``private`` or ``real``.
        interval: the value and the ends of its interval.
        private: whether it looked at private images. Unknown counts as yes.
        n: images that it was computed on, if known.
        what: a sentence that defines it, or nothing.
    """

    key: str
    label: str
    hint: str
    kind: str
    interval: Interval
    private: bool
    n: int | None
    what: str


@dataclass(frozen=True)
class Fidelity:
    """One distance: synthetic, public only, and the floor that real images reach."""

    label: str
    synthetic: Metric | None
    public_only: Metric | None
    floor: Metric | None


@dataclass(frozen=True)
class Usefulness:
    """All metrics of a run.

    Attributes:
        accuracy: on the test split, by what the classifier was trained on.
        other_splits: of the classifier trained on synthetic data, by split.
        recall: by class.
        fidelity: by distance.
        everything: each metric once, by name.
    """

    accuracy: list[Metric]
    other_splits: list[Metric]
    recall: list[Metric]
    fidelity: list[Fidelity]
    everything: list[Metric]

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

    @property
    def private(self) -> list[Metric]:
        """The metrics that looked at private images."""
        return [metric for metric in self.everything if metric.private]

    def find(self, key: str) -> Metric | None:
        """The metric of a name, or None."""
        return next((metric for metric in self.everything if metric.key == key), None)


def read_usefulness(
    metrics: Mapping[str, float], meta: Mapping[str, Mapping[str, Any]]
) -> Usefulness:
    """Sort ``metrics.json`` and ``metrics_meta.json`` for the page; what is not finite is left out."""
    metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}

    def metric(key: str, label: str = "", hint: str = "", kind: str = "private") -> Metric:
        about = meta.get(key, {})
        low, high = (metrics.get(key + end) for end in _ENDS)
        return Metric(
            key=key,
            label=label or key,
            hint=hint,
            kind=kind,
            interval=Interval(metrics[key], low, high),
            private=bool(about.get("private", not key.startswith("public/"))),
            n=about.get("n"),
            what=str(about.get("what", "")),
        )

    names = [key for key in metrics if not (key.endswith(_ENDS) and _without_end(key) in metrics)]
    bases = sorted({_without_variant(key) for key in names if key.startswith("fidelity/")})
    return Usefulness(
        accuracy=[metric(*row) for row in _ACCURACY if row[0] in metrics],
        other_splits=[metric(key, label=split) for split, key in split_accuracies(names).items()],
        recall=[
            metric(key, label=key.removeprefix(_RECALL)) for key in names if key.startswith(_RECALL)
        ],
        fidelity=[
            Fidelity(
                _fidelity_label(base),
                *(metric(base + v) if base + v in metrics else None for v in _VARIANTS),
            )
            for base in bases
        ],
        everything=[metric(key) for key in sorted(names)],
    )


def _without_end(key: str) -> str:
    return key.rpartition(".")[0]


def _without_variant(key: str) -> str:
    for variant in _VARIANTS[1:]:
        if key.endswith(variant):
            return key.removesuffix(variant)
    return key


def _fidelity_label(base: str) -> str:
    """``fidelity/frechet.classifier`` is a Frechet distance in classifier features."""
    distance, _, features = base.removeprefix("fidelity/").partition(".")
    name = "Fréchet distance" if distance == "frechet" else distance.replace("_", " ")
    return f"{name} in {features.replace('_', ' ')} features" if features else name
