"""Random scalar fields ``[n, H, W]``: clouds, bends, waves and cell patterns to build with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_synth.data.drawing.canvas import Canvas, edge

_LATTICE = 16  # cells a side before a cell pattern repeats


def clouds(canvas: Canvas, slope: Tensor, count: int = 1) -> Tensor:
    """Noise ``[n, count, H, W]`` of mean 0 and variance 1, its power falling as ``f ** -slope``.

    ``slope`` ``[n]`` is about 2 in photographs of nature (Field 1987). Each picture's noise is
    stretched by up to a half in a random direction.
    """
    angle, stretch = canvas.half_turn(1, 1), canvas.uniform(1, 1.5, 1, 1).sqrt()
    fy = torch.fft.fftfreq(canvas.height).view(1, -1, 1)
    fx = torch.fft.rfftfreq(canvas.width).view(1, 1, -1)
    along, across = angle.cos() * fx + angle.sin() * fy, angle.cos() * fy - angle.sin() * fx
    power = (along * stretch).square() + (across / stretch).square()
    power[:, 0, 0] = 1.0
    gain = power.pow(-slope.view(-1, 1, 1) / 4)
    gain[:, 0, 0] = 0.0  # no mean
    parts = canvas.normal(count, *gain.shape[1:], 2)
    noise = torch.fft.irfft2(
        torch.view_as_complex(parts) * gain.unsqueeze(1), s=(canvas.height, canvas.width)
    )
    return noise / noise.std(dim=(2, 3), keepdim=True)


def cloud(canvas: Canvas, low: float = 1.5, high: float = 3.0) -> Tensor:
    """One noise field ``[n, H, W]``, each picture's slope between ``low`` and ``high``."""
    return clouds(canvas, canvas.uniform(low, high)).squeeze(1)


def bend(canvas: Canvas, knots: int, count: int = 1) -> Tensor:
    """Smooth fields ``[n, count, H, W]`` through ``knots`` x ``knots`` standard normal values."""
    values = canvas.normal(count, knots, knots)
    size = (canvas.height, canvas.width)
    return F.interpolate(values, size, mode="bicubic", align_corners=True)


def wave(phase: Tensor, sharpness: Tensor) -> Tensor:
    """A grating 0..1 of ``phase`` (in periods): a sine, or square where ``sharpness`` is large."""
    return (0.5 + sharpness * (2 * math.pi * phase).sin()).clamp_(0, 1)


@dataclass(frozen=True)
class Cells:
    """Which cell each sample lies in, and how far from the cell's seed.

    Attributes:
        nearest: distance to the nearest seed, ``[n, H, W]``, in cells.
        second: distance to the second nearest.
        index: number of the nearest seed, int64, to be passed to ``of_cell``.
    """

    nearest: Tensor
    second: Tensor
    index: Tensor


def per_cell(canvas: Canvas, low: float, high: float) -> Tensor:
    """One uniform number for every cell, ``[n, cells]``."""
    return canvas.uniform(low, high, _LATTICE**2)


def of_cell(values: Tensor, index: Tensor) -> Tensor:
    """Look up each sample's cell: ``[n, cells]`` and ``[n, H, W]`` give ``[n, H, W]``."""
    return values.gather(1, index.flatten(1)).view(index.shape)


def cells(canvas: Canvas, x: Tensor, y: Tensor, jitter: float | Tensor, oval: float) -> Cells:
    """Voronoi cells of one seed in each unit square (Worley 1996).

    Args:
        canvas: where to draw.
        x: horizontal coordinates ``[n, H, W]`` in units of a square.
        y: vertical coordinates.
        jitter: how far a seed strays from the middle of its square; 0 a lattice, 1 anywhere.
        oval: log of the greatest stretch of a cell's own measure of distance; 0 for round ones.
    """
    seed_x = 0.5 + jitter * per_cell(canvas, -0.5, 0.5)
    seed_y = 0.5 + jitter * per_cell(canvas, -0.5, 0.5)
    angle, stretch = per_cell(canvas, 0, math.pi), per_cell(canvas, -oval, oval).exp()
    column, row = x.floor(), y.floor()
    nearest = torch.full_like(x, 9.0)
    second = nearest
    index = torch.zeros_like(x, dtype=torch.int64)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            square_x, square_y = column + right, row + down
            number = (square_y % _LATTICE * _LATTICE + square_x % _LATTICE).long()
            dx = square_x + of_cell(seed_x, number) - x
            dy = square_y + of_cell(seed_y, number) - y
            distance = _stretched(dx, dy, angle, stretch, number) if oval else dx * dx + dy * dy
            closer = distance < nearest
            second = torch.where(closer, nearest, torch.minimum(second, distance))
            nearest = torch.where(closer, distance, nearest)
            index = torch.where(closer, number, index)
    return Cells(nearest.sqrt(), second.sqrt(), index)


def _stretched(dx: Tensor, dy: Tensor, angle: Tensor, stretch: Tensor, number: Tensor) -> Tensor:
    """Square of the distance in the cell's own measure."""
    cos, sin = of_cell(angle.cos(), number), of_cell(angle.sin(), number)
    s = of_cell(stretch, number)
    return ((cos * dx + sin * dy) * s).square() + ((cos * dy - sin * dx) / s).square()


def pattern(canvas: Canvas) -> Tensor:
    """A random pattern 0..1, ``[n, H, W]``: plain, stripes, checks, spots or clouds."""
    along, across = canvas.turned(canvas.half_turn(1, 1))
    warp = canvas.uniform(0, 0.1, 1, 1) * bend(canvas, 4)[:, 0]
    frequency = canvas.uniform(1, 5, 1, 1)
    sharpness = canvas.uniform(0.4, 3, 1, 1)
    stripes = wave((along + warp) * frequency, sharpness)
    bars = wave((across + warp) * frequency, sharpness)
    spots = edge(stripes * bars - 0.6, 0.2)
    plain = torch.zeros_like(stripes)
    blotches = edge(cloud(canvas), canvas.uniform(0.3, 3, 1, 1))
    return canvas.one_of(plain, plain, stripes, (stripes + bars) / 2, spots, blotches)
