"""What classifiers say about images, and what that is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dp_synth.data.images import Images
from dp_synth.metrics.estimates import Estimate, accuracy, calibration_error, class_recall


@dataclass(frozen=True)
class Answers:
    """What classifiers that were trained on the same images say about some images.

    Attributes:
        images: the N images, with their true labels.
        probabilities: of each network's classifiers, one for each seed: ``[S, N, num_classes]``.
    """

    images: Images
    probabilities: Mapping[str, npt.NDArray[np.float32]]

    def accuracy(self) -> Estimate:
        """The mean accuracy of the classifiers, with an interval over images and seeds."""
        right = [self._predicted(name) == self.images.labels for name in self.probabilities]
        return Estimate.of(np.mean(right, axis=0))

    def accuracies(self) -> dict[str, Estimate]:
        """The accuracy of each network's classifiers."""
        return {name: accuracy(self._predicted(name), self.images) for name in self.probabilities}

    def ensemble(self) -> Estimate:
        """The accuracy of all classifiers together, which average their probabilities."""
        mean = np.concatenate(list(self.probabilities.values())).mean(axis=0)
        return accuracy(mean.argmax(axis=-1), self.images)

    def recall(self) -> dict[str, Estimate]:
        """The mean recall of each class that has an image."""
        predicted = np.concatenate([self._predicted(name) for name in self.probabilities])
        return class_recall(predicted, self.images)

    def calibration_error(self) -> float:
        """The mean calibration error of the classifiers."""
        classifiers = np.concatenate(list(self.probabilities.values()))
        return float(np.mean([calibration_error(p, self.images.labels) for p in classifiers]))

    @property
    def num_classifiers(self) -> int:
        """How many classifiers there are in all."""
        return sum(len(p) for p in self.probabilities.values())

    def _predicted(self, name: str) -> npt.NDArray[np.int64]:
        return self.probabilities[name].argmax(axis=-1)
