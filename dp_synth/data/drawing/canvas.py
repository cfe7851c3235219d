"""The canvas that every family draws on: a batch of pictures, its coordinates and its chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Canvas:
    """A batch of blank pictures and the random numbers that they are drawn with.

    Coordinates: the centre is 0, x grows to the right, y downwards, and the shorter side spans
    -1..1. All draws come from one NumPy generator, whose streams are the same on every machine.

    Attributes:
        n: pictures.
        height: samples in a column.
        width: samples in a row.
        rng: the only source of randomness.
    """

    n: int
    height: int
    width: int
    rng: np.random.Generator

    @property
    def pixel(self) -> float:
        """The distance between neighbouring samples."""
        return 2 / min(self.height, self.width)

    @cached_property
    def x(self) -> Tensor:
        """Coordinates ``[1, 1, W]`` of the columns."""
        return self._centred(self.width).view(1, 1, -1)

    @cached_property
    def y(self) -> Tensor:
        """Coordinates ``[1, H, 1]`` of the rows."""
        return self._centred(self.height).view(1, -1, 1)

    def _centred(self, length: int) -> Tensor:
        return (torch.arange(length) - (length - 1) / 2) * self.pixel

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw ``[n, *shape]`` uniformly between ``low`` and ``high``."""
        draws = self.rng.random((self.n, *shape), dtype=np.float32)
        return torch.from_numpy(draws) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """Draw ``[n, *shape]`` from the standard normal distribution."""
        return torch.from_numpy(self.rng.standard_normal((self.n, *shape), dtype=np.float32))

    def chance(self, probability: float, *shape: int) -> Tensor:
        """Draw ``[n, *shape]`` that are 1 with ``probability``, else 0."""
        return (self.uniform(0, 1, *shape) < probability).float()

    def one_of(self, *options: Tensor) -> Tensor:
        """Take, for each picture, one of the options ``[n, ...]``, all as likely."""
        choice = torch.from_numpy(self.rng.integers(len(options), size=self.n))
        return torch.stack(options)[choice, torch.arange(self.n)]

    def half_turn(self, *shape: int) -> Tensor:
        """Draw directions ``[n, *shape]`` in radians, of lines: a half turn holds them all."""
        return self.uniform(0, math.pi, *shape)

    def point(self, margin: float) -> Tensor:
        """Draw points ``[n, 2, 1, 1]`` (x, y) of the picture, enlarged by ``margin`` about 0."""
        sides = torch.tensor([self.width, self.height]).view(2, 1, 1) / min(self.width, self.height)
        return self.uniform(-margin, margin, 2, 1, 1) * sides

    def turned(self, angle: Tensor) -> tuple[Tensor, Tensor]:
        """The coordinates along ``angle`` (radians, ``[n, 1, 1]``) and across, ``[n, H, W]``."""
        cos, sin = angle.cos(), angle.sin()
        return cos * self.x + sin * self.y, cos * self.y - sin * self.x


def over(picture: Tensor, paint: Tensor, coverage: Tensor) -> Tensor:
    """Lay ``paint`` ``[n, 3, H, W]`` or ``[n, 3, 1, 1]`` over a picture where it covers.

    ``coverage`` ``[n, H, W]`` is the share of each sample that the paint hides, 0..1.
    """
    return torch.lerp(picture, paint, coverage.unsqueeze(1))


def edge(inside: Tensor, softness: Tensor | float) -> Tensor:
    """Coverage 0..1 of what lies ``inside`` (a signed distance), over an edge ``softness`` wide."""
    return (inside / softness + 0.5).clamp_(0, 1)
