"""Tuning on synthetic data: whether the settings that are best on it are best on real data."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dp_synth.checks import count
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.classifiers import predict
from dp_synth.metrics.estimates import accuracy
from dp_synth.metrics.evidence import Evidence, TrainClassifier
from dp_synth.metrics.rank_correlation import bootstrap_interval, kendall, spearman
from dp_synth.metrics.record import Metrics

Setting = Mapping[str, Any]

_CORRELATIONS = {"spearman": ("Spearman", spearman), "kendall": ("Kendall", kendall)}


@dataclass(frozen=True)
class Scores:
    """Accuracies ``[S]`` of S settings, each the mean of the repeats.

    Attributes:
        synthetic_validation: trained on synthetic images, on synthetic images kept from training:
            what someone without private images can choose by.
        tested_on_real: of the same classifiers, on the real test images.
        real: trained on the real training images, on the real test images.
    """

    synthetic_validation: npt.NDArray[np.float64]
    tested_on_real: npt.NDArray[np.float64]
    real: npt.NDArray[np.float64]


class Tuning:
    """Trains a classifier with each setting of a grid, on synthetic and on real images.

    The last claim of Ghalebikesabi et al. 2023 (arXiv 2302.13861): who has the synthetic images can
    choose settings on them that are good on the real ones.

    Args:
        grid: values by the argument of ``Evidence.train_classifier`` that they replace; every
            combination is a setting, at least 2 in all.
        repeats: classifiers for each setting and kind of image, of as many seeds; at least 1.
        validation_fraction: share of the synthetic images kept from training, between 0 and 1.

    Raises:
        UserError: no list, fewer than 2 settings, no repeat, or a share out of range.
    """

    def __init__(
        self, *, grid: Mapping[str, Sequence[Any]], repeats: int, validation_fraction: float
    ) -> None:
        for key, values in grid.items():
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise UserError(
                    f"evaluator.tuning.grid.{key}={values!r} must be a list, such as [{values}]."
                )
        self.settings: list[Setting] = [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]
        if len(self.settings) < 2:
            raise UserError(
                f"evaluator.tuning.grid has {len(self.settings)} settings, of which none can be "
                "chosen; give lists whose combinations are 2 or more."
            )
        self.repeats = count("evaluator.tuning.repeats", repeats)
        if not 0 < validation_fraction < 1:
            raise UserError(
                f"evaluator.tuning.validation_fraction={validation_fraction} must be more than 0 "
                "and less than 1, such as 0.2."
            )
        self.validation_fraction = validation_fraction

    def __call__(self, evidence: Evidence, metrics: Metrics) -> None:
        """Add ``tuning/*``; nothing where there are too few synthetic images to validate on one.

        Raises:
            UserError: a key of the grid that the classifier's training does not take.
        """
        _check_arguments(evidence.train_classifier, self.settings[0])
        kept = int(self.validation_fraction * len(evidence.synthetic))
        if kept == 0:
            return
        scores = self._scores(evidence, kept)
        _add_settings(metrics, scores, self.settings, kept, len(evidence.real_test))
        _add_correlations(metrics, scores, evidence)
        _add_regret(metrics, scores, len(evidence.real_test))

    def _scores(self, evidence: Evidence, kept: int) -> Scores:
        order = np.random.default_rng(evidence.seed).permutation(len(evidence.synthetic))
        validation = evidence.synthetic.select(order[:kept])
        training = evidence.synthetic.select(order[kept:])
        rows = [
            [
                self._accuracies(evidence, number, repeat, training, validation)
                for repeat in range(self.repeats)
            ]
            for number in range(len(self.settings))
        ]
        return Scores(*np.mean(rows, axis=1).T)

    def _accuracies(
        self, evidence: Evidence, number: int, repeat: int, training: Images, validation: Images
    ) -> list[float]:
        """Train with one setting; return a row of ``Scores``."""
        models = [
            evidence.train_classifier(
                images,
                # Settings share their seeds, so that they differ in nothing else.
                seed=evidence.seed + repeat,
                caption=f"classifier: {kind}, setting {number + 1} of {len(self.settings)}",
                **self.settings[number],
            )
            for kind, images in (("synthetic", training), ("real", evidence.real_train))
        ]
        judged = zip(
            (models[0], models[0], models[1]),
            (validation, evidence.real_test, evidence.real_test),
            strict=True,
        )
        return [accuracy(predict(model, images), images).value for model, images in judged]


def regret(chosen_by: npt.NDArray[np.float64], real: npt.NDArray[np.float64]) -> float:
    """Return what is lost by choosing with ``chosen_by`` ``[S]``, in units of ``real`` ``[S]``.

    It is the best of ``real`` less that of the setting with the highest ``chosen_by``; of several
    such settings, less their mean.
    """
    return float(real.max() - real[chosen_by == chosen_by.max()].mean())


def _check_arguments(train_classifier: TrainClassifier, setting: Setting) -> None:
    parameters = inspect.signature(train_classifier).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = sorted(set(setting) - (set(parameters) - {"images", "seed", "caption"}))
    if unknown:
        raise UserError(
            f"evaluator.tuning.grid.{unknown[0]} is no setting of the classifier's training; use "
            "keys of evaluator.classifier, such as lr."
        )


def _add_settings(
    metrics: Metrics, scores: Scores, settings: Sequence[Setting], kept: int, tested: int
) -> None:
    for number, setting in enumerate(settings):
        words = ", ".join(f"{key}={value}" for key, value in setting.items())
        for name, values, private, n, what in (
            (
                "synthetic_validation",
                scores.synthetic_validation,
                False,
                kept,
                "Trained on synthetic images: accuracy on synthetic images kept from training",
            ),
            (
                "tested_on_real",
                scores.tested_on_real,
                True,
                tested,
                "Trained on synthetic images: accuracy on real test images",
            ),
            (
                "real",
                scores.real,
                True,
                tested,
                "Trained on real images: accuracy on real test images",
            ),
        ):
            metrics.add(
                f"tuning/setting.{number}.{name}",
                float(values[number]),
                private=private,
                n=n,
                what=f"{what}, with {words}.",
            )
    metrics.add(
        "tuning/chosen",
        float(scores.synthetic_validation.argmax()),
        private=False,
        n=kept,
        what="Number of the setting with the best accuracy on synthetic images kept from training, "
        "the first of several.",
    )


def _add_correlations(metrics: Metrics, scores: Scores, evidence: Evidence) -> None:
    n = len(evidence.real_test)
    for suffix, x, noun in (
        ("", scores.synthetic_validation, "on synthetic images kept from training"),
        (".tested_on_real", scores.tested_on_real, "on real test images"),
    ):
        for key, (label, correlation) in _CORRELATIONS.items():
            value = float(correlation(x, scores.real))
            if np.isnan(value):
                continue
            name = f"tuning/{key}{suffix}"
            metrics.add(
                name,
                value,
                private=True,
                n=n,
                what=f"{label}'s rank correlation, over {len(x)} settings, of the accuracy {noun} "
                "of classifiers trained on synthetic images and the accuracy on real test images "
                "of classifiers trained on real images.",
            )
            interval = bootstrap_interval(correlation, x, scores.real, evidence.seed)
            for end, bound in zip(("low", "high"), interval or (), strict=False):
                metrics.add(
                    f"{name}.ci_{end}",
                    bound,
                    private=True,
                    n=n,
                    what=f"{end.capitalize()}er end of the 95 % bootstrap interval of {name}, "
                    "settings resampled.",
                )


def _add_regret(metrics: Metrics, scores: Scores, n: int) -> None:
    lost = "Accuracy on real test images, after training on real ones, of the best setting less"
    metrics.add(
        "tuning/regret",
        regret(scores.synthetic_validation, scores.real),
        private=True,
        n=n,
        what=f"{lost} that of the setting chosen on synthetic images. The best is picked on the "
        "test images themselves, which makes this too large rather than too small.",
    )
    metrics.add(
        "tuning/regret_of_random",
        float(scores.real.max() - scores.real.mean()),
        private=True,
        n=n,
        what=f"{lost} the mean over all settings: what choosing at random would lose.",
    )
