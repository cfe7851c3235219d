"""Classifiers of images, trained and asked for their predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from dp_synth.data.images import Images
from dp_synth.data.pixels import to_float
from dp_synth.errors import UserError

_MIN_SIDE = 8
_WARMUP = 0.1  # share of the steps in which the learning rate rises
_CONTROL = 4  # control points a side of the elastic displacement


class SmallCNN(nn.Module):
    """A small convolutional classifier for images of any side from 8 pixels and any channels.

    Its stages halve the image until its longer side is at most 4. What is left is flattened, not
    averaged: in an image of 8x8 pixels the place of a stroke is what tells classes apart.

    Args:
        shape: ``(C, H, W)`` of one image, H and W at least 8.
        num_classes: length of the logits.
        width: channels of the first convolution; each stage doubles them, up to 4 times as many.
        num_features: length D of the penultimate features.

    Raises:
        UserError: a side of less than 8 pixels.
    """

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int, width: int = 32, num_features: int = 64
    ) -> None:
        super().__init__()
        channels, *sides = shape
        if min(sides) < _MIN_SIDE:
            raise UserError(
                f"images of {sides[0]}x{sides[1]} pixels are too small for the evaluator's "
                f"classifier; use {_MIN_SIDE}x{_MIN_SIDE} or more, or evaluator=none."
            )
        layers = _convolution(channels, width)
        wide = width
        while max(sides) > 4:
            out = min(2 * wide, 4 * width)
            layers += [*_convolution(wide, out), nn.MaxPool2d(2, ceil_mode=True)]
            wide = out
            sides = [math.ceil(side / 2) for side in sides]
        layers += _convolution(wide, wide)
        self.num_features = num_features
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.neck = nn.Sequential(nn.Linear(wide * math.prod(sides), num_features), nn.ReLU())
        self.head = nn.Linear(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate features ``[N, D]`` of images ``[N, C, H, W]`` in [-1, 1]."""
        return self.neck(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, num_classes]`` of images ``[N, C, H, W]`` in [-1, 1]."""
        return self.head(self.features(x))


def train_classifier(
    images: Images,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    label_smoothing: float,
    max_shift: int | None = None,
    elastic: float = 0.0,
    width: int = 32,
    seed: int,
    caption: str = "classifier",
    device: str | torch.device | None = None,
) -> SmallCNN:
    """Train a ``SmallCNN`` on ``images`` for a fixed number of steps.

    Nothing is selected (no validation, no early stop): the classifier depends on ``images`` alone.
    AdamW; the learning rate rises linearly, then falls to zero as a cosine. On a CPU the result is
    a function of the arguments; the global random state is left as it was. No loss is shown:
    ``images`` may be private.

    Args:
        images: N >= 1 images; where N is less than ``batch_size`` a batch holds repeats.
        steps: number of updates.
        batch_size: images in each update.
        lr: peak learning rate.
        weight_decay: AdamW's decoupled decay.
        label_smoothing: share of the target spread evenly over the classes, 0..1.
        max_shift: greatest random translation each way, in pixels, edges repeated; ``None``: a
            sixteenth of the shorter side.
        elastic: standard deviation of a smooth random displacement, in pixels.
        width: channels of the network's first convolution.
        seed: fixes initial weights, order and augmentation.
        caption: text of the progress bar.
        device: where to train; ``None``: a GPU where there is one.

    Returns:
        The trained network in evaluation mode, on ``device``.

    Raises:
        UserError: no image, no step, an empty batch, or a side of less than 8 pixels.
    """
    if len(images) == 0:
        raise UserError("a classifier cannot be trained on 0 images; at least 1 is needed.")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"evaluator.classifier.{name}={value} must be at least 1.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = _initialise(images, width, seed).to(device)
    max_shift = min(images.shape[1:]) // 16 if max_shift is None else max_shift
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps))
    batches = _batches(len(images), batch_size, steps, generator)
    for batch in tqdm(batches, total=steps, desc=caption, leave=False, disable=None):
        rows = batch.numpy()
        # Floats of a batch only: those of all images may not fit into memory.
        x = to_float(images.pixels[rows]).to(device)
        y = torch.tensor(images.labels[rows], device=device)
        views = _shift(_bend(x, elastic, generator), max_shift, generator)
        loss = F.cross_entropy(model(views), y, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


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


def _convolution(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def _initialise(images: Images, width: int, seed: int) -> SmallCNN:
    # Not torch.manual_seed: it would reseed every GPU too, which this fork does not save.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return SmallCNN(images.shape, len(images.classes), width)


def _lr_factor(step: int, steps: int) -> float:
    rise = min(1.0, (step + 1) / (_WARMUP * steps))
    # LambdaLR asks for the factor once more after the last step, when step == steps.
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(n: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield ``steps`` batches of row numbers ``[batch_size]``: shuffled passes over 0..n-1."""
    pending = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(pending) < batch_size:
            pending = torch.cat([pending, torch.randperm(n, generator=generator)])
        yield pending[:batch_size]
        pending = pending[batch_size:]


def _shift(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move each image ``[N, C, H, W]`` by up to ``most`` whole pixels each way; edges repeat."""
    n, _, height, width = x.shape
    down, right = torch.randint(-most, most + 1, (2, n, 1), generator=generator)
    rows = (torch.arange(height) + down).clamp_(0, height - 1).to(x.device)
    columns = (torch.arange(width) + right).clamp_(0, width - 1).to(x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    # Indices on both sides of a slice put the slice's dimension, the channels, last.
    return x[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _bend(x: Tensor, pixels: float, generator: torch.Generator) -> Tensor:
    """Displace each image ``[N, C, H, W]`` smoothly, by ``pixels`` (standard deviation)."""
    if pixels == 0:
        return x
    n, _, height, width = x.shape
    control = torch.randn(n, 2, _CONTROL, _CONTROL, generator=generator)
    bend = F.interpolate(control, (height, width), mode="bicubic", align_corners=True)
    still = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)
    unit = 2 / torch.tensor([width, height])  # grid_sample measures in half sides
    grid = (still + pixels * unit * bend.permute(0, 2, 3, 1)).to(x.device)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
