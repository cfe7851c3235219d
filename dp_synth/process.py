"""What every diffusion process has in common: noise levels, the per-row loss, the denoiser.

Shapes: R rows, C channels, H x W pixels, T timesteps. Images are floats in [-1, 1].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn
from torch.nn import functional as F

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x [R,C,H,W], t [R]) -> x0 [R,C,H,W]
RowLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x0, noise, t, y) -> loss [R]


class Process(ABC):
    """A variance-preserving diffusion over T noise levels, and what a network learns of it.

    ``x = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise`` (Ho et al. 2020, eq. 4) with the noise level
    ``sigma_t = sqrt((1 - abar_t) / abar_t)``. A timestep t is a number from 0 to T - 1; between
    whole ones, log sigma is linear. Parameterisations differ in what the network is shown and
    asked for, and in the law of t in training.

    Args:
        schedule: the levels as diffusers has them; every sampler runs in it.
        sigmas: the same levels, float64, increasing, [T], T at least 2. They are the truth here:
            diffusers keeps ``abar`` in float32, in which a small ``1 - abar`` has few digits left.
    """

    def __init__(self, schedule: DDPMScheduler, sigmas: Tensor) -> None:
        self.schedule = schedule
        self._log_sigmas = sigmas.log()

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self._log_sigmas)

    def sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The noise level at timesteps t (int or float, of any shape), in the shape of t."""
        levels = self._log_sigmas.to(dtype).to(t.device)
        t = t.to(dtype).clamp(0, len(levels) - 1)
        below = t.floor().long().clamp(max=len(levels) - 2)
        return torch.lerp(levels[below], levels[below + 1], t - below).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The inverse of ``sigma``: float timesteps; a level beyond either end gets that end."""
        levels = self._log_sigmas.to(sigma.dtype).to(sigma.device)
        level = sigma.log().clamp(levels[0], levels[-1])
        below = (torch.searchsorted(levels, level) - 1).clamp(0, len(levels) - 2)
        return below + (level - levels[below]) / (levels[below + 1] - levels[below])

    def diffuse(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy image x at timestep t (int or float, [R]); all images [R,C,H,W]."""
        signal, noise_scale = self._scales(t, x0)
        return signal * x0 + noise_scale * noise

    def row_loss(self, net: nn.Module) -> RowLoss:
        """The training loss of each row, never reduced over rows: mean squared error per pixel.

        Returns:
            A function of x0 [R,C,H,W], noise [R,C,H,W], t (int or float, [R]), y int64 [R] that
            gives losses [R]. No weight corrects for the law of t: the law is the weighting.
        """

        def loss(x0: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
            output = self._output(net, self.diffuse(x0, noise, t), t, y)
            error = F.mse_loss(output, self.target(x0, noise, t), reduction="none")
            return error.flatten(1).mean(1)

        return loss

    def denoiser(self, net: nn.Module, y: Tensor) -> Denoiser:
        """The denoiser of class labels y (int64 [R]): ``(x, t) -> x0``, t int or float; not clamped."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.to_x0(self._output(net, x, t, y), x, t)

        return denoise

    @abstractmethod
    def draw_t(self, uniform: Tensor) -> Tensor:
        """Turn uniforms in [0, 1), shape [R], into training timesteps [R] by the inverse c.d.f."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network would have to give for no loss, [R,C,H,W]."""

    @abstractmethod
    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The clean image that a network output stands for, [R,C,H,W]."""

    @abstractmethod
    def network_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is shown: an image [R,C,H,W] and a time [R]."""

    @abstractmethod
    def pipeline_scheduler(self) -> SchedulerMixin:
        """The scheduler of diffusers with which a plain loop around the network denoises as we do."""

    def _output(self, net: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        shown, time = self.network_input(x, t)
        output: Tensor = net(shown, time, class_labels=y, return_dict=False)[0]
        return output

    def _sigma_like(self, t: Tensor, like: Tensor) -> Tensor:
        """The noise level of each row, [R,1,1,1], in the precision of an image."""
        return self.sigma(t, torch.promote_types(like.dtype, torch.float32)).view(-1, 1, 1, 1)

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each [R,1,1,1]."""
        sigma = self._sigma_like(t, like)
        signal = (1 + sigma.square()).rsqrt()
        return signal, sigma * signal
