"""The Inception score: sure of each image, and of many classes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torchmetrics.image.inception import InceptionScore

from dp_synth.metrics.precomputed import Precomputed

SPLITS = 10


def inception_score(logits: Tensor, seed: int) -> float:
    """Return the Inception score (Salimans et al. 2016, arXiv 1606.03498) of logits, 1 or more.

    It is ``exp(mean KL(p(y|x) || p(y)))``, the mean over 10 random parts, by torchmetrics. It says
    something about images of the classifier's classes only, and it rises with the number of images.

    Args:
        logits: ``[N, K]``, N >= 10.
        seed: fixes the parts.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `InceptionScore` will save")
        metric = InceptionScore(feature=Precomputed(logits.shape[1]), splits=SPLITS)
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return float(metric.compute()[0])
