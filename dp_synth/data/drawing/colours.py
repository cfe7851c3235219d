"""Random colours as photographs have them: correlated channels, mostly pale, some vivid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dp_synth.data.drawing.canvas import Canvas

_ORANGE = math.radians(30)  # with its opposite, blue: the axis on which daylight varies
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow converts colour to grey


def tint(lightness: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Colours ``[..., 3]``, within 0..1 for lightness and saturation in 0..1; hue in radians."""
    turns = torch.tensor([0.0, -2 * math.pi / 3, 2 * math.pi / 3])
    room = saturation * torch.minimum(lightness, 1 - lightness)
    return lightness[..., None] + room[..., None] * (hue[..., None] + turns).cos()


def palette(canvas: Canvas, count: int) -> Tensor:
    """Draw ``count`` colours for each picture that go together, ``[n, count, 3]``.

    A picture has a leading hue, mostly orange or blue; its colours lie around it and one in four
    opposite. Three pictures in four are pale. Lightness is spread evenly over the whole range, in
    random order, so that no picture lacks contrast.
    """
    warm_or_cold = _ORANGE + math.pi * canvas.chance(0.4, 1) + 0.6 * canvas.normal(1)
    anything = canvas.uniform(0, 2 * math.pi, 1)
    leading = torch.where(canvas.chance(0.6, 1) > 0, warm_or_cold, anything)
    spread = canvas.uniform(0.1, 0.9, 1)
    hue = leading + spread * canvas.normal(count) + math.pi * canvas.chance(0.25, count)
    pale, vivid = canvas.uniform(0.05, 0.7, 1), canvas.uniform(0.7, 1, 1)
    saturation = torch.where(canvas.chance(0.75, 1) > 0, pale, vivid) * canvas.uniform(
        0.6, 1, count
    )
    order = canvas.uniform(0, 1, count).argsort(dim=1)
    lightness = (order + canvas.uniform(0, 1, count)) / count
    return tint(lightness, hue, saturation)


def paint(colours: Tensor, index: int) -> Tensor:
    """Colour ``index`` of a palette ``[n, count, 3]``, to be laid over a picture: [n, 3, 1, 1]."""
    return colours[:, index, :, None, None]


def paints(colours: Tensor) -> tuple[Tensor, ...]:
    """All colours of a palette ``[n, count, 3]``, each to be laid over a picture: [n, 3, 1, 1]."""
    return colours[..., None, None].unbind(1)


def luma(picture: Tensor) -> Tensor:
    """The grey of a picture ``[n, 3, H, W]``: ``[n, 1, H, W]``."""
    return (picture * torch.tensor(_LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def exposed(canvas: Canvas, picture: Tensor) -> Tensor:
    """Give each picture the mean and the contrast of a well exposed photograph."""
    grey = luma(picture)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    spread = grey.std(dim=(1, 2, 3), keepdim=True)
    contrast = canvas.uniform(0.12, 0.3, 1, 1, 1)
    gain = (contrast / (spread + 1e-3)).clamp_(max=4)
    middle = 0.5 + 0.12 * canvas.normal(1, 1, 1)
    return (picture - mean) * gain + middle
