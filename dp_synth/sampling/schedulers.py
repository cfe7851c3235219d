"""Step rules that are schedulers of diffusers, run by one loop."""

import inspect
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from dp_synth.checks import fraction, one_of
from dp_synth.process import Denoiser, Process
from dp_synth.sampling.rule import Rule, Streams


class SchedulerRule(Rule):
    """A rule that is one of diffusers' schedulers."""

    @abstractmethod
    def scheduler(self, **settings: Any) -> Any:
        """A new scheduler with these settings and the rule's own."""

    def step_options(self) -> dict[str, Any]:
        """What the scheduler's ``step`` takes beside prediction, timestep, image and generator."""
        return {}

    def __call__(
        self,
        denoise: Denoiser,
        noise: Tensor,
        process: Process,
        timesteps: Tensor,
        streams: Streams,
    ) -> Tensor:
        """Run the scheduler; a new one, as multi-step schedulers remember earlier predictions."""
        # The scheduler's whole schedule is the levels to visit; "trailing" then visits every one.
        # Left to choose among all T, schedulers of diffusers visit whole timesteps alone: they tell
        # the network a level beside the one they compute with ("karras"), and DDIM's steps miss the
        # next timestep where T / steps is not whole.
        scheduler = self.scheduler(
            num_train_timesteps=len(timesteps),
            prediction_type="sample",
            timestep_spacing="trailing",
        )
        sigmas = process.sigma(timesteps, torch.float64)
        # Set, as betas cannot hold them: 1 - beta of a step over many levels is 0 in float32.
        scheduler.alphas_cumprod = 1 / (1 + sigmas.flip(0).square())
        scheduler.set_timesteps(len(timesteps))
        options = self.step_options()
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = streams
        x = noise
        ours = timesteps.to(noise.device, torch.float32)
        for index, t in zip(scheduler.timesteps, ours, strict=True):
            x0 = denoise(scheduler.scale_model_input(x, index), t.expand(len(x)))
            x = scheduler.step(x0, index, x, **options).prev_sample
        return x


@dataclass
class DDPM(SchedulerRule):
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2): stochastic, slow."""

    def scheduler(self, **settings: Any) -> DDPMScheduler:
        """DDPM's, which clips predictions unless told otherwise: that is thresholding's."""
        return DDPMScheduler(clip_sample=False, **settings)


@dataclass
class DDIM(SchedulerRule):
    """Song et al. 2021 (arXiv 2010.02502), eq. 12: first order.

    Attributes:
        eta: 0 is deterministic, 1 as stochastic as DDPM.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        self.eta = fraction("sampler.eta", self.eta)

    def scheduler(self, **settings: Any) -> DDIMScheduler:
        """DDIM's, which clips predictions unless told otherwise: that is thresholding's."""
        return DDIMScheduler(clip_sample=False, **settings)

    def step_options(self) -> dict[str, Any]:
        """``eta``."""
        return {"eta": self.eta}


Algorithm = Literal["dpmsolver++", "sde-dpmsolver++"]


@dataclass
class DPMSolver(SchedulerRule):
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, multi-step.

    Attributes:
        algorithm: "dpmsolver++" is deterministic; "sde-dpmsolver++" adds noise in every step.
    """

    algorithm: Algorithm = "dpmsolver++"

    def __post_init__(self) -> None:
        one_of("sampler.algorithm", self.algorithm, get_args(Algorithm))

    def scheduler(self, **settings: Any) -> DPMSolverMultistepScheduler:
        """DPM-Solver's; order 2 is its default."""
        return DPMSolverMultistepScheduler(algorithm_type=self.algorithm, **settings)


@dataclass
class UniPC(SchedulerRule):
    """UniPC (Zhao et al. 2023, arXiv 2302.04867): predictor and corrector, multi-step."""

    def scheduler(self, **settings: Any) -> UniPCMultistepScheduler:
        """UniPC's; order 2 is its default."""
        return UniPCMultistepScheduler(**settings)
