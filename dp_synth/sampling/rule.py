"""The calling convention of step rules: how a sampler gets from one noise level to the next."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_synth.process import Denoiser, Process

Streams = list[torch.Generator]


@dataclass
class Rule(ABC):
    """A step rule; its fields are the options that users type as ``sampler.<field>``."""

    @abstractmethod
    def __call__(
        self,
        denoise: Denoiser,
        noise: Tensor,
        process: Process,
        timesteps: Tensor,
        streams: Streams,
    ) -> Tensor:
        """Turn noise into images.

        Args:
            denoise: ``(x [R,C,H,W], t [R]) -> x0``, guided and thresholded already.
            noise: standard normal, [R,C,H,W].
            process: the diffusion that is reversed.
            timesteps: the ones to visit, float64, falling, [steps].
            streams: the noise stream of each row, for rules that add noise.

        Returns:
            Images in [-1, 1], [R,C,H,W], as far as the denoiser's are.
        """

    def network_calls(self, steps: int) -> int:
        """How often the denoiser is called."""
        return steps
