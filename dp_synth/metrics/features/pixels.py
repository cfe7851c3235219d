"""Pixels as features: a control that knows nothing of what images show."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dp_synth.metrics.features.extraction import Features

_SIDE = 16  # at most: up to 768 features of a colour image


class _Averages(nn.Module):
    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.sides = (height, width)

    def forward(self, pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels.float() / 255, self.sides).flatten(1)


def pixel_features(shape: tuple[int, int, int]) -> Features:
    """Return the pixels of images of shape ``(C, H, W)``, 0..1, averaged to at most 16x16."""
    channels, height, width = (shape[0], min(shape[1], _SIDE), min(shape[2], _SIDE))
    return Features(
        name="pixels",
        label=f"pixels at {height}x{width}",
        num_features=channels * height * width,
        load=lambda: _Averages(height, width),
        batch_size=1024,
    )
