"""Classifiers of images, trained and asked for their predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from dp_synth.checks import one_of
from dp_synth.data.images import Images
from dp_synth.data.pixels import to_float
from dp_synth.errors import UserError
from dp_synth.metrics.augmentation import bend, default_shift, mirror, shift
from dp_synth.metrics.classifier_networks import Classifier, SmallCNN

Network = Callable[..., Classifier]

# What they take beside parameters, lr and weight_decay. In "adam" the decay is part of the
# gradient, in "adamw" it is apart from it (Loshchilov and Hutter 2019, arXiv 1711.05101).
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}
_DECAY = 0.2  # what a drop leaves of the learning rate


def train_classifier(
    images: Images,
    *,
    fresh: Sequence[Callable[[], Images]] = (),
    network: Network = SmallCNN,
    width: int | None = None,
    steps: int,
    batch_size: int,
    lr: float,
    optimizer: str = "adamw",
    weight_decay: float,
    label_smoothing: float,
    warmup: float = 0.1,
    drops: Sequence[float] = (),
    ema_decay: float = 0.0,
    max_shift: int | None = None,
    elastic: float = 0.0,
    flip: bool = False,
    seed: int,
    caption: str = "classifier",
    device: str | torch.device | None = None,
) -> Classifier:
    """Train a classifier on ``images`` for a fixed number of steps.

    Nothing is selected (no validation, no early stop): the classifier depends on ``images`` alone.
    On a CPU the result is a function of the arguments; the global random state is left as it was.
    No loss is shown: ``images`` may be private.

    Args:
        images: N >= 1 images; where N is less than ``batch_size`` a batch holds repeats.
        fresh: draw other images of the same shape and classes, which take the place of ``images``
            one set after another. All have an equal part of the steps; no more sets are used than
            the steps make passes over N images.
        network: shape ``(C, H, W)``, number of classes and, where it is given, ``width`` to a
            network; see ``classifier_networks``.
        width: the network's width, in its own measure; None: its default.
        steps: number of updates.
        batch_size: images in each update.
        lr: peak learning rate.
        optimizer: "adamw", "adam", or with a momentum of 0.9 "sgd" or "nesterov".
        weight_decay: of the optimizer.
        label_smoothing: share of the target spread evenly over the classes, 0..1.
        warmup: share of the steps in which the learning rate rises, 0..1.
        drops: shares of the steps after each of which the learning rate falls to a fifth; none: it
            falls to zero as a cosine.
        ema_decay: limit of the decay of the averaged weights that are returned, warmed up as
            (1 + n) / (10 + n); 0: the last weights.
        max_shift: greatest random translation each way, in pixels, edges repeated; ``None``: a
            sixteenth of the shorter side.
        elastic: standard deviation of a smooth random displacement, in pixels.
        flip: whether half of the images are mirrored left to right.
        seed: fixes initial weights, order and augmentation.
        caption: text of the progress bar.
        device: where to train; ``None``: a GPU where there is one.

    Returns:
        The trained network in evaluation mode, on ``device``.

    Raises:
        UserError: no image, no step, an empty batch, an unknown optimizer, or a side of less than
            8 pixels.
    """
    if len(images) == 0:
        raise UserError("a classifier cannot be trained on 0 images; at least 1 is needed.")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"evaluator.classifier.{name}={value} must be at least 1.")
    one_of("evaluator.classifier.optimizer", optimizer, tuple(_OPTIMIZERS))
    device = default_device(device)
    generator = torch.Generator().manual_seed(seed)
    views = partial(
        _views,
        max_shift=default_shift(*images.shape[1:]) if max_shift is None else max_shift,
        elastic=elastic,
        flip=flip,
        generator=generator,
    )
    # Dropout draws from the global generators; here they are seeded, and put back at the end.
    with seeded(seed, device):
        model = build(network, images, width).to(device).train()
        ema = EMAModel(model.parameters(), decay=ema_decay) if ema_decay > 0 else None
        updates = _OPTIMIZERS[optimizer](model.parameters(), lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            updates, lambda step: _lr_factor(step, steps, warmup, drops)
        )
        batches = _batches(images, fresh, batch_size, steps, generator)
        for batch in tqdm(batches, total=steps, desc=caption, leave=False, disable=None):
            # Floats of a batch only: those of all images may not fit into memory.
            x = views(to_float(batch.pixels).to(device))
            y = torch.tensor(batch.labels, device=device)
            loss = F.cross_entropy(model(x), y, label_smoothing=label_smoothing)
            updates.zero_grad()
            loss.backward()
            updates.step()
            schedule.step()
            if ema is not None:
                ema.step(model.parameters())
    if ema is not None:
        ema.copy_to(model.parameters())
    return model.eval()


def build(network: Network, images: Images, width: int | None = None) -> Classifier:
    """Return an untrained network for images of this shape and these classes."""
    options = {} if width is None else {"width": width}
    return network(images.shape, len(images.classes), **options)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of the CPU and of ``device``; put them back at the end."""
    # Not torch.manual_seed: it would reseed every GPU too, which this fork does not save.
    is_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if is_gpu else []):
        torch.default_generator.manual_seed(seed)
        if is_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def default_device(device: str | torch.device | None) -> torch.device:
    """Return the device that is named, or a GPU where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@torch.inference_mode()
def probabilities(
    model: nn.Module, images: Images, batch_size: int = 1024
) -> npt.NDArray[np.float32]:
    """Return class probabilities ``[N, num_classes]``, rows summing to 1; N may be 0."""
    device = next(model.parameters()).device
    starts = range(0, max(len(images), 1), batch_size)
    batches = (to_float(images.pixels[start : start + batch_size]) for start in starts)
    rows = torch.cat([model(x.to(device)).softmax(dim=1) for x in batches])
    array: npt.NDArray[np.float32] = rows.cpu().numpy()
    return array


def predict(model: nn.Module, images: Images, batch_size: int = 1024) -> npt.NDArray[np.int64]:
    """Return the most probable labels, int64 ``[N]``; N may be 0."""
    return probabilities(model, images, batch_size).argmax(axis=1).astype(np.int64)


def _lr_factor(step: int, steps: int, warmup: float, drops: Sequence[float]) -> float:
    rise = min(1.0, (step + 1) / (warmup * steps)) if warmup > 0 else 1.0
    if drops:
        return rise * _DECAY ** sum(step >= drop * steps for drop in drops)
    # LambdaLR asks for the factor once more after the last step, when step == steps.
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(
    images: Images,
    fresh: Sequence[Callable[[], Images]],
    batch_size: int,
    steps: int,
    generator: torch.Generator,
) -> Iterator[Images]:
    """Yield ``steps`` batches: of ``images``, then of each fresh set as many, as far as they go."""
    passes = math.ceil(steps * batch_size / len(images))
    draws = [lambda: images, *fresh][:passes]
    for turn, draw in enumerate(draws):
        until_now, until_then = (steps * t // len(draws) for t in (turn, turn + 1))
        yield from _shuffled(draw(), batch_size, until_then - until_now, generator)


def _shuffled(
    images: Images, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[Images]:
    """Yield ``steps`` batches ``[batch_size]``: shuffled passes over the images."""
    pending = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(pending) < batch_size:
            pending = torch.cat([pending, torch.randperm(len(images), generator=generator)])
        yield images.select(pending[:batch_size].numpy())
        pending = pending[batch_size:]


def _views(
    x: Tensor, max_shift: int, elastic: float, flip: bool, generator: torch.Generator
) -> Tensor:
    """Return a random view of each image ``[N, C, H, W]``."""
    x = bend(x, elastic, generator)
    down, right = torch.randint(-max_shift, max_shift + 1, (2, len(x)), generator=generator)
    x = shift(x, down, right)
    return mirror(x, torch.rand(len(x), generator=generator) < 0.5) if flip else x
