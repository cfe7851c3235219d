"""Random views of images that classifiers are trained on: shifted, mirrored, bent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_CONTROL = 4  # control points a side of the elastic displacement


def default_shift(height: int, width: int) -> int:
    """A sixteenth of the shorter side, in whole pixels."""
    return min(height, width) // 16


def shift(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Move each image ``[N, C, H, W]`` by whole pixels, int64 ``[N]`` each way; edges repeat."""
    n, _, height, width = x.shape
    rows = (torch.arange(height) + down.cpu()[:, None]).clamp_(0, height - 1).to(x.device)
    columns = (torch.arange(width) + right.cpu()[:, None]).clamp_(0, width - 1).to(x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    # Indices on both sides of a slice put the slice's dimension, the channels, last.
    return x[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mirror(x: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the images ``[N, C, H, W]`` whose entry of bool ``[N]`` is true, left to right."""
    return torch.where(mirrored.to(x.device).view(-1, 1, 1, 1), x.flip(-1), x)


def bend(x: Tensor, pixels: float, generator: torch.Generator) -> Tensor:
    """Displace each image ``[N, C, H, W]`` smoothly, by ``pixels`` (standard deviation)."""
    if pixels == 0:
        return x
    n, _, height, width = x.shape
    control = torch.randn(n, 2, _CONTROL, _CONTROL, generator=generator)
    displacement = F.interpolate(control, (height, width), mode="bicubic", align_corners=True)
    still = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)
    unit = 2 / torch.tensor([width, height])  # grid_sample measures in half sides
    grid = (still + pixels * unit * displacement.permute(0, 2, 3, 1)).to(x.device)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
