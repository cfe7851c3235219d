"""Heun's rule with churn (Karras et al. 2022, arXiv 2206.00364, Algorithm 2)."""

import math
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dp_synth.checks import not_negative, positive
from dp_synth.errors import UserError
from dp_synth.process import Denoiser, Process
from dp_synth.sampling.levels import Levels, levels
from dp_synth.sampling.rule import Rule, Streams


@dataclass
class Heun(Rule):
    """Second order, two network calls a step but one in the last.

    Attributes:
        churn: S_churn, how much noise is added and removed again, over all steps; 0: none.
        churn_interval: noise levels [S_min, S_max] at which it is; None: all.
        churn_noise: S_noise, standard deviation of that noise; a little above 1 makes up for
            detail that networks lose.
    """

    churn: float = 0.0
    churn_interval: Levels | None = None
    churn_noise: float = 1.0

    def __post_init__(self) -> None:
        self.churn = not_negative("sampler.churn", self.churn)
        self.churn_interval = levels("sampler.churn_interval", self.churn_interval)
        self.churn_noise = positive("sampler.churn_noise", self.churn_noise)
        if self.churn == 0 and (self.churn_interval is not None or self.churn_noise != 1):
            raise UserError(
                "sampler.churn=0 adds no noise, so that sampler.churn_interval and "
                "sampler.churn_noise have no meaning; set sampler.churn, such as to 10."
            )

    def network_calls(self, steps: int) -> int:
        """Two a step; the last, to no noise at all, is Euler's."""
        return 2 * steps - 1

    def __call__(
        self,
        denoise: Denoiser,
        noise: Tensor,
        process: Process,
        timesteps: Tensor,
        streams: Streams,
    ) -> Tensor:
        """See ``Rule``; x is the image plus sigma times noise, where the denoiser's is scaled."""

        def denoised(x: Tensor, sigma: float) -> Tensor:
            t = process.timestep(torch.tensor(sigma, dtype=torch.float64)).float()
            return denoise(x / math.hypot(1, sigma), t.to(x.device).expand(len(x)))

        sigmas = process.sigma(timesteps, torch.float64).tolist()
        x = noise * sigmas[0]
        for sigma, lower in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
            churned = sigma * (1 + self._gamma(sigma, len(sigmas)))
            if churned > sigma:
                fresh = randn_tensor(x.shape, generator=streams, device=x.device, dtype=x.dtype)
                x = x + self.churn_noise * math.sqrt(churned**2 - sigma**2) * fresh
            x0 = denoised(x, churned)
            x_lower = x0 + lower / churned * (x - x0)
            if lower > 0:
                slopes = (x - x0) / churned + (x_lower - denoised(x_lower, lower)) / lower
                x_lower = x + (lower - churned) * slopes / 2
            x = x_lower
        return x

    def _gamma(self, sigma: float, steps: int) -> float:
        """How far to churn a noise level up, as a share of it."""
        if self.churn_interval is not None and not self.churn_interval.hold(sigma):
            return 0.0
        return min(self.churn / steps, math.sqrt(2) - 1)
