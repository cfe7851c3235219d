"""Features of a classifier that was trained on public images of the right kind: small and fast."""

from __future__ import annotations

from torch import Tensor, nn

from dp_synth.data.pixels import to_float
from dp_synth.metrics.classifier_networks import Classifier
from dp_synth.metrics.features.extraction import Features


class _Penultimate(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.classifier.features(to_float(pixels))


def classifier_features(classifier: Classifier) -> Features:
    """Return the penultimate features of a classifier, on the device where it is.

    Train the classifier on public images: the space of a metric then looks at nothing private.
    Values compare between runs with the same public images and evaluator only.
    """
    return Features(
        name="classifier",
        label="features of a classifier trained on public images",
        num_features=classifier.num_features,
        load=lambda: _Penultimate(classifier),
        batch_size=1024,
    )
