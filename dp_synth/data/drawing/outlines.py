"""Outlines of random shapes, each a field that is below 1 inside the shape and 1 on its edge."""

from __future__ import annotations

import torch
from torch import Tensor

from dp_synth.data.drawing.canvas import Canvas, edge


def convex(canvas: Canvas, u: Tensor, v: Tensor) -> Tensor:
    """A random convex shape of about the unit disc's size, at coordinates ``u``, ``v``.

    It is a mean of four norms (those of a square, a disc, a diamond and a triangle) with weights
    that mostly favour one: hence squares, ellipses and triangles, sharp, rounded or bevelled.
    """
    across, down = u.abs(), v.abs()
    square = torch.maximum(across, down)
    disc = (u * u + v * v).sqrt()
    diamond = across + down
    triangle = torch.maximum(-v, 0.5 * v + 0.866 * across) * 1.4
    weight = canvas.uniform(0, 1, 4, 1, 1).pow(6)
    a, b, c, d = (weight / weight.sum(dim=1, keepdim=True)).unbind(1)
    return a * square + b * disc + c * diamond + d * triangle


def contour(canvas: Canvas, u: Tensor, v: Tensor, symmetry: Tensor, harmonics: int = 7) -> Tensor:
    """A star-shaped outline with random Fourier descriptors falling as ``1 / k``.

    Its radius lies around 1; ``symmetry`` ``[n, 1, 1]`` is 1 for outlines that are mirrored at
    ``u = 0``, else 0.
    """
    distance = (u * u + v * v).sqrt().clamp_(min=1e-4)
    roughness = canvas.uniform(0.1, 0.5, 1, 1)
    sine, cosine = u / distance, v / distance  # of the angle from the v axis
    # cos(kt) + i sin(kt) as powers of cos(t) + i sin(t): no arc tangent is needed.
    even, odd = cosine, sine
    radius = torch.ones_like(distance)
    for k in range(1, harmonics + 1):
        radius = radius + roughness / k * canvas.normal(1, 1) * even
        radius = radius + roughness / k * canvas.normal(1, 1) * (1 - symmetry) * odd
        even, odd = even * cosine - odd * sine, odd * cosine + even * sine
    return distance / radius.clamp_(min=0.25)


def segment(canvas: Canvas, start: Tensor, end: Tensor) -> Tensor:
    """The distance ``[n, H, W]`` from a line between two points ``[n, 2, 1, 1]`` (x, y)."""
    (x0, y0), (x1, y1) = start.unbind(1), end.unbind(1)
    along_x, along_y = x1 - x0, y1 - y0
    length = (along_x.square() + along_y.square()).clamp_(min=1e-6)
    right, down = canvas.x - x0, canvas.y - y0
    share = ((right * along_x + down * along_y) / length).clamp_(0, 1)
    return ((right - share * along_x).square() + (down - share * along_y).square()).sqrt_()


def profile(y: Tensor, knots: Tensor) -> Tensor:
    """Interpolate ``knots`` ``[n, K]``, evenly spaced over -1..1, linearly at ``y``."""
    last = knots.shape[1] - 1
    position = ((y + 1) / 2 * last).clamp(0, last)
    index = position.floor().clamp_(max=last - 1).long()
    flat = index.flatten(1)
    left, right = knots.gather(1, flat), knots.gather(1, flat + 1)
    value = torch.lerp(left, right, (position - index).flatten(1))
    return value.view(y.shape)


def limb(canvas: Canvas, u: Tensor, v: Tensor, slant: Tensor, reach: Tensor) -> Tensor:
    """A tapering band on both sides that starts at the origin: signed distance, inside positive.

    Args:
        canvas: where to draw.
        u: coordinates across, mirrored by the caller where it wants both sides.
        v: coordinates down.
        slant: angle below the horizontal, radians, ``[n, 1, 1]``.
        reach: length.
    """
    along = slant.cos() * u + slant.sin() * v
    across = slant.cos() * v - slant.sin() * u
    thickness = canvas.uniform(0.12, 0.3, 1, 1) * (1 - canvas.uniform(0, 0.6, 1, 1) * along / reach)
    return torch.minimum(thickness - across.abs(), reach - along)


def covered(canvas: Canvas, outline: Tensor, size: Tensor | float) -> Tensor:
    """Coverage 0..1 of the inside of an outline whose unit is ``size``, its edge anti-aliased."""
    return edge((1 - outline) * size, canvas.pixel)
