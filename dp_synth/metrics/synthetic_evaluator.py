"""An evaluation that opens no private image: synthetic images are judged by others of them."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.classifiers import predict
from dp_synth.metrics.estimates import accuracy
from dp_synth.metrics.evidence import TrainClassifier
from dp_synth.metrics.record import Metrics

SYNTHETIC_VALIDATION = "utility/accuracy.synthetic_validation"


class SyntheticEvaluator:
    """Scores synthetic images by what a classifier learns from some of them about the others.

    It is a function of the released images, and so costs no eps beyond theirs. It sees whether
    classes can be told apart, not whether images are true: samples that are all alike score well.

    Args:
        classifier: how the classifier is trained, see ``Evidence.train_classifier``.
        validation_fraction: share of the images kept from its training, between 0 and 1.

    Raises:
        UserError: the share is out of range.
    """

    reads_private_images: ClassVar[bool] = False

    def __init__(self, *, classifier: TrainClassifier, validation_fraction: float) -> None:
        if not 0 < validation_fraction < 1:
            raise UserError(
                f"evaluator.validation_fraction={validation_fraction} must be more than 0 and less "
                "than 1, such as 0.1."
            )
        self.classifier = classifier
        self.validation_fraction = validation_fraction

    def __call__(
        self, *, synthetic: Images, flip: bool = False, seed: int
    ) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
        """Return ``utility/accuracy.synthetic_validation`` with its interval, and what it is.

        Args:
            synthetic: labelled images of the private model.
            flip: whether a mirrored image is as good as the image.
            seed: fixes which images are kept, and the classifier.

        Raises:
            UserError: too few images to keep one from training.
        """
        kept = int(self.validation_fraction * len(synthetic))
        if kept == 0:
            raise UserError(
                f"evaluator.validation_fraction={self.validation_fraction} keeps none of the "
                f"{len(synthetic)} synthetic images; more of them (sampler.num_images) would work."
            )
        order = np.random.default_rng(seed).permutation(len(synthetic))
        validation = synthetic.select(order[:kept])
        model = self.classifier(
            synthetic.select(order[kept:]), seed=seed, flip=flip, caption="classifier: synthetic"
        )
        metrics = Metrics()
        metrics.add_estimate(
            SYNTHETIC_VALIDATION,
            accuracy(predict(model, validation), validation),
            private=False,
            what="Accuracy of a classifier trained on the synthetic images on others of them, kept "
            "from its training.",
        )
        return metrics.values, metrics.meta
