"""The parameterisation of EDM (Karras et al. 2022, arXiv 2206.00364, Table 1 and section 5)."""

import numpy as np
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from torch import Tensor

from dp_synth.checks import count, finite, positive
from dp_synth.errors import UserError
from dp_synth.process import Process

# Relative error of a noise level that samplers may see: schedulers of diffusers keep abar in float32,
# which costs 0.4 % at the lowest level of the paper's ladder with 1000 timesteps.
_LEVEL_ERROR = 0.05


class EDM(Process):
    """A preconditioned denoiser, trained at log-normal noise levels.

    ``D(x0 + sigma noise) = c_skip (x0 + sigma noise) + c_out F(c_in (x0 + sigma noise), c_noise)``,
    where F is the network and the c are functions of sigma that give its input and its target
    unit variance. The loss, F's mean squared error, is the paper's ``lambda(sigma) |D - x0|^2``.

    Timesteps are levels of the paper's sampling ladder (eq. 5), and in training numbers between
    them: a level that is drawn beyond the ladder's ends, where no sampler goes, is that end.

    Args:
        sigma_data: standard deviation of the images' pixels in [-1, 1].
        p_mean: mean of ln sigma in training.
        p_std: standard deviation of ln sigma in training.
        sigma_min: lowest noise level.
        sigma_max: highest noise level.
        rho: how the ladder is bent; larger values give low levels more timesteps.
        num_timesteps: levels of the ladder.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        sigma_data: float,
        p_mean: float,
        p_std: float,
        sigma_min: float,
        sigma_max: float,
        rho: float,
        num_timesteps: int,
    ) -> None:
        self.sigma_data = positive("model.diffusion.sigma_data", sigma_data)
        self.p_mean = finite("model.diffusion.p_mean", p_mean)
        self.p_std = positive("model.diffusion.p_std", p_std)
        self.sigma_min = positive("model.diffusion.sigma_min", sigma_min)
        self.sigma_max = positive("model.diffusion.sigma_max", sigma_max)
        self.rho = positive("model.diffusion.rho", rho)
        if count("model.diffusion.num_timesteps", num_timesteps) < 2:
            raise UserError("model.diffusion.num_timesteps=1 is too few; a ladder has at least 2.")
        if self.sigma_min >= self.sigma_max:
            raise UserError(
                f"model.diffusion.sigma_min={sigma_min} must be below "
                f"model.diffusion.sigma_max={sigma_max}."
            )
        sigmas = self._ladder(num_timesteps)
        schedule = _schedule(sigmas)
        if not np.allclose(_levels(schedule), sigmas, rtol=_LEVEL_ERROR, atol=0):
            raise UserError(
                f"model.diffusion.sigma_min={sigma_min} with num_timesteps={num_timesteps} is finer "
                "than the float32 of diffusers' schedulers; 0.002 with 1000 would work."
            )
        super().__init__(schedule, torch.from_numpy(sigmas))

    def draw_t(self, uniform: Tensor) -> Tensor:
        """Turn uniforms in [0, 1), shape [R], into float timesteps [R], log-normal in sigma."""
        # In float64 a uniform of 0 is the lowest level and one next to 1 the highest.
        log_sigma = self.p_mean + self.p_std * torch.special.ndtri(uniform.double().cpu())
        return self.timestep(log_sigma.exp()).float().to(uniform.device)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``(x0 - c_skip (x0 + sigma noise)) / c_out``, [R,C,H,W], written without cancellation."""
        sigma = self._sigma_like(t, x0)
        image, noise_share = sigma / self.sigma_data * x0, self.sigma_data * noise
        return (image - noise_share) * self._c_in(sigma)

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The denoised image D, [R,C,H,W]."""
        sigma = self._sigma_like(t, x)
        c_skip = (self.sigma_data * self._c_in(sigma)).square()
        c_out = sigma * self.sigma_data * self._c_in(sigma)
        return c_skip * (1 + sigma.square()).sqrt() * x + c_out * output

    def network_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``c_in (x0 + sigma noise)``, and c_noise."""
        sigma = self._sigma_like(t, x)
        c_noise = sigma.flatten().log() / 4
        return self._c_in(sigma) * (1 + sigma.square()).sqrt() * x, c_noise

    def pipeline_scheduler(self) -> EDMEulerScheduler:
        """EDM's Euler rule, whose "epsilon" is what F predicts."""
        return EDMEulerScheduler(
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            sigma_data=self.sigma_data,
            num_train_timesteps=self.num_timesteps,
            prediction_type="epsilon",
            rho=self.rho,
        )

    def _c_in(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + self.sigma_data**2).rsqrt()

    def _ladder(self, num_timesteps: int) -> np.ndarray:
        """Karras et al. 2022, eq. 5, from the lowest level up."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigmas: np.ndarray = np.linspace(low, high, num_timesteps) ** self.rho
        return sigmas


def _schedule(sigmas: np.ndarray) -> DDPMScheduler:
    """The discrete schedule whose noise levels are these, increasing, [T]."""
    alpha_bars = 1 / (1 + sigmas**2)
    betas = 1 - alpha_bars / np.concatenate([[1.0], alpha_bars[:-1]])
    return DDPMScheduler(num_train_timesteps=len(sigmas), trained_betas=betas.tolist())


def _levels(schedule: DDPMScheduler) -> np.ndarray:
    """The noise levels of a discrete schedule, [T]."""
    alpha_bars = schedule.alphas_cumprod.double().numpy()
    sigmas: np.ndarray = np.sqrt((1 - alpha_bars) / alpha_bars)
    return sigmas
