"""Families that fill the picture evenly: noise, stripes, mosaics, leaves."""

from __future__ import annotations

import torch
from torch import Tensor

from dp_synth.data.drawing.canvas import Canvas, edge, over
from dp_synth.data.drawing.colours import exposed, paint, paints, palette
from dp_synth.data.drawing.fields import bend, cells, cloud, clouds, of_cell, per_cell, wave
from dp_synth.data.drawing.outlines import convex, covered


def noise(canvas: Canvas) -> Tensor:
    """Coloured noise with the spectrum of photographs, power falling as f^-1.2 to f^-3.2."""
    light, hue, other = clouds(canvas, canvas.uniform(1.2, 3.2), 3).split(1, dim=1)
    first, second, third = paints(palette(canvas, 3))
    picture = first + 0.25 * light + 0.5 * hue * (second - first) + 0.25 * other * (third - first)
    return exposed(canvas, picture)


def stripes(canvas: Canvas) -> Tensor:
    """Gratings, checks and rings, warped, of two or three colours."""
    warp = canvas.uniform(0, 0.25, 1, 1, 1) * bend(canvas, 4, 2)
    along, across = canvas.turned(canvas.half_turn(1, 1))
    along, across = along + warp[:, 0], across + warp[:, 1]
    centre = canvas.point(1)
    ring = ((along - centre[:, 0]).square() + (across - centre[:, 1]).square()).sqrt()
    period = canvas.uniform(0.9, 4.5, 1, 1)
    duty = canvas.uniform(-0.2, 0.2, 1, 1)
    sharpness = canvas.uniform(0.4, 4, 1, 1)
    phase = canvas.uniform(0, 1, 1, 1)
    lines = wave(along * period + phase, sharpness) + duty
    bars = wave(across * period * canvas.uniform(0.5, 1.5, 1, 1) + phase, sharpness)
    rings = wave(ring * period + phase, sharpness)
    nothing = torch.zeros_like(lines)
    base, top, cross = paints(palette(canvas, 3))
    first = canvas.one_of(lines, lines, rings)
    second = canvas.one_of(nothing, bars, bars) * canvas.uniform(0.3, 1, 1, 1)
    picture = over(over(base, top, first), cross, second)
    return exposed(canvas, picture * (1 + 0.1 * cloud(canvas).unsqueeze(1)))


def mosaic(canvas: Canvas) -> Tensor:
    """Stones, tiles and scales: Voronoi cells with joints, each of its own shade."""
    warp = canvas.uniform(0, 0.1, 1, 1, 1) * bend(canvas, 5, 2)
    along, across = canvas.turned(canvas.half_turn(1, 1))
    scale = canvas.uniform(1.2, 4, 1, 1)
    squash = canvas.uniform(1, 1.8, 1, 1)
    jitter = canvas.uniform(0, 1, 1)
    pattern = cells(
        canvas, (along + warp[:, 0]) * scale, (across + warp[:, 1]) * scale * squash, jitter, 0.0
    )
    joint = edge(
        canvas.uniform(0.05, 0.25, 1, 1) - (pattern.second - pattern.nearest),
        scale * canvas.pixel * 2,
    )
    first, second, mortar = paints(palette(canvas, 3))
    shade = of_cell(per_cell(canvas, 0, 1), pattern.index)
    bulge = canvas.uniform(-0.2, 0.5, 1, 1) * pattern.nearest
    grain = canvas.uniform(0, 0.1, 1, 1) * cloud(canvas)
    stones = over(first, second, shade) * (1 - bulge + grain).unsqueeze(1)
    return exposed(canvas, over(stones, mortar, joint))


def leaves(canvas: Canvas, count: int = 32) -> Tensor:
    """Dead leaves: shapes of power-law sizes that hide one another (Lee, Mumford & Huang 2001)."""
    colours = palette(canvas, count + 1)
    picture = paint(colours, count).expand(-1, -1, canvas.height, canvas.width)
    grain = cloud(canvas)
    least, most = 0.2, 1.2
    place = canvas.uniform(0, 1, count)
    size = (least**-2 + place * (most**-2 - least**-2)).rsqrt()  # density r^-3
    for leaf in range(count):
        centre = canvas.point(1.2)
        angle = canvas.half_turn(1, 1)
        aspect = canvas.uniform(0.45, 1, 1, 1)
        radius = size[:, leaf, None, None]
        cos, sin = angle.cos() / radius, angle.sin() / radius
        right, down = canvas.x - centre[:, 0], canvas.y - centre[:, 1]
        u, v = cos * right + sin * down, (cos * down - sin * right) / aspect
        outline = convex(canvas, u, v)
        slope = canvas.uniform(-0.15, 0.15, 1, 1) * u
        texture = canvas.uniform(-0.12, 0.12, 1, 1) * grain
        fill = paint(colours, leaf) + (slope + texture).unsqueeze(1)
        picture = over(picture, fill, covered(canvas, outline, radius * aspect))
    return exposed(canvas, picture)
