"""The diffusion process: noise schedule, parameterisation, timestep law, per-example loss, denoiser.

Shapes: R rows, C channels, H x W pixels. Images are floats in [-1, 1]. Schedules come from diffusers.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from dp_synth.checks import one_of
from dp_synth.errors import UserError

Prediction = Literal["epsilon", "v_prediction", "sample"]
Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x [R,C,H,W], t [R]) -> x0 [R,C,H,W]
RowLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x0, noise, t, y) -> loss [R]


class TimestepLaw:
    """The law of the training timestep: a mixture of uniforms on neighbouring intervals.

    ``p(t) = sum_i weights[i] * U{bounds[i], ..., bounds[i + 1] - 1}``. Ghalebikesabi et al. 2023
    put most of the mass on the middle of the trajectory, where an image's content is decided.

    Args:
        bounds: increasing timesteps, ``len(weights) + 1`` of them, the first one 0.
        weights: non-negative mixture weights; normalised to sum to one.
    """

    def __init__(self, bounds: Sequence[int], weights: Sequence[float]) -> None:
        if len(bounds) != len(weights) + 1 or list(bounds) != sorted(set(bounds)) or bounds[0] != 0:
            raise UserError(
                f"model.diffusion.timestep_law.bounds={list(bounds)} must be increasing timesteps "
                f"from 0, one more than the {len(weights)} weights."
            )
        if min(weights) < 0 or sum(weights) <= 0:
            raise UserError(
                f"model.diffusion.timestep_law.weights={list(weights)} must be non-negative and "
                "not all zero."
            )
        self.bounds = torch.tensor(bounds, dtype=torch.float64)
        cumulative = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        self.cumulative = cumulative / cumulative[-1].clone()

    @property
    def num_timesteps(self) -> int:
        """One more than the largest timestep that can be drawn."""
        return int(self.bounds[-1])

    def __call__(self, uniform: Tensor) -> Tensor:
        """Turn uniforms in [0, 1), shape [R], into timesteps (int64, [R]) by the inverse c.d.f."""
        u = uniform.double().cpu()
        interval = torch.searchsorted(self.cumulative, u, right=True)
        interval = interval.clamp(max=len(self.cumulative) - 1)
        above = self.cumulative[interval]
        below = torch.where(interval > 0, self.cumulative[(interval - 1).clamp(min=0)], 0.0)
        low, high = self.bounds[interval], self.bounds[interval + 1]
        t = low + ((u - below) / (above - below) * (high - low)).floor()
        return t.clamp(max=high - 1).long().to(uniform.device)


class Diffusion:
    """A variance-preserving diffusion with T discrete timesteps (Ho et al. 2020, eq. 4).

    ``x = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise``. The network predicts the noise ("epsilon"),
    the velocity ("v_prediction", Salimans and Ho 2022) or the clean image ("sample").

    Args:
        prediction: what the network predicts, in diffusers' words.
        timestep_law: the law of t in training; its last bound is T.
        beta_schedule: a schedule of ``diffusers.DDPMScheduler``.
    """

    def __init__(
        self,
        prediction: Prediction,
        timestep_law: TimestepLaw,
        beta_schedule: str = "squaredcos_cap_v2",
    ) -> None:
        one_of("model.diffusion.prediction", prediction, get_args(Prediction))
        self.prediction = prediction
        self.timestep_law = timestep_law
        self.schedule = DDPMScheduler(
            num_train_timesteps=timestep_law.num_timesteps,
            beta_schedule=beta_schedule,
            prediction_type=prediction,
        )

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each [R,1,1,1]."""
        alpha_bar = self.schedule.alphas_cumprod.to(like.device)[t].to(like.dtype)
        alpha_bar = alpha_bar.view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def diffuse(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy image x at timestep t (int64 [R]); all images [R,C,H,W]."""
        signal, noise_scale = self._scales(t, x0)
        return signal * x0 + noise_scale * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network would predict, [R,C,H,W]."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        signal, noise_scale = self._scales(t, x0)
        return signal * noise - noise_scale * x0

    def to_x0(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The clean image that a network output stands for, [R,C,H,W]; not clamped."""
        signal, noise_scale = self._scales(t, x)
        if self.prediction == "epsilon":
            return (x - noise_scale * prediction) / signal
        if self.prediction == "sample":
            return prediction
        return signal * x - noise_scale * prediction

    def row_loss(self, net: nn.Module) -> RowLoss:
        """The training loss of each row, never reduced over rows: mean squared error per pixel.

        Returns:
            A function of x0 [R,C,H,W], noise [R,C,H,W], t int64 [R], y int64 [R] that gives
            losses [R]. No weight corrects for the timestep law: the law is the weighting.
        """

        def loss(x0: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
            x = self.diffuse(x0, noise, t)
            prediction = net(x, t, class_labels=y, return_dict=False)[0]
            error = F.mse_loss(prediction, self.target(x0, noise, t), reduction="none")
            return error.flatten(1).mean(1)

        return loss

    def denoiser(self, net: nn.Module, y: Tensor) -> Denoiser:
        """The denoiser of class labels y (int64 [R]): ``(x, t) -> x0``, clamped to [-1, 1]."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            prediction = net(x, t, class_labels=y, return_dict=False)[0]
            return self.to_x0(prediction, x, t).clamp(-1, 1)

        return denoise


def guided(conditional: Denoiser, unconditional: Denoiser, guidance: float) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022): extrapolate away from the unconditional x0.

    Args:
        guidance: 0 gives the conditional denoiser back, larger values exaggerate the class.
    """
    if guidance == 0:
        return conditional

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        x0 = conditional(x, t)
        return (x0 + guidance * (x0 - unconditional(x, t))).clamp(-1, 1)

    return denoise
