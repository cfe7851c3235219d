"""A sampler is a function (denoiser, noise) -> images; the step rules are diffusers' schedulers."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from dp_synth.checks import count, not_negative, one_of
from dp_synth.data.images import Images
from dp_synth.data.pixels import to_uint8
from dp_synth.diffusion import Denoiser, Diffusion, guided


def integrate(
    denoise: Denoiser, noise: Tensor, scheduler: Any, steps: int, generator: torch.Generator
) -> Tensor:
    """Run the reverse process with a diffusers scheduler.

    Args:
        denoise: ``(x [R,C,H,W], t [R]) -> x0``.
        noise: standard normal, [R,C,H,W].
        scheduler: a diffusers scheduler configured with ``prediction_type="sample"``.
        steps: network evaluations (twice as many less one for second-order schedulers).
        generator: for schedulers that add noise.

    Returns:
        Images in [-1, 1], [R,C,H,W].
    """
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise * scheduler.init_noise_sigma
    # Only stochastic rules take a generator; a deterministic one would reject the argument.
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x0 = denoise(scaled, t.long().expand(len(x)))
        x = scheduler.step(x0, t, x, **extra).prev_sample
    return x.clamp(-1, 1)


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to shares, that sum to ``total``: the largest remainders get more.

    Args:
        total: 0 or more.
        shares: each 0 or more, summing to 1.
    """
    exact = total * np.asarray(shares, dtype=np.float64)
    counts = np.floor(exact).astype(np.int64)
    largest_first = np.argsort(counts - exact, kind="stable")
    counts[largest_first[: total - counts.sum()]] += 1
    return counts.tolist()


LABELS = ("uniform", "dp_histogram")


class Sampler:
    """Draws labelled images from a class-conditional model.

    Args:
        scheduler: ``from_config`` of a diffusers scheduler, its own options already applied; it is
            called with the training schedule.
        steps: number of inference steps.
        num_images: images to draw.
        labels: "uniform": every class equally often; "dp_histogram": by the noised shares of the
            private training split, a query that the run's plan must hold.
        guidance: classifier-free guidance strength; 0 is off.
        batch_size: images per network call.

    Raises:
        UserError: a value out of range, naming its key.
    """

    def __init__(
        self,
        scheduler: Callable[..., Any],
        steps: int,
        num_images: int,
        labels: str = "uniform",
        guidance: float = 0.0,
        batch_size: int = 500,
    ) -> None:
        self.scheduler = scheduler
        self.steps = count("sampler.steps", steps)
        self.num_images = count("sampler.num_images", num_images)
        self.batch_size = count("sampler.batch_size", batch_size)
        self.guidance = not_negative("sampler.guidance", guidance)
        one_of("sampler.labels", labels, LABELS)
        self.labels = labels

    @torch.no_grad()
    def __call__(
        self,
        net: UNet2DModel,
        diffusion: Diffusion,
        classes: tuple[str, ...],
        seed: int,
        what: str | None = "sampling",
        shares: Sequence[float] | None = None,
    ) -> Images:
        """Draw ``num_images`` labelled images.

        Args:
            net: the trained network; its label table ends with the row for "no label".
            classes: class names in label order.
            seed: public; the same seed and batch size give the same images.
            what: caption of the progress bar; None: no bar.
            shares: of each class, summing to 1; None: labels cycle through the classes.
        """
        device = next(net.parameters()).device
        shape = (net.config.in_channels, *net.config.sample_size)
        if shares is None:
            labels = torch.arange(self.num_images) % len(classes)
        else:
            labels = torch.arange(len(classes)).repeat_interleave(
                torch.tensor(apportion(self.num_images, shares))
            )
        generator = torch.Generator(device).manual_seed(seed)
        pixels = []
        was_training = net.training
        net.eval()
        bar = tqdm(total=self.num_images, desc=what, unit="image", disable=what is None)
        with bar as progress:
            for y in labels.split(self.batch_size):
                y = y.to(device)
                denoise = guided(
                    diffusion.denoiser(net, y),
                    diffusion.denoiser(net, torch.full_like(y, len(classes))),
                    self.guidance,
                )
                noise = torch.randn(len(y), *shape, device=device, generator=generator)
                # A fresh one per batch: multi-step schedulers remember earlier network outputs.
                scheduler = self.scheduler(diffusion.schedule.config, prediction_type="sample")
                x = integrate(denoise, noise, scheduler, self.steps, generator)
                pixels.append(to_uint8(x))
                progress.update(len(y))
        net.train(was_training)
        return Images(np.concatenate(pixels), labels.numpy(), classes)
