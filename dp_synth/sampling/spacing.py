"""Which noise levels a sampler visits."""

from typing import Any

import torch
from torch import Tensor

from dp_synth.checks import one_of, positive
from dp_synth.errors import UserError
from dp_synth.process import Process

EVEN_IN = ("log_snr", "karras", "leading", "linspace", "trailing")
_KARRAS_RHO = 7.0

# Above it an image is less than an 80th of what one sees (Karras et al. 2022, Table 1). The cosine
# schedule's last level is 20,000: a ladder up to there would spend half of its steps on pure noise.
_HIGHEST_SIGMA = 80.0


class Spacing:
    """Spaces noise levels evenly in some function of sigma or of the timestep t, one of T.

    - "log_snr": in log sigma, from the highest level, at most 80, to the lowest (Lu et al. 2022,
      arXiv 2206.00927, section 3.4).
    - "karras": in sigma^(1 / rho) between the same (Karras et al. 2022, arXiv 2206.00364, eq. 5).
    - "leading", "linspace", "trailing": in t from T - T / steps to 0, from T - 1 to 0, from T - 1
      to T / steps - 1 (Lin et al. 2024, arXiv 2305.08891, Table 2).

    Timesteps need not be whole, so that any number of levels is evenly spaced.

    Args:
        name: one of these.
        rho: of "karras"; larger values put more levels near the lowest; None: 7.

    Raises:
        UserError: an unknown name, a rho out of range or of another spacing.
    """

    def __init__(self, name: str, rho: float | None = None) -> None:
        one_of("sampler.spacing", name, EVEN_IN)
        self.name = name
        if rho is not None and name != "karras":
            raise UserError(
                f"sampler.rho={rho} has no meaning for sampler.spacing={name}; leave it out, or "
                "set sampler.spacing=karras."
            )
        self.rho = _KARRAS_RHO if rho is None else positive("sampler.rho", rho)

    def describe(self) -> dict[str, Any]:
        """What decides the images, as plain values."""
        return {"spacing": self.name, **({"rho": self.rho} if self.name == "karras" else {})}

    def timesteps(self, process: Process, steps: int) -> Tensor:
        """The timesteps of the levels, float64, falling, [steps]."""
        count = process.num_timesteps
        last, gap = count - 1, max(1, count / steps)
        if self.name == "leading":
            return _evenly(count - gap, 0, steps)
        if self.name == "linspace":
            return _evenly(last, 0, steps)
        if self.name == "trailing":
            return _evenly(last, gap - 1, steps)
        ends = process.sigma(torch.tensor([last, 0]), torch.float64).clamp(max=_HIGHEST_SIGMA)
        if self.name == "log_snr":
            high, low = ends.log().tolist()
            return process.timestep(_evenly(high, low, steps).exp())
        high, low = ends.pow(1 / self.rho).tolist()
        return process.timestep(_evenly(high, low, steps).pow(self.rho))


def _evenly(first: float, last: float, steps: int) -> Tensor:
    """Numbers from the first to the last, float64, [steps]; one alone is the first."""
    return torch.linspace(first, last, steps, dtype=torch.float64)
