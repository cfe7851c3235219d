"""Fidelity: how far the distribution of synthetic images is from that of real ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dp_synth.checks import one_of
from dp_synth.data.images import Images
from dp_synth.files import cache_folder
from dp_synth.metrics.comparison import Comparison
from dp_synth.metrics.evidence import Evidence, subset
from dp_synth.metrics.features.cache import cached
from dp_synth.metrics.features.classifier import classifier_features
from dp_synth.metrics.features.dinov2 import dinov2 as find_dinov2
from dp_synth.metrics.features.efficientnet import efficientnet_lite0
from dp_synth.metrics.features.extraction import Features
from dp_synth.metrics.features.inception import inception
from dp_synth.metrics.features.pixels import pixel_features
from dp_synth.metrics.frechet import FrechetDistance
from dp_synth.metrics.inception_score import SPLITS, inception_score
from dp_synth.metrics.record import Metrics

NETWORKS = ("classifier", "efficientnet_lite0", "inception", "dinov2", "pixels")


_MEANINGS = {
    "fid": "FID (Frechet distance, {label}) between {images} and {real}.",
    "frechet": "Frechet distance between {images} and {real}, {label}.",
    "kid": "Kernel distance (KID's estimate) between {images} and {real}, {label}; near 0, also "
    "below it, if they are alike.",
    "precision": "Share of {images} that look like some of {real} (5 neighbours), {label}.",
    "recall": "Share of {real} that look like some of {images} (5 neighbours), {label}.",
    "density": "How densely {images} lie where {real} are (5 neighbours), {label}; about 1 if they "
    "are alike.",
    "coverage": "Share of {real} with one of {images} nearby (5 neighbours), {label}.",
}
_REAL = "the real training images"


@dataclass(frozen=True)
class _Judged:
    """A set of n images: ``suffix`` is what follows the name of a metric, ``noun`` what it is."""

    suffix: str
    noun: str
    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


class Fidelity:
    """Compares synthetic images with the real training images, in the features of networks.

    The same is done with images of the model before private training and with the real test
    images, equally many of each: what real images reach is the floor that synthetic ones can hope
    for. Values of different networks do not compare.

    Packages and files of networks are looked for at once, so that what is not there is known before
    anything is read; networks are loaded when they are used.

    Args:
        features: names of networks, see ``NETWORKS``; ``classifier`` is trained on public images
            and left out where there are none.
        inception_weights: a file of weights for ``inception``; None: see ``inception``.
        dinov2: hub id or folder of the network for ``dinov2``.
        cache: folder for features of real images, which are private; None: ``features`` in the
            cache folder.

    Raises:
        UserError: an unknown name, or a network that is not there.
    """

    def __init__(
        self,
        *,
        features: Sequence[str] = ("classifier",),
        inception_weights: str | Path | None = None,
        dinov2: str = "facebook/dinov2-large",
        cache: Path | None = None,
    ) -> None:
        sources = {
            "efficientnet_lite0": efficientnet_lite0,
            "inception": lambda: inception(inception_weights),
            "dinov2": lambda: find_dinov2(dinov2),
        }
        for name in features:
            one_of("evaluator.fidelity.features", name, NETWORKS)
        self._names = list(features)
        self._found = {name: sources[name]() for name in features if name in sources}
        self._cache = cache or cache_folder() / "features"

    def __call__(self, evidence: Evidence, metrics: Metrics) -> None:
        """Add ``fidelity/*``; nothing where a side has fewer than 2 images."""
        # The Frechet distance is biased upwards by few images: equally many make all comparable.
        n = min(len(images) for _, images in _sets(evidence).values())
        if min(n, len(evidence.real_train)) < 2:
            return
        for network in self._networks(evidence):
            real = cached(network, evidence.real_train.pixels, self._cache)
            judged = list(self._judged(network, evidence, n))
            _add_scores(network, real, judged, evidence.seed, metrics)
            _add_classes(network, real, judged, evidence, metrics)
            _add_inception_scores(network, judged, evidence.seed, metrics)

    def _networks(self, evidence: Evidence) -> Iterator[Features]:
        for name in self._names:
            if name == "pixels":
                yield pixel_features(evidence.real_train.shape)
            elif name != "classifier":
                yield self._found[name]
            elif evidence.public_classifier is not None:
                yield classifier_features(evidence.public_classifier)

    def _judged(self, network: Features, evidence: Evidence, n: int) -> Iterator[_Judged]:
        for suffix, (noun, images) in _sets(evidence).items():
            chosen = subset(images, n, evidence.seed)
            # Synthetic images are others in every run, so that their features need not be kept.
            if images is evidence.real_test:
                features = cached(network, chosen.pixels, self._cache)
            else:
                features = network(chosen.pixels)
            yield _Judged(suffix, noun, features, chosen.labels)


def _sets(evidence: Evidence) -> Mapping[str, tuple[str, Images]]:
    sets = {"": ("the synthetic images", evidence.synthetic)}
    if evidence.public_only is not None:
        noun = "images of the model before private training"
        sets[".public_only"] = (noun, evidence.public_only)
    sets[".real_floor"] = ("the real test images", evidence.real_test)
    return sets


def _add_scores(
    network: Features,
    real: npt.NDArray[np.float32],
    judged: Sequence[_Judged],
    seed: int,
    metrics: Metrics,
) -> None:
    comparison = Comparison(real, len(judged[0].features), seed)
    for images in judged:
        for score in comparison.scores(images.features):
            metric = network.frechet_name if score.metric == "frechet" else score.metric
            name = f"fidelity/{metric}.{network.name}{images.suffix}"
            what = _MEANINGS[metric].format(images=images.noun, real=_REAL, label=network.label)
            metrics.add(name, score.value, private=True, n=score.n, what=what)
            if score.interval is not None:
                for end, bound in zip(("low", "high"), score.interval, strict=True):
                    metrics.add(
                        f"{name}.ci_{end}",
                        bound,
                        private=True,
                        n=score.n,
                        what=f"{end.capitalize()}er end of the approximate 95 % interval of {name} "
                        "for another draw of the images that are judged.",
                    )


def _add_classes(
    network: Features,
    real: npt.NDArray[np.float32],
    judged: Sequence[_Judged],
    evidence: Evidence,
    metrics: Metrics,
) -> None:
    """Add a Frechet distance of each class with more than 2 D images in every set."""
    for label, name in enumerate(evidence.real_train.classes):
        rows = np.flatnonzero(evidence.real_train.labels == label)
        of_class = [np.flatnonzero(images.labels == label) for images in judged]
        n = min(len(places) for places in of_class)
        if min(n, len(rows)) <= 2 * network.num_features:
            continue
        distance = FrechetDistance(real[rows])
        for images, places in zip(judged, of_class, strict=True):
            metrics.add(
                f"fidelity/{network.frechet_name}.{network.name}.class.{name}{images.suffix}",
                distance(images.features[places[:n]]),
                private=True,
                n=n,
                what=_MEANINGS[network.frechet_name].format(
                    images=f"{images.noun} of class {name}",
                    real=f"{_REAL} of that class",
                    label=network.label,
                ),
            )


def _add_inception_scores(
    network: Features, judged: Sequence[_Judged], seed: int, metrics: Metrics
) -> None:
    """Add the Inception score, which looks at the judged images alone, where there are logits."""
    n = len(judged[0].features)
    if network.logits is None or n < SPLITS:
        return
    for images in judged:
        metrics.add(
            f"fidelity/inception_score.{network.name}{images.suffix}",
            inception_score(network.logits(images.features), seed),
            private=images.suffix == ".real_floor",
            n=n,
            what=f"Inception score of {images.noun}, {network.label}: how surely and how evenly "
            "they show classes of ImageNet.",
        )
