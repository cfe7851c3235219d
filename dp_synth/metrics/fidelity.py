"""Fidelity: how far the distribution of synthetic images is from that of real ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dp_synth.data.images import Images
from dp_synth.data.pixels import to_float
from dp_synth.metrics.classifiers import SmallCNN
from dp_synth.metrics.evidence import Evidence, subset
from dp_synth.metrics.record import Metrics

# Not the run's seed: runs with the same public images then share one feature space.
_FEATURE_SEED = 0


class ClassifierFeatures(nn.Module):
    """Penultimate features of a classifier, for images as bytes.

    Train the classifier on public images: the space of the metric then looks at nothing private.

    Attributes:
        num_features: length D of the features.
    """

    def __init__(self, classifier: SmallCNN) -> None:
        super().__init__()
        self.classifier = classifier.eval()
        self.num_features = classifier.num_features

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``[N, D]`` of uint8 images ``[N, C, H, W]``, on the classifier's device."""
        device = next(self.classifier.parameters()).device
        return self.classifier.features(to_float(pixels.to(device)))


def frechet_distance(
    real: Images, synthetic: Images, features: nn.Module, batch_size: int = 1024
) -> float:
    """Return the Frechet distance between two sets of images in the space of ``features``.

    It is ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` for the means m and covariances S of the
    features (Heusel et al. 2017, arXiv 1706.08500, eq. 6), in float64. With the Inception network
    as features it is known as FID; with others its values compare with no published FID. It is
    biased upwards for few images, so compare sets of one size only.

    Args:
        real: the reference, at least 2 images.
        synthetic: the images to judge, at least 2.
        features: module that maps uint8 ``[N, C, H, W]`` on the CPU to ``[N, D]`` and has an
            attribute ``num_features``, D.
        batch_size: images in one call of ``features``.

    Returns:
        The distance, 0 or more, in the features' squared unit.

    Raises:
        ValueError: fewer than 2 images have no covariance.
    """
    if min(len(real), len(synthetic)) < 2:
        raise ValueError(
            f"the Frechet distance needs 2 or more images a side, not {len(real)} "
            f"and {len(synthetic)}."
        )
    metric = FrechetInceptionDistance(feature=features)
    metric.to(next((p.device for p in features.parameters()), torch.device("cpu")))
    with torch.inference_mode():
        for images, is_real in ((real, True), (synthetic, False)):
            for start in range(0, len(images), batch_size):
                # A copy: the pixels may lie in a file, all of which memory need not hold.
                pixels = torch.tensor(images.pixels[start : start + batch_size])
                metric.update(pixels.permute(0, 3, 1, 2), real=is_real)
        # Rounding can bring the distance of equal sets just below zero.
        return max(0.0, float(metric.compute()))


class Fidelity:
    """Frechet distances to the real training images, beside the one that real test images reach."""

    def __call__(self, evidence: Evidence, metrics: Metrics) -> None:
        """Add ``fidelity/*``, in the features of a classifier of public images where there are any."""
        if evidence.public is None or len(evidence.public) == 0:
            return
        judged = {"": ("the synthetic images", evidence.synthetic)}
        if evidence.public_only is not None:
            noun = "images of the model before private training"
            judged[".public_only"] = (noun, evidence.public_only)
        judged[".real_floor"] = ("the real test images", evidence.real_test)
        # The distance is biased upwards by few images: equally many make the three comparable.
        n = min(len(images) for _, images in judged.values())
        if min(n, len(evidence.real_train)) < 2:
            return
        classifier = evidence.train_classifier(
            evidence.public, seed=_FEATURE_SEED, caption="classifier: features"
        )
        features = ClassifierFeatures(classifier)
        for suffix, (noun, images) in judged.items():
            metrics.add(
                f"fidelity/frechet.classifier{suffix}",
                frechet_distance(evidence.real_train, subset(images, n, evidence.seed), features),
                private=True,
                n=n,
                what=f"Frechet distance between {noun} and the real training images, in the "
                "features of a classifier trained on public images.",
            )
