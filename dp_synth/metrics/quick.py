"""The default evaluator: the utility and the fidelity of a synthetic data set, in about a minute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.fidelity import ClassifierFeatures, frechet_distance
from dp_synth.metrics.names import is_split_name
from dp_synth.metrics.utility import (
    Estimate,
    SmallCNN,
    accuracy,
    class_recall,
    predict,
)

# Not the run's seed: runs with the same public images then share one feature space.
_FEATURE_SEED = 0


class Metrics:
    """Metrics as they are collected: each number together with what it is.

    Attributes:
        values: flat ``{name: number}``.
        meta: ``{name: {"private": bool, "n": int, "what": str}}`` with the same keys: whether the
            number depends on a look at private images, the images it was computed on, a sentence.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.meta: dict[str, dict[str, Any]] = {}

    def add(self, name: str, value: float, *, private: bool, n: int, what: str) -> None:
        """Add one number."""
        self.values[name] = value
        self.meta[name] = {"private": private, "n": n, "what": what}

    def add_estimate(self, name: str, estimate: Estimate, *, private: bool, what: str) -> None:
        """Add a proportion as ``name`` and the ends of its interval, ``.ci_low`` and ``.ci_high``."""
        n = estimate.n
        self.add(name, estimate.value, private=private, n=n, what=what)
        for suffix, value, end in (
            ("ci_low", estimate.ci_low, "Lower"),
            ("ci_high", estimate.ci_high, "Upper"),
        ):
            sentence = f"{end} end of the 95 % Wilson interval of {name}."
            self.add(f"{name}.{suffix}", value, private=private, n=n, what=sentence)


