"""Families with a subject: landscapes, single things, cut-out silhouettes, drawn lines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dp_synth.data.drawing.canvas import Canvas, edge, over
from dp_synth.data.drawing.colours import exposed, paint, palette
from dp_synth.data.drawing.fields import cloud, clouds, pattern
from dp_synth.data.drawing.outlines import contour, convex, covered, limb, profile, segment


def landscape(canvas: Canvas) -> Tensor:
    """A sky over ridges, each nearer one lower, darker and coarser."""
    colours = palette(canvas, 5)
    white = torch.full((1, 3, 1, 1), 0.97)
    height = canvas.uniform(0, 1, 1, 1) + canvas.y / 2
    low, high = (torch.lerp(paint(colours, i), white, 0.5) for i in (0, 1))
    sky = over(high, low, height.clamp(0, 1).expand(-1, -1, canvas.width))
    puffs = edge(cloud(canvas, 2.5, 4) - canvas.uniform(-0.5, 2.5, 1, 1), 1.5)
    picture = over(sky, white, 0.8 * puffs)
    horizon = canvas.uniform(-0.7, 0.3, 1, 1)
    tilt = canvas.uniform(-0.15, 0.15, 1, 1)
    for layer in range(3):
        rough = canvas.uniform(0.02, 0.3, 1, 1)
        ridge = horizon + layer * 0.3 + tilt * canvas.x + rough * _skyline(canvas)
        depth = canvas.y - ridge
        grain = canvas.uniform(0.02, 0.12, 1, 1) * (layer + 1) * cloud(canvas, 1, 2.5)
        ground = paint(colours, 2 + layer) + (grain - 0.15 * depth.clamp(0, 1)).unsqueeze(1)
        picture = over(picture, ground, edge(depth, 1.5 * canvas.pixel))
    return exposed(canvas, picture)


def _skyline(canvas: Canvas) -> Tensor:
    """A rough line ``[n, 1, W]``: a row of a cloud."""
    return clouds(canvas, canvas.uniform(2.5, 4.5))[:, 0, canvas.height // 2, None]


def thing(canvas: Canvas) -> Tensor:
    """One lit, patterned body of up to three parts before a blurred ground, with its shadow."""
    colours = palette(canvas, 5)
    picture = _backdrop(canvas, colours)
    angle = canvas.uniform(-0.5, 0.5, 1, 1) + math.pi / 2 * canvas.chance(0.4, 1, 1)
    middle = canvas.uniform(-0.25, 0.25, 2, 1, 1)
    size = canvas.uniform(0.5, 0.9, 1, 1)
    cos, sin = angle.cos(), angle.sin()
    right, down = (canvas.x - middle[:, 0]) / size, (canvas.y - middle[:, 1]) / size
    floor = (right * 0.8).square() + ((down - 0.9) * 3).square()
    shadow = canvas.uniform(0, 0.7, 1, 1) * torch.exp(-floor)
    picture = picture * (1 - shadow).unsqueeze(1)
    u, v = cos * right + sin * down, cos * down - sin * right
    design = pattern(canvas)
    light = canvas.normal(2, 1, 1)
    skin = over(paint(colours, 2), paint(colours, 3), design)
    for part in range(3):
        picture = _body(canvas, picture, skin, (u, v), light, size, part)
        skin = over(paint(colours, 4), paint(colours, 2), design)
    return exposed(canvas, picture)


def _body(
    canvas: Canvas,
    picture: Tensor,
    skin: Tensor,
    place: tuple[Tensor, Tensor],
    light: Tensor,
    size: Tensor,
    part: int,
) -> Tensor:
    """Lay one part of a thing over the picture: the trunk (0) or one of its smaller additions."""
    scale, shown = canvas.uniform(0.7, 1, 1, 1), torch.ones(canvas.n, 1, 1)
    u, v = place
    if part:
        scale = canvas.uniform(0.2, 0.6, 1, 1)
        shown = canvas.chance(0.6, 1, 1)
        mirrored = canvas.chance(0.5, 1, 1)
        u = torch.lerp(u, u.abs(), mirrored) - canvas.uniform(0.2, 0.8, 1, 1)
        v = v - canvas.uniform(-1, 1, 1, 1)
    u, v = u / scale, v / scale * canvas.uniform(0.8, 1.8, 1, 1)
    outline = canvas.one_of(contour(canvas, u, v, canvas.chance(0.6, 1, 1)), convex(canvas, u, v))
    bulge = (1 - outline.square()).clamp_(min=0.02).sqrt()
    lit = (light[:, 0] * u + light[:, 1] * v) * 0.35 + bulge * canvas.uniform(0.2, 1, 1, 1)
    shade = 0.55 + 0.5 * lit.clamp(-0.8, 1.2)
    return over(picture, skin * shade.unsqueeze(1), covered(canvas, outline, size * scale) * shown)


def _backdrop(canvas: Canvas, colours: Tensor) -> Tensor:
    """A blurred ground: a gradient, with or without a floor, and soft blotches."""
    gradient = 0.5 + 0.5 * canvas.turned(canvas.uniform(0, 2 * math.pi, 1, 1))[1]
    floor = edge(canvas.y - canvas.uniform(-0.4, 0.8, 1, 1), canvas.uniform(0.05, 0.6, 1, 1))
    mix = canvas.one_of(gradient, floor.expand(-1, -1, canvas.width)).clamp(0, 1)
    blotches = canvas.uniform(0, 0.1, 1, 1) * cloud(canvas, 2.5, 4)
    return over(paint(colours, 0), paint(colours, 1), mix) + blotches.unsqueeze(1)


def silhouette(canvas: Canvas) -> Tensor:
    """A cut-out on plain ground, most often black: stacked trapezoids, with limbs or a cleft."""
    size = canvas.uniform(0.75, 0.95, 1, 1)
    turn = math.pi / 2 * canvas.chance(0.3, 1, 1) + 0.05 * canvas.normal(1, 1)
    u, v = canvas.turned(turn)
    u, v = u / size, v / size
    lean = canvas.uniform(-0.4, 0.4, 1, 1) * canvas.chance(0.3, 1, 1)
    u = u - lean * (v + v * v)
    side = u.abs()
    knots = canvas.uniform(0.25, 0.9, 1) * canvas.uniform(0.55, 1.2, 6)
    width = profile(v, knots)
    inside = torch.minimum((width - side) * 0.9, 1 - v.abs())
    inside = _with_limbs(canvas, inside, side, v, knots)
    inside = _with_clefts(canvas, inside, side, v)
    colours = palette(canvas, 3)
    ground = _plain_ground(canvas, colours)
    folds = canvas.uniform(0, 0.12, 1, 1) * cloud(canvas, 2, 3.5)
    round_off = canvas.uniform(0, 0.4, 1, 1) * (side / width.clamp(min=0.1)).clamp(max=1).square()
    cloth = over(paint(colours, 1), paint(colours, 2), pattern(canvas) * canvas.uniform(0, 1, 1, 1))
    cloth = torch.lerp(cloth, 1 - ground, canvas.uniform(0.1, 0.5, 1, 1, 1))  # to stand out
    cloth = cloth * (1 + folds - round_off).unsqueeze(1)
    return over(ground, cloth, edge(inside * size, canvas.pixel))


def _with_limbs(canvas: Canvas, inside: Tensor, side: Tensor, v: Tensor, knots: Tensor) -> Tensor:
    """Add a pair of limbs to two shapes in five, from the shoulder outwards and down."""
    slant, reach = canvas.uniform(0, 1.45, 1, 1), canvas.uniform(0.4, 1.6, 1, 1)
    shoulder = knots[:, 0, None, None] * 0.7
    pair = limb(canvas, side - shoulder, v + 0.75, slant, reach)
    return torch.where(canvas.chance(0.4, 1, 1) > 0, torch.maximum(inside, pair), inside)


def _with_clefts(canvas: Canvas, inside: Tensor, side: Tensor, v: Tensor) -> Tensor:
    """Cut a wedge from below into one shape in four, and a notch from above into one in two."""
    below = canvas.uniform(0.03, 0.15, 1, 1) * (v - canvas.uniform(-0.6, 0.6, 1, 1)) - side * 0.9
    notch = canvas.uniform(0.1, 0.4, 1, 1) - (side.square() + (v + 1).square() * 0.7).sqrt()
    inside = torch.where(canvas.chance(0.25, 1, 1) > 0, torch.minimum(inside, -below), inside)
    return torch.where(canvas.chance(0.5, 1, 1) > 0, torch.minimum(inside, -notch), inside)


def _plain_ground(canvas: Canvas, colours: Tensor) -> Tensor:
    black, coloured = torch.zeros(canvas.n, 3, 1, 1), paint(colours, 0)
    white = torch.ones_like(black)
    ground = canvas.one_of(black, black, black, white, coloured)
    return ground.expand(-1, -1, canvas.height, canvas.width)


def strokes(canvas: Canvas, lines: int = 5, steps: int = 9) -> Tensor:
    """Up to five pen lines that wander smoothly over plain or tinted paper."""
    colours = palette(canvas, lines + 1)
    dark = canvas.chance(0.5, 1, 1, 1)
    paper = torch.lerp(0.75 + 0.25 * paint(colours, lines), 0.2 * paint(colours, lines), dark)
    picture = paper.expand(-1, -1, canvas.height, canvas.width)
    for line in range(lines):
        reach = _wander(canvas, steps)
        width = canvas.uniform(0.15, 0.36, 1, 1).square()
        ink = torch.lerp(0.6 * paint(colours, line), 0.4 + 0.6 * paint(colours, line), dark)
        shown = canvas.chance(0.6, 1, 1) if line else 1.0
        picture = over(picture, ink, edge(width - reach, 1.5 * canvas.pixel) * shown)
    return picture


def _wander(canvas: Canvas, steps: int) -> Tensor:
    """The distance from a polyline whose direction turns steadily and a little at random."""
    point = canvas.point(0.8)
    heading = torch.atan2(-point[:, 1], -point[:, 0]) + canvas.uniform(-1, 1, 1, 1)
    turning = 0.4 * canvas.normal(1, 1)
    length = canvas.uniform(0.08, 0.35, 1, 1, 1)
    nearest = torch.full((canvas.n, canvas.height, canvas.width), math.inf)
    for _ in range(steps):
        step = length * torch.stack([heading.cos(), heading.sin()], 1)
        nearest = torch.minimum(nearest, segment(canvas, point, point + step))
        point = point + step
        heading = heading + turning + 0.2 * canvas.normal(1, 1)
    return nearest
