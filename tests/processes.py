"""Every parameterisation, and what a Gaussian law of images makes of each in textbook formulas."""

import torch
from conftest import tiny_diffusion
from torch import nn

from dp_synth.edm import EDM

MEAN, STD = 0.3, 0.4  # of every pixel of the Gaussian law
PREDICTIONS = ("eps", "v", "x0")
NAMES = (*PREDICTIONS, "edm", "edm of unit data")


def tiny_edm(**settings):
    """EDM as the paper has it, with few levels."""
    paper = {"sigma_data": 0.5, "p_mean": -1.2, "p_std": 1.2, "rho": 7.0}
    ladder = {"sigma_min": 0.002, "sigma_max": 80.0, "num_timesteps": 50}
    return EDM(**(paper | ladder | settings))


def process(name):
    """The process of a name in NAMES, of 50 timesteps."""
    if name in PREDICTIONS:
        return tiny_diffusion(name)
    return tiny_edm(sigma_data=1.0 if name == "edm of unit data" else 0.5)


def rows_over_time(rows=7, seed=0, dtype=torch.float64, timesteps=50):
    """Images, noise, and timesteps from the first to the last, the inner ones between levels."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(rows, 1, 4, 4, generator=generator).to(dtype) for _ in range(2))
    return x0, noise, torch.linspace(0, timesteps - 1, rows, dtype=dtype)


def column(values):
    """One number per row, to be multiplied with images."""
    return values.view(-1, 1, 1, 1)


class GaussianOracle(nn.Module):
    """The network that no other beats on pixels from N(MEAN, STD^2), written as papers have it.

    Args:
        name: of the process.
        process: told by it are noise levels alone.
        added: (constant, slope): an error to make, in the output.
    """

    def __init__(self, name, process, added=(0.0, 0.0)):
        super().__init__()
        self.name, self.process, self.added = name, process, added

    def forward(self, shown, time, class_labels, return_dict):
        constant, slope = self.added
        return (self.best(shown, time) + constant + slope * shown,)

    def best(self, shown, time):
        if self.name not in PREDICTIONS:
            return self.best_of_edm(shown, time)
        sigma = column(self.process.sigma(time, torch.float64))
        alpha, scale = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        x0 = posterior_mean(shown / alpha, sigma)
        noise = (shown - alpha * x0) / scale
        return {"x0": x0, "eps": noise, "v": alpha * noise - scale * x0}[self.name]

    def best_of_edm(self, shown, time):
        """Karras et al. 2022, Table 1, solved for F."""
        data = self.process.sigma_data
        sigma = column((4 * time).exp())
        c_skip = data**2 / (sigma**2 + data**2)
        c_out = sigma * data / (sigma**2 + data**2).sqrt()
        c_in = 1 / (sigma**2 + data**2).sqrt()
        noisy = shown / c_in
        return (posterior_mean(noisy, sigma) - c_skip * noisy) / c_out


def posterior_mean(noisy, sigma):
    """E[x0 | x0 + sigma noise] where x0 is N(MEAN, STD^2)."""
    return MEAN + STD**2 / (STD**2 + sigma**2) * (noisy - MEAN)