class QuickEvaluator:
    """Scores synthetic images with a small classifier and a Frechet distance.

    Args:
        classifier: ``utility.train_classifier`` with all but images, seed and caption bound. Every
            classifier is trained by it, so all take the same number of steps.
        validation_fraction: share of the synthetic images kept from the classifier's training to
            validate it on synthetic images, 0..1 (0: no such metric).

    Raises:
        UserError: ``validation_fraction`` out of range.
    """

    def __init__(self, *, classifier: Callable[..., SmallCNN], validation_fraction: float) -> None:
        if not 0 <= validation_fraction < 1:
            raise UserError(
                f"evaluator.validation_fraction={validation_fraction} must be at least 0 and "
                "less than 1, such as 0.1."
            )
        self.classifier = classifier
        self.validation_fraction = validation_fraction

    def __call__(
        self,
        *,
        synthetic: Images,
        public_only: Images | None,
        real_train: Images,
        real_test: Images,
        other_tests: Mapping[str, Images],
        public: Images | None,
        seed: int,
    ) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
        """Return flat metrics and, under the same names, what each of them is.

        A metric that read ``real_train``, ``real_test`` or ``other_tests`` is marked private,
        whatever they hold. A metric that cannot be computed (a class without test images, fewer
        than 2 images for a covariance, one synthetic image to validate on) is left out; it is never
        NaN.

        Args:
            synthetic: images of the private model, N >= 1.
            public_only: images of the model before private training (eps = 0), or ``None``.
            real_train: the private training images, at least 1.
            real_test: the private test images, at least 1.
            other_tests: further private images by the name of their split, at least 1 each: the
                classifier trained on the synthetic images is tested on them, too.
            public: labelled public images for the space of the Frechet distance; with ``None`` or
                an empty set there is no Frechet distance.
            seed: fixes the classifiers of the utility metrics and the subsets.

        Raises:
            UserError: an empty set, sets of different image shapes, a class that the real test set
                does not know, or a split whose name a metric has already. Classes are matched by
                name, whatever their order; only ``public`` may have others.
        """
        taken = [split for split in other_tests if not is_split_name(split)]
        if taken:
            raise UserError(
                f"dataset.other_tests={taken} would give a metric a name that is no word or that "
                "another metric has; rename the split."
            )
        other_tests = {
            split: _comparable(split, images, real_test) for split, images in other_tests.items()
        }
        synthetic = _comparable("synthetic", synthetic, real_test)
        real_train = _comparable("real_train", real_train, real_test)
        real_test = _comparable("real_test", real_test, real_test)
        if public_only is not None:
            public_only = _comparable("public_only", public_only, real_test)
        metrics = Metrics()
        self._add_utility(metrics, synthetic, public_only, real_train, real_test, other_tests, seed)
        if public is not None and len(public) > 0:
            self._add_fidelity(metrics, synthetic, public_only, real_train, real_test, public, seed)
        return metrics.values, metrics.meta

    def _add_utility(
        self,
        metrics: Metrics,
        synthetic: Images,
        public_only: Images | None,
        real_train: Images,
        real_test: Images,
        other_tests: Mapping[str, Images],
        seed: int,
    ) -> None:
        training, validation = _split(synthetic, self.validation_fraction, seed)
        model = self.classifier(training, seed=seed, caption="classifier: synthetic")
        predicted = predict(model, real_test)
        metrics.add_estimate(
            "utility/accuracy",
            accuracy(predicted, real_test),
            private=True,
            what="Accuracy on real test images of a classifier trained on the synthetic images.",
        )
        for split, images in other_tests.items():
            metrics.add_estimate(
                f"utility/accuracy.{split}",
                accuracy(predict(model, images), images),
                private=True,
                what=f"Accuracy of the same classifier on the real images of the split {split}.",
            )
        for name, estimate in class_recall(predicted, real_test).items():
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
        if public_only is not None:
            # The same share is kept back, so that the baseline differs in its images alone.
            training, _ = _split(public_only, self.validation_fraction, seed)
            model = self.classifier(training, seed=seed, caption="classifier: public only")
            metrics.add_estimate(
                "utility/accuracy.public_only",
                accuracy(predict(model, real_test), real_test),
                private=True,
                what="Accuracy on real test images of a classifier trained on images of the model "
                "before private training (eps = 0).",
            )
        model = self.classifier(real_train, seed=seed, caption="classifier: real")
        metrics.add_estimate(
            "utility/accuracy.real",
            accuracy(predict(model, real_test), real_test),
            private=True,
            what="Accuracy on real test images of a classifier trained on the real images, without "
            "privacy.",
        )

    def _add_fidelity(
        self,
        metrics: Metrics,
        synthetic: Images,
        public_only: Images | None,
        real_train: Images,
        real_test: Images,
        public: Images,
        seed: int,
    ) -> None:
        _check_shape("public", public, real_test)
        judged = {"": ("the synthetic images", synthetic)}
        if public_only is not None:
            judged[".public_only"] = ("images of the model before private training", public_only)
        judged[".real_floor"] = ("the real test images", real_test)
        # The distance is biased upwards by few images: equally many make the three comparable.
        n = min(len(images) for _, images in judged.values())
        if min(n, len(real_train)) < 2:
            return
        classifier = self.classifier(public, seed=_FEATURE_SEED, caption="classifier: features")
        features = ClassifierFeatures(classifier)
        for suffix, (noun, images) in judged.items():
            metrics.add(
                f"fidelity/frechet.classifier{suffix}",
                frechet_distance(real_train, _subset(images, n, seed), features),
                private=True,
                n=n,
                what=f"Frechet distance between {noun} and the real training images, in the "
                "features of a classifier trained on public images.",
            )


def _comparable(name: str, images: Images, reference: Images) -> Images:
    """Return ``images`` with the classes of ``reference``, matched by name.

    Folders list their classes in alphabetical order and know no class without an image.

    Raises:
        UserError: no image, another image shape, or a class that ``reference`` does not have.
    """
    _check_shape(name, images, reference)
    missing = sorted(set(images.classes) - set(reference.classes))
    if missing:
        raise UserError(
            f"{name} has the classes {missing}, which the real test images do not have; "
            f"theirs are {list(reference.classes)}."
        )
    places = np.array([list(reference.classes).index(c) for c in images.classes], dtype=np.int64)
    return Images(images.pixels, places[images.labels], reference.classes)


def _check_shape(name: str, images: Images, reference: Images) -> None:
    if len(images) == 0:
        raise UserError(f"{name} holds no image; the evaluator needs at least 1.")
    if images.shape != reference.shape:
        raise UserError(
            f"{name} holds images of shape (C, H, W) = {images.shape}, the real test set of "
            f"{reference.shape}; give both the same size and channels."
        )


def _split(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Split at random into a part to train on, never empty, and ``fraction`` (rounded down)."""
    order = np.random.default_rng(seed).permutation(len(images))
    held_out = int(fraction * len(images))
    return images.select(order[held_out:]), images.select(order[:held_out])


def _subset(images: Images, n: int, seed: int) -> Images:
    """Return ``n`` different images, at random."""
    return images.select(np.random.default_rng(seed).permutation(len(images))[:n])
