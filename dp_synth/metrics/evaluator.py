"""An evaluation: its parts, one after another, on the same evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from dp_synth.data.images import Images
from dp_synth.metrics.evidence import (
    DrawSamples,
    Evidence,
    RecordQuery,
    TrainClassifier,
    not_recorded,
)
from dp_synth.metrics.record import Metrics
from dp_synth.privacy.plan import PrivacyPlan

Part = Callable[[Evidence, Metrics], None]


class Evaluator:
    """Scores synthetic images.

    Args:
        classifier: how classifiers are trained, see ``Evidence.train_classifier``.
        feature_classifier: the same for the one of public images whose features others use; None:
            as ``classifier``. Evaluators that share it share one feature space.
        parts: each adds metrics of its own, in this order; None adds nothing.
    """

    reads_private_images: ClassVar[bool] = True

    def __init__(
        self,
        *,
        classifier: TrainClassifier,
        feature_classifier: TrainClassifier | None = None,
        **parts: Part | None,
    ) -> None:
        self.classifier = classifier
        self.feature_classifier = feature_classifier or classifier
        self.parts = parts

    def __call__(
        self,
        *,
        synthetic: Images,
        public_only: Images | None,
        real_train: Images,
        real_test: Images,
        other_tests: Mapping[str, Images],
        public: Images | None,
        plan: PrivacyPlan | None = None,
        flip: bool = False,
        fresh: DrawSamples | None = None,
        record_query: RecordQuery = not_recorded,
        seed: int,
        local_dir: Path | None = None,
    ) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
        """Return flat metrics and, under the same names, what each of them is.

        A metric that read ``real_train``, ``real_test`` or ``other_tests`` is marked private,
        whatever they hold. A metric that cannot be computed (a class without test images, fewer
        than 2 images for a covariance, one synthetic image to validate on) is left out; it is never
        NaN. For the arguments see ``Evidence``.

        Raises:
            UserError: sets of images that do not fit together; see ``Evidence.matched``.
        """
        evidence = Evidence(
            synthetic=synthetic,
            public_only=public_only,
            real_train=real_train,
            real_test=real_test,
            other_tests=other_tests,
            public=public,
            fresh=fresh,
            train_classifier=partial(self.classifier, flip=flip),
            train_on_public=partial(self.feature_classifier, flip=flip),
            plan=plan,
            flip=flip,
            record_query=record_query,
            seed=seed,
            local_dir=local_dir,
        ).matched()
        metrics = Metrics()
        for part in self.parts.values():
            if part is not None:
                part(evidence, metrics)
        return metrics.values, metrics.meta
