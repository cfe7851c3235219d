"""Families that look like stained tissue under a microscope: cell-rich, and fibrous or fatty.

Colour follows Beer and Lambert: haematoxylin and eosin absorb in proportion to their amount, with
the absorbances that Ruifrok & Johnston (2001) published for the two stains.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dp_synth.data.drawing.canvas import Canvas, edge
from dp_synth.data.drawing.fields import bend, cells, cloud, of_cell, per_cell

_HAEMATOXYLIN = (0.650, 0.704, 0.286)
_EOSIN = (0.072, 0.990, 0.105)


def epithelium(canvas: Canvas) -> Tensor:
    """Crowded blue-violet nuclei in pink cytoplasm, with pale gaps and lumens."""
    crowding = canvas.uniform(0.5, 1, 1, 1)
    nuclei, cytoplasm = _nuclei(canvas, canvas.uniform(2, 6, 1, 1), crowding, oval=0.4, fibres=None)
    gap = edge(cloud(canvas, 2.5, 4) - canvas.uniform(0.6, 3, 1, 1), 0.3)
    eosin = canvas.uniform(0.15, 0.5, 1, 1) * (1 + 0.2 * cloud(canvas)) + 0.15 * cytoplasm
    return _stained(canvas, nuclei * (1 - gap) + 0.08, eosin * (1 - gap))


def stroma(canvas: Canvas) -> Tensor:
    """Wavy pink fibres with few thin nuclei, and white fat cells between them."""
    along, across = canvas.turned(canvas.half_turn(1, 1))
    warp = canvas.uniform(0.05, 0.3, 1, 1) * bend(canvas, 4)[:, 0]
    across = across + warp
    fibres = _strands(canvas, along, across)
    nuclei, _ = _nuclei(
        canvas, canvas.uniform(2, 4, 1, 1), canvas.uniform(0.1, 0.45, 1, 1), 0.2, (along, across)
    )
    scale = canvas.uniform(0.8, 2, 1, 1)
    fat = cells(canvas, along * scale, across * scale, 0.8, 0.0)
    drop = edge(fat.second - fat.nearest - 0.12, 0.08)
    where = edge(bend(canvas, 3)[:, 0] + canvas.uniform(-2.5, 1.2, 1, 1), 0.4)
    white = drop * where
    eosin = canvas.uniform(0.35, 0.9, 1, 1) * (0.55 + 0.45 * fibres)
    return _stained(canvas, nuclei * (1 - white) + 0.03, eosin * (1 - white))


def _strands(canvas: Canvas, along: Tensor, across: Tensor) -> Tensor:
    """Lines of varied strength across the fibres' direction, -1..1."""
    frequency = canvas.uniform(2, 7, 1, 1)
    wander = bend(canvas, 6)[:, 0]
    phase = 2 * math.pi * frequency * across
    wave = (phase + 2 * wander + along).sin()
    finer = (2.3 * phase - 1.5 * along + wander).sin()
    return 0.6 * wave + 0.4 * finer


def _nuclei(
    canvas: Canvas,
    scale: Tensor,
    crowding: Tensor,
    oval: float,
    fibres: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Haematoxylin of nuclei, 0 to about 1, and how near each sample is to its cell's border.

    Where there are fibres, given by the coordinates along and across them, nuclei are thin and lie
    along.
    """
    x, y = canvas.turned(canvas.half_turn(1, 1)) if fibres is None else fibres
    squash = 1.0 if fibres is None else 3.0
    pattern = cells(canvas, x * scale, y * scale * squash, 0.8, oval)
    size = of_cell(per_cell(canvas, 0.25, 0.48), pattern.index)
    present = (of_cell(per_cell(canvas, 0, 1), pattern.index) < crowding).float()
    inside = edge(size - pattern.nearest, 2 * canvas.pixel * scale + 0.05) * present
    stain = of_cell(per_cell(canvas, 0.5, 1.1), pattern.index)
    chromatin = 1 + canvas.uniform(0.1, 0.3, 1, 1) * cloud(canvas, 0.8, 1.8)
    rim = 0.25 * edge(pattern.nearest - 0.75 * size, 0.1)
    border = torch.exp(-8 * (pattern.second - pattern.nearest))
    return inside * stain * (chromatin + rim), border


def _stained(canvas: Canvas, haematoxylin: Tensor, eosin: Tensor) -> Tensor:
    """The light that passes a section with these amounts of stain, each laboratory its own."""
    strength = canvas.uniform(0.7, 1.4, 2, 1, 1, 1)
    wobble = 0.05 * canvas.normal(2, 3, 1, 1)
    blue, pink = (
        (torch.tensor(stain).view(3, 1, 1) + wobble[:, i]) * strength[:, i]
        for i, stain in enumerate((_HAEMATOXYLIN, _EOSIN))
    )
    lamp = canvas.uniform(0.88, 1, 1, 1, 1) + 0.02 * canvas.normal(3, 1, 1)
    return lamp * torch.exp(-blue * haematoxylin.unsqueeze(1) - pink * eosin.unsqueeze(1))
