"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), at all or some noise levels."""

from typing import Any

from torch import Tensor

from dp_synth.checks import not_negative
from dp_synth.errors import UserError
from dp_synth.process import Denoiser, Process
from dp_synth.sampling.levels import levels


class Guidance:
    """Extrapolates away from what the network would paint without a label.

    ``x0 = conditional + strength * (conditional - unconditional)``.

    Args:
        strength: 0 is off, larger values exaggerate the class.
        interval: noise levels [low, high] at which to guide; None: all. At the others the network
            is not called without a label (Kynkaanniemi et al. 2024, arXiv 2404.07724, who find
            that guidance harms at high levels and does nothing at low ones).

    Raises:
        UserError: a value out of range, or an interval of no guidance.
    """

    def __init__(self, strength: float, interval: Any = None) -> None:
        self.strength = not_negative("sampler.guidance", strength)
        self.interval = levels("sampler.guidance_interval", interval)
        if self.interval is not None and self.strength == 0:
            raise UserError(
                f"sampler.guidance_interval={list(self.interval)} has no meaning without guidance; "
                "set sampler.guidance, such as to 1."
            )

    def describe(self) -> dict[str, Any]:
        """What decides the images, as plain values."""
        interval = {} if self.interval is None else {"guidance_interval": list(self.interval)}
        return {"guidance": self.strength, **interval}

    def __call__(
        self, conditional: Denoiser, unconditional: Denoiser, process: Process
    ) -> Denoiser:
        """The guided denoiser, of rows that are all at one timestep.

        Args:
            conditional: the denoiser with its labels.
            unconditional: the denoiser without.
            process: tells the noise level of a timestep.
        """
        if self.strength == 0:
            return conditional

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            x0 = conditional(x, t)
            if self.interval is not None and not self.interval.hold(float(process.sigma(t[0]))):
                return x0
            return x0 + self.strength * (x0 - unconditional(x, t))

        return denoise
