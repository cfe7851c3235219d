"""The law of the training timestep."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dp_synth.errors import UserError


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
