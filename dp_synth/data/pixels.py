"""Bytes to the network's range [-1, 1] and back: the only place that converts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_float(pixels: npt.NDArray[np.uint8] | Tensor) -> Tensor:
    """Map bytes 0..255 to floats -1..1 in the network's layout.

    Args:
        pixels: uint8, a NumPy array ``[N, H, W, C]`` or a tensor ``[N, C, H, W]``.

    Returns:
        float32 ``[N, C, H, W]``, contiguous, on the tensor's device (CPU for an array).
        ``to_uint8`` gives every byte back exactly.

    Raises:
        ValueError: not uint8, or not four-dimensional.
    """
    if pixels.ndim != 4:
        raise ValueError(f"pixels must have 4 dimensions, not {pixels.ndim}.")
    if pixels.dtype not in (np.uint8, torch.uint8):
        raise ValueError(f"pixels must be uint8, not {pixels.dtype}.")
    if isinstance(pixels, np.ndarray):
        pixels = torch.tensor(pixels).permute(0, 3, 1, 2)
    return pixels.float().div_(127.5).sub_(1.0).contiguous()


def to_uint8(x: Tensor) -> npt.NDArray[np.uint8]:
    """Map floats -1..1 to bytes 0..255: round to the nearest byte, clamp what lies outside.

    Args:
        x: floating point ``[N, C, H, W]``, any device and precision.

    Returns:
        uint8 NumPy array ``[N, H, W, C]``, as ``Images`` holds it.

    Raises:
        ValueError: not floating point, not four-dimensional, or a NaN, which has no byte.
    """
    if x.ndim != 4:
        raise ValueError(f"x must have 4 dimensions, not {x.ndim}.")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, not {x.dtype}.")
    if x.isnan().any():
        raise ValueError("x holds NaN: the network or the sampler diverged.")
    scaled = x.detach().float().add(1.0).mul_(127.5).round_().clamp_(0.0, 255.0)
    array: npt.NDArray[np.uint8] = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return np.ascontiguousarray(array)
