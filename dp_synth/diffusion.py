"""The parameterisation of DDPM: the network predicts noise, velocity or image at discrete timesteps."""

from typing import Literal, get_args

from diffusers import DDPMScheduler
from torch import Tensor

from dp_synth.checks import one_of
from dp_synth.errors import UserError
from dp_synth.process import Process
from dp_synth.timestep_law import TimestepLaw

Prediction = Literal["eps", "v", "x0"]

# What diffusers calls them.
PREDICTION_TYPES: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


class Diffusion(Process):
    """A diffusion with T discrete timesteps in training (Ho et al. 2020, arXiv 2006.11239).

    Args:
        prediction: what the network predicts: the noise ("eps"), the velocity ("v", Salimans and
            Ho 2022, arXiv 2202.00512) or the clean image ("x0").
        timestep_law: the law of t in training; its last bound is T.
        beta_schedule: a schedule of ``diffusers.DDPMScheduler``.

    Raises:
        UserError: an unknown prediction or schedule, or fewer than two timesteps.
    """

    def __init__(
        self,
        prediction: Prediction,
        timestep_law: TimestepLaw,
        beta_schedule: str = "squaredcos_cap_v2",
    ) -> None:
        one_of("model.diffusion.prediction", prediction, get_args(Prediction))
        one_of("model.diffusion.beta_schedule", beta_schedule, BETA_SCHEDULES)
        if timestep_law.num_timesteps < 2:
            raise UserError(
                f"model.diffusion.timestep_law.bounds={timestep_law.bounds.long().tolist()} ends "
                "with one timestep; a diffusion takes at least 2."
            )
        self.prediction = prediction
        self.timestep_law = timestep_law
        self.beta_schedule = beta_schedule
        schedule = DDPMScheduler(
            num_train_timesteps=timestep_law.num_timesteps,
            beta_schedule=beta_schedule,
            prediction_type=PREDICTION_TYPES[prediction],
        )
        alpha_bar = schedule.alphas_cumprod.double()
        super().__init__(schedule, ((1 - alpha_bar) / alpha_bar).sqrt())

    def draw_t(self, uniform: Tensor) -> Tensor:
        """Turn uniforms in [0, 1), shape [R], into timesteps, int64 [R], by ``timestep_law``."""
        return self.timestep_law(uniform)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise, the velocity or the clean image, [R,C,H,W]."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x0
        signal, noise_scale = self._scales(t, x0)
        return signal * noise - noise_scale * x0

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The clean image that a network output stands for, [R,C,H,W]."""
        signal, noise_scale = self._scales(t, x)
        if self.prediction == "eps":
            return (x - noise_scale * output) / signal
        if self.prediction == "x0":
            return output
        return signal * x - noise_scale * output

    def network_input(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy image and its timestep, as they are."""
        return x, t

    def pipeline_scheduler(self) -> DDPMScheduler:
        """DDPM's own, which knows the prediction."""
        return self.schedule
