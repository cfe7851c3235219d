"""Utility of a synthetic data set: train a classifier on synthetic images, test it on real ones."""

from __future__ import annotations

import numpy as np

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.classifiers import predict
from dp_synth.metrics.estimates import accuracy, class_recall
from dp_synth.metrics.evidence import Evidence
from dp_synth.metrics.record import Metrics


class Utility:
    """Accuracy on real images of a classifier trained on synthetic ones, and of the baselines'.

    Args:
        validation_fraction: share of the synthetic images kept from the classifier's training to
            validate it on synthetic images, 0..1 (0: no such metric).

    Raises:
        UserError: ``validation_fraction`` out of range.
    """

    def __init__(self, *, validation_fraction: float) -> None:
        if not 0 <= validation_fraction < 1:
            raise UserError(
                f"evaluator.utility.validation_fraction={validation_fraction} must be at least 0 "
                "and less than 1, such as 0.1."
            )
        self.validation_fraction = validation_fraction

    def __call__(self, evidence: Evidence, metrics: Metrics) -> None:
        """Add ``utility/*``; every classifier is trained in the same way, for as many steps."""
        self._add_synthetic(evidence, metrics)
        if evidence.public_only is not None:
            self._add_public_only(evidence, evidence.public_only, metrics)
        _add_real(evidence, metrics)

    def _add_synthetic(self, evidence: Evidence, metrics: Metrics) -> None:
        training, validation = self._split(evidence.synthetic, evidence.seed)
        model = evidence.train_classifier(
            training, seed=evidence.seed, caption="classifier: synthetic"
        )
        predicted = predict(model, evidence.real_test)
        metrics.add_estimate(
            "utility/accuracy",
            accuracy(predicted, evidence.real_test),
            private=True,
            what="Accuracy on real test images of a classifier trained on the synthetic images.",
        )
        for split, images in evidence.other_tests.items():
            metrics.add_estimate(
                f"utility/accuracy.{split}",
                accuracy(predict(model, images), images),
                private=True,
                what=f"Accuracy of the same classifier on the real images of the split {split}.",
            )
        for name, estimate in class_recall(predicted, evidence.real_test).items():
            metrics.add(
                f"utility/recall.{name}",
                estimate.value,
                private=True,
                n=estimate.n,
                what=f"Share of the real test images of class {name} that the classifier trained "
                "on the synthetic images labels right.",
            )
        if len(validation) > 0:
            metrics.add_estimate(
                "utility/accuracy.synthetic_validation",
                accuracy(predict(model, validation), validation),
                private=False,
                what="Accuracy of the same classifier on synthetic images kept from its training.",
            )

    def _add_public_only(self, evidence: Evidence, public_only: Images, metrics: Metrics) -> None:
        # The same share is kept back, so that the baseline differs in its images alone.
        training, _ = self._split(public_only, evidence.seed)
        model = evidence.train_classifier(
            training, seed=evidence.seed, caption="classifier: public only"
        )
        metrics.add_estimate(
            "utility/accuracy.public_only",
            accuracy(predict(model, evidence.real_test), evidence.real_test),
            private=True,
            what="Accuracy on real test images of a classifier trained on images of the model "
            "before private training (eps = 0).",
        )

    def _split(self, images: Images, seed: int) -> tuple[Images, Images]:
        """Split at random into a part to train on, never empty, and one to validate on."""
        order = np.random.default_rng(seed).permutation(len(images))
        held_out = int(self.validation_fraction * len(images))
        return images.select(order[held_out:]), images.select(order[:held_out])


def _add_real(evidence: Evidence, metrics: Metrics) -> None:
    model = evidence.train_classifier(
        evidence.real_train, seed=evidence.seed, caption="classifier: real"
    )
    metrics.add_estimate(
        "utility/accuracy.real",
        accuracy(predict(model, evidence.real_test), evidence.real_test),
        private=True,
        what="Accuracy on real test images of a classifier trained on the real images, without "
        "privacy.",
    )
