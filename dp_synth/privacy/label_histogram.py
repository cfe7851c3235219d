"""The classes' shares of a private data set, by one Gaussian query."""

import numpy as np
import numpy.typing as npt
import torch

from dp_synth.data.images import Images
from dp_synth.privacy.noise import GaussianNoise, GeneratorNoise, SecureNoise
from dp_synth.privacy.plan import PrivacyPlan

SENSITIVITY = 1.0
"""L2 bound on what one example, or one unit, adds to the histogram."""


def label_histogram(images: Images) -> npt.NDArray[np.float64]:
    """The number of examples, or of units, of each class: private.

    A unit with images of several classes counts in each by its share of them. So one example or
    unit, if its contribution becomes zero, moves the histogram by at most ``SENSITIVITY`` in L2.

    Returns:
        float64 [classes].
    """
    ids = np.arange(len(images)) if images.units is None else images.units
    _, unit, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    weights = 1 / sizes[unit.reshape(-1)].astype(np.float64)
    return np.bincount(images.labels, weights=weights, minlength=len(images.classes)).astype(
        np.float64
    )


def noised_shares(images: Images, noise: GaussianNoise) -> npt.NDArray[np.float64]:
    """The classes' shares from the histogram with noise: may be released, at the noise's price.

    Args:
        images: the private training split.
        noise: for a sum with the bound ``SENSITIVITY``.
    """
    return shares(noise.add_to(torch.from_numpy(label_histogram(images))).numpy())


def histogram_noise(plan: PrivacyPlan, seed: int, num_classes: int) -> GaussianNoise:
    """The noise of the plan's one query of the labels, apart from that of every step.

    Args:
        plan: has a ``label_histogram_eps``.
        seed: public; no influence on the noise.
        num_classes: entries of the histogram.
    """
    noise_multiplier = plan.label_histogram_noise_multiplier
    assert noise_multiplier is not None
    if plan.secure_noise:
        return SecureNoise(
            noise_multiplier=noise_multiplier,
            max_grad_norm=SENSITIVITY,
            size=num_classes,
            num_examples=plan.num_examples,
        )
    # Repeatable noise is keyed by the step; the steps have 0 .. plan.steps - 1.
    generator = plan.randomness(seed).noise_generator(plan.steps, "cpu")
    return GeneratorNoise(noise_multiplier * SENSITIVITY, generator)


def shares(noised: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A noised histogram as shares that sum to 1; noise below zero counts as zero.

    Where nothing is left above zero, all classes have the same share.
    """
    positive = np.clip(noised, 0, None)
    if positive.sum() == 0:
        return np.full(len(noised), 1 / len(noised))
    return positive / positive.sum()
