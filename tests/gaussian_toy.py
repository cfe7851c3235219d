"""A Gaussian law of images, whose perfect denoiser and whose reverse process are known."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class GaussianLaw:
    """Images [1,2,2] from N(mean, axes diag(stds^2) axes^T); float64."""

    mean: Tensor  # [4]
    stds: Tensor  # [4]
    axes: Tensor  # [4,4], orthonormal columns

    def denoiser(self, process):
        """E[x0 | x], in the convention of ``process.denoiser``."""

        def denoise(x, t):
            sigma = process.sigma(t, torch.float64).view(-1, 1)
            seen = x.double().flatten(1) * (1 + sigma**2).sqrt()
            share = self.stds**2 / (self.stds**2 + sigma**2)
            x0 = self.mean + share * ((seen - self.mean) @ self.axes) @ self.axes.T
            return x0.view_as(x).to(x.dtype)

        return denoise

    def limit(self, seen, highest, lowest):
        """Where infinitely many steps end, of an image plus ``highest`` sigmas of noise, [R,4].

        Along each axis the flow scales distances from the mean as the standard deviation of the
        noisy image; the step below the lowest level ends in the mean of what may have been there.
        """
        spread = [(self.stds**2 + sigma**2).sqrt() for sigma in (highest, lowest)]
        scale = spread[1] / spread[0] * self.stds**2 / spread[1] ** 2
        return self.mean + scale * ((seen - self.mean) @ self.axes) @ self.axes.T


def correlated_law(stds=(0.05, 0.1, 0.25, 0.5)):
    """Standard deviations along axes that are no pixel's own."""
    mean = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    gaussian = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    axes, _ = torch.linalg.qr(gaussian)
    return GaussianLaw(mean, torch.tensor(stds, dtype=torch.float64), axes)


def drawn_law(law, sampler, process, rows=10000):
    """Mean [4] and covariance [4,4], along the law's axes, of what a sampler draws.

    A deterministic rule is affine here: the images of no noise and of unit vectors tell its law
    exactly. Of a stochastic one, ``rows`` images are drawn, from one stream.
    """
    timesteps = sampler.spacing.timesteps(process, sampler.steps)
    generator = torch.Generator().manual_seed(0)
    if is_stochastic(sampler):
        noise = torch.randn(rows, 4, generator=generator)
    else:
        noise = torch.cat([torch.zeros(1, 4), torch.eye(4)])
    x = sampler.rule(
        law.denoiser(process), noise.double().view(-1, 1, 2, 2), process, timesteps, generator
    )
    x = x.flatten(1) @ law.axes
    if is_stochastic(sampler):
        return law.axes @ x.mean(0), torch.cov(x.T)
    pushed = x[1:] - x[0]
    return law.axes @ x[0], pushed.T @ pushed


def is_stochastic(sampler):
    """Whether the rule adds noise on its way."""
    described = sampler.describe()
    return (
        described["rule"] == "ddpm"
        or described.get("eta", 0) > 0
        or described.get("algorithm") == "sde-dpmsolver++"
        or described.get("churn", 0) > 0
    )
