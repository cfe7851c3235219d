"""What samplers are compared by: images of a model as training data, and what tests the trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial

import numpy as np
from diffusers import UNet2DModel
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dp_synth.building import load_images
from dp_synth.checks import one_of
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.classifiers import predict
from dp_synth.metrics.estimates import accuracy
from dp_synth.metrics.evidence import TrainClassifier, comparable
from dp_synth.metrics.features.classifier import classifier_features
from dp_synth.metrics.features.extraction import Features
from dp_synth.metrics.frechet import FrechetDistance
from dp_synth.metrics.synthetic_evaluator import SYNTHETIC_VALIDATION, SyntheticEvaluator
from dp_synth.pretraining import is_cached, load_public, pretrained
from dp_synth.runs import Run

PUBLIC_PROXY = "public_proxy"
SYNTHETIC = "synthetic_validation"

Model = tuple[UNet2DModel, tuple[str, ...]]  # a network and its classes
Score = dict[str, float]
Judge = Callable[[Sequence[Images], int], Score]

_FEATURE_SEED = 0  # the evaluator's: one feature space for all


@dataclass(frozen=True)
class Criterion:
    """A way to judge a sampler.

    Attributes:
        name: as in ``criterion=NAME``.
        what: which accuracy it is, in words that follow that one.
        model: returns the network to draw from, and its classes.
        judge: draws (sets of equally many images) and a seed for the classifiers to ``accuracy`` in
            0..1, its 95 % interval ``ci_low`` and ``ci_high``, ``n``, the images that it was counted
            on, and ``frechet``, where there are features for that distance.
    """

    name: str
    what: str
    model: Callable[[], Model]
    judge: Judge


class Criteria:
    """The criteria that a finished run offers.

    Args:
        run: a finished run.
        evaluator: what trains the classifiers, and judges where nothing but synthetic images does.
    """

    def __init__(self, run: Run, evaluator: SyntheticEvaluator) -> None:
        self.run = run
        self.own = run.config()
        self.evaluator = evaluator
        self.flip = OmegaConf.select(self.own, "dataset.flip", default=False)
        self.classifier: TrainClassifier = partial(evaluator.classifier, flip=self.flip)

    def named(self, name: str) -> Criterion:
        """The criterion to choose by; "auto" is the public proxy, where the run has one.

        Raises:
            UserError: an unknown name, or a public proxy where there is none.
        """
        one_of("criterion", name, ("auto", PUBLIC_PROXY, SYNTHETIC))
        if name == SYNTHETIC:
            return self.synthetic_validation()
        try:
            return self.public_proxy()
        except UserError as error:
            if name == PUBLIC_PROXY:
                raise
            print(f"No public proxy: {error}")
            return self.synthetic_validation()

    def public_proxy(self) -> Criterion:
        """The public model plays the private one, public images that it never saw the private ones.

        Raises:
            UserError: the run has no such images.
        """
        if "load" not in self.own.public:
            raise UserError(
                f"run={self.run.path} has no public images; criterion={SYNTHETIC} needs none."
            )
        test: Images = instantiate(self.own.public.load, split="test")
        return Criterion(
            PUBLIC_PROXY,
            "on public test images, after training on images of the public model",
            cache(self._public_model),
            _RealImages(lambda: test, self.classifier, lambda: self._features),
        )

    def synthetic_validation(self) -> Criterion:
        """Images of the private model, by others of them: a function of what is released."""
        return Criterion(
            SYNTHETIC,
            "on images of the private model, after training on others of them",
            cache(self.run.load_model),
            self._judge_by_others,
        )

    def private_test(self) -> Criterion:
        """Images of the private model by the private test images: to judge is to look at them."""
        return Criterion(
            "private_test",
            "on private test images, after training on images of the private model",
            cache(self.run.load_model),
            _RealImages(
                lambda: load_images(self.own, split="test"),
                self.classifier,
                lambda: self._features,
            ),
        )

    def _public_model(self) -> Model:
        if not is_cached(self.own):
            print("The run's public model is not in the cache; it is trained once more.")
        net, classes = pretrained(self.own, load_public(self.own))
        assert classes is not None  # only a published model, which has no public images, hides them
        return net, classes

    @cached_property
    def _features(self) -> Features | None:
        """Of a classifier of the public images; None where there are none."""
        public = load_public(self.own)
        if public is None or len(public) == 0:
            return None
        caption = "classifier: features"
        return classifier_features(self.classifier(public, seed=_FEATURE_SEED, caption=caption))

    def _judge_by_others(self, draws: Sequence[Images], seed: int) -> Score:
        metrics, meta = self.evaluator(synthetic=_joined(draws), flip=self.flip, seed=seed)
        return {
            "accuracy": metrics[SYNTHETIC_VALIDATION],
            "ci_low": metrics[f"{SYNTHETIC_VALIDATION}.ci_low"],
            "ci_high": metrics[f"{SYNTHETIC_VALIDATION}.ci_high"],
            "n": meta[SYNTHETIC_VALIDATION]["n"],
        }


class _RealImages:
    """Judges synthetic images by real ones, public or private.

    Args:
        load: returns the real images, none of which is read before the first judgement.
        classifier: see ``Evidence.train_classifier``.
        features: returns what the Frechet distance is measured in, or None.
    """

    def __init__(
        self,
        load: Callable[[], Images],
        classifier: TrainClassifier,
        features: Callable[[], Features | None],
    ) -> None:
        self.load = load
        self.classifier = classifier
        self.features = features

    @cached_property
    def real(self) -> Images:
        return self.load()

    @cached_property
    def distance(self) -> Callable[[Images], float] | None:
        features = self.features()
        if features is None or len(self.real) < 2:
            return None
        frechet = FrechetDistance(features(self.real.pixels))
        return lambda images: frechet(features(images.pixels))

    def __call__(self, draws: Sequence[Images], seed: int) -> Score:
        """Train a classifier on each draw; see ``Criterion.judge``.

        The interval is Wilson's, widened by what draws differ in where there are several. The
        distance is that of all draws together: few images bias it upwards.
        """
        draws = [comparable("synthetic", images, self.real) for images in draws]
        predicted = []
        for number, images in enumerate(draws):
            caption = f"classifier {number + 1} of {len(draws)}"
            model = self.classifier(images, seed=seed + number, caption=caption)
            predicted.append(predict(model, self.real))
        found = accuracy(np.stack(predicted), self.real)
        score = {
            "accuracy": found.value,
            "ci_low": found.ci_low,
            "ci_high": found.ci_high,
            "n": found.n,
        }
        images = _joined(draws)
        if self.distance is not None and len(images) >= 2:
            score["frechet"] = self.distance(images)
        return score


def _joined(draws: Sequence[Images]) -> Images:
    return Images(
        np.concatenate([images.pixels for images in draws]),
        np.concatenate([images.labels for images in draws]),
        draws[0].classes,
    )
