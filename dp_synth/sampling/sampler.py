"""The sampler: labels and noise in, images out, by one of the step rules."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from diffusers import UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from tqdm.auto import tqdm

from dp_synth.checks import count, one_of
from dp_synth.data.images import Images
from dp_synth.data.pixels import to_uint8
from dp_synth.errors import UserError
from dp_synth.formats import FORMATS
from dp_synth.process import Denoiser, Process
from dp_synth.sampling.guidance import Guidance
from dp_synth.sampling.labels import POLICIES, Policy, cyclic, proportional
from dp_synth.sampling.rules import make_rule
from dp_synth.sampling.spacing import Spacing
from dp_synth.sampling.streams import NUM_STREAMS, noise_streams
from dp_synth.sampling.thresholding import Thresholding

PRECISIONS = ("auto", "32-true", "bf16")

Pixels = npt.NDArray[np.uint8]


class Sampler:
    """Draws labelled images from a class-conditional model.

    Image i of a seed has its label, its noise and so its pixels whatever else is drawn with it, up
    to the rounding of a network whose batches differ in size.

    Args:
        rule: the step rule, a name in ``rules.RULES``.
        steps: noise levels to visit.
        num_images: images to draw.
        spacing, rho: which levels, see ``spacing.Spacing``.
        labels: "uniform": every class equally often; "dp_histogram": by the noised shares of the
            private training split, a query that the run's plan must hold.
        guidance, guidance_interval: see ``guidance.Guidance``.
        thresholding, percentile: see ``thresholding.Thresholding``.
        batch_size: images per network call.
        format, shard_size: how ``dp_synth.sample`` stores the images; shard_size None: by their
            size in memory.
        precision, compile, channels_last: how it runs the network; "auto": as is fastest here.
        options: the step rule's own.

    Raises:
        UserError: a value out of range, or one that the others leave without meaning.
    """

    def __init__(
        self,
        rule: str,
        steps: int,
        num_images: int,
        spacing: str = "log_snr",
        rho: float | None = None,
        labels: Policy = "uniform",
        guidance: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
        thresholding: str = "static",
        percentile: float | None = None,
        batch_size: int = 500,
        format: str = "png",
        shard_size: int | None = None,
        precision: str = "auto",
        compile: bool | Literal["auto"] = "auto",
        channels_last: bool | Literal["auto"] = "auto",
        **options: Any,
    ) -> None:
        self.rule_name = rule
        self.rule = make_rule(rule, options)
        self.steps = count("sampler.steps", steps)
        self.spacing = Spacing(spacing, rho)
        self.guidance = Guidance(guidance, guidance_interval)
        self.thresholding = Thresholding(thresholding, percentile)
        self.num_images = count("sampler.num_images", num_images)
        if num_images > NUM_STREAMS:
            raise UserError(
                f"sampler.num_images={num_images} is more than a seed has streams of noise; draw "
                f"{NUM_STREAMS} at most, and others with another seed."
            )
        one_of("sampler.labels", labels, POLICIES)
        self.labels = labels
        self.batch_size = count("sampler.batch_size", batch_size)
        one_of("sampler.format", format, tuple(FORMATS))
        self.format = format
        self.shard_size = None if shard_size is None else count("sampler.shard_size", shard_size)
        one_of("sampler.precision", precision, PRECISIONS)
        self.precision = precision
        self.compile = _switch("sampler.compile", compile)
        self.channels_last = _switch("sampler.channels_last", channels_last)

    @property
    def network_calls(self) -> int:
        """Network calls per image; where guidance has an interval, as many as if it had none."""
        return self.rule.network_calls(self.steps) * (2 if self.guidance.strength else 1)

    def describe(self) -> dict[str, Any]:
        """What decides the images beside network, seed and number, as plain values for cards."""
        return {
            "rule": self.rule_name,
            **{key: _plain(value) for key, value in asdict(self.rule).items()},
            "steps": self.steps,
            **self.spacing.describe(),
            **self.guidance.describe(),
            **self.thresholding.describe(),
            "labels": self.labels,
        }

    def labels_of(self, num_classes: int, shares: Sequence[float] | None = None) -> Tensor:
        """The label of every image, int64 [num_images].

        Args:
            num_classes: 1 or more.
            shares: of each class, summing to 1; None: labels cycle through the classes.
        """
        if shares is None:
            return cyclic(self.num_images, num_classes)
        return proportional(self.num_images, shares)

    @torch.no_grad()
    def draw(
        self, net: UNet2DModel, process: Process, labels: Tensor, first: int, seed: int
    ) -> Pixels:
        """Draw one batch: images number ``first``, ``first + 1``, ... of a seed.

        Args:
            net: in evaluation mode; or what is called like it and has its ``config`` and
                ``device``. Its label table ends with the row for "no label".
            process: the one that it was trained to reverse.
            labels: of these images, int64 [R].
            first: number of the first one.
            seed: public.

        Returns:
            uint8 [R,H,W,C].
        """
        streams = noise_streams(seed, range(first, first + len(labels)))
        shape = (len(labels), net.config.in_channels, *net.config.sample_size)
        noise = randn_tensor(shape, generator=streams, device=net.device)
        denoise = self._denoiser(net, process, labels.to(net.device))
        timesteps = self.spacing.timesteps(process, self.steps)
        return to_uint8(self.rule(denoise, noise, process, timesteps, streams))

    def __call__(
        self,
        net: UNet2DModel,
        process: Process,
        classes: tuple[str, ...],
        seed: int,
        what: str | None = "sampling",
        shares: Sequence[float] | None = None,
    ) -> Images:
        """Draw all images into memory.

        Args:
            net: as for ``draw``, in any mode.
            process: as for ``draw``.
            classes: class names in label order.
            seed: public.
            what: caption of the progress bar; None: no bar.
            shares: as for ``labels_of``.
        """
        labels = self.labels_of(len(classes), shares)
        pixels: list[Pixels] = []
        was_training = net.training
        net.eval()
        with tqdm(total=self.num_images, desc=what, unit="image", disable=what is None) as bar:
            for first in range(0, self.num_images, self.batch_size):
                y = labels[first : first + self.batch_size]
                pixels.append(self.draw(net, process, y, first, seed))
                bar.update(len(y))
        net.train(was_training)
        return Images(np.concatenate(pixels), labels.numpy(), classes)

    def _denoiser(self, net: UNet2DModel, process: Process, y: Tensor) -> Denoiser:
        """The network as the step rule sees it: guided, then thresholded."""
        no_label = torch.full_like(y, net.config.num_class_embeds - 1)
        conditional, unconditional = process.denoiser(net, y), process.denoiser(net, no_label)
        return self.thresholding(self.guidance(conditional, unconditional, process))


def _switch(key: str, value: Any) -> bool | Literal["auto"]:
    """The value; UserError unless it is true, false or auto."""
    if value != "auto" and not isinstance(value, bool):
        raise UserError(f"{key}={value!r} must be true, false or auto.")
    return value


def _plain(value: Any) -> Any:
    """A tuple as the list that YAML and JSON have for it."""
    return list(value) if isinstance(value, tuple) else value
