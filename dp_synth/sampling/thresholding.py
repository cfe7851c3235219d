"""What becomes of predicted pixels outside [-1, 1], where no image has any."""

from typing import Any

import torch
from torch import Tensor

from dp_synth.checks import one_of, positive
from dp_synth.errors import UserError
from dp_synth.process import Denoiser

HOW = ("none", "static", "dynamic")
_PERCENTILE = 99.5  # the paper names none; this is what diffusers takes


class Thresholding:
    """Keeps predicted images in [-1, 1] (Saharia et al. 2022, arXiv 2205.11487, section 2.3).

    Args:
        how: "none"; "static": clamp; "dynamic": for each image, clamp to [-s, s] and divide by s,
            where s is a percentile of its absolute pixels, at least 1.
        percentile: of "dynamic", above 0, at most 100; None: 99.5.

    Raises:
        UserError: an unknown way, a percentile out of range or of another way.
    """

    def __init__(self, how: str, percentile: float | None = None) -> None:
        one_of("sampler.thresholding", how, HOW)
        self.how = how
        if percentile is not None and how != "dynamic":
            raise UserError(
                f"sampler.percentile={percentile} has no meaning for sampler.thresholding={how}; "
                "leave it out, or set sampler.thresholding=dynamic."
            )
        given = _PERCENTILE if percentile is None else percentile
        self.percentile = positive("sampler.percentile", given)
        if self.percentile > 100:
            raise UserError(f"sampler.percentile={percentile} must be at most 100.")

    def describe(self) -> dict[str, Any]:
        """What decides the images, as plain values."""
        percentile = {"percentile": self.percentile} if self.how == "dynamic" else {}
        return {"thresholding": self.how, **percentile}

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The thresholded denoiser.

        Args:
            denoise: guided already: guidance is what drives pixels out of range most.
        """
        if self.how == "none":
            return denoise
        threshold = _clamp if self.how == "static" else self._dynamic
        return lambda x, t: threshold(denoise(x, t))

    def _dynamic(self, x0: Tensor) -> Tensor:
        size = torch.quantile(x0.abs().flatten(1), self.percentile / 100, dim=1)
        size = size.clamp(min=1).view(-1, 1, 1, 1)
        return x0.clamp(-size, size) / size


def _clamp(x0: Tensor) -> Tensor:
    return x0.clamp(-1, 1)
