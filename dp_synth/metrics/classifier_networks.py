"""The classifiers' networks, for images of any side from 8 pixels, any channels and classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dp_synth.errors import UserError

_MIN_SIDE = 8
_GROUPS = 8  # of a group normalisation, or the most that divides the channels

Shape = tuple[int, int, int]
Norm = Literal["batch", "group"]
Block = Callable[[int, int, int], nn.Module]  # channels in, channels out, stride


class Classifier(nn.Module):
    """A body that gives features, and a linear head that gives logits.

    Args:
        body: images ``[N, C, H, W]`` to features ``[N, D]``.
        num_features: D.
        num_classes: length of the logits.
    """

    def __init__(self, body: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.body = body
        self.head = nn.Linear(num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate features ``[N, D]`` of images ``[N, C, H, W]`` in [-1, 1]."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, num_classes]`` of images ``[N, C, H, W]`` in [-1, 1]."""
        return self.head(self.features(x))


class SmallCNN(Classifier):
    """A small convolutional network.

    Its stages halve the image until its longer side is at most 4. What is left is flattened, not
    averaged: in an image of 8x8 pixels the place of a stroke is what tells classes apart.

    Args:
        shape: ``(C, H, W)`` of one image.
        num_classes: length of the logits.
        width: channels of the first convolution; each stage doubles them, up to 4 times as many.
        num_features: length D of the penultimate features.
        norm: what follows each convolution; "group" keeps examples apart, as DP-SGD needs.

    Raises:
        UserError: a side of less than 8 pixels.
    """

    def __init__(
        self,
        shape: Shape,
        num_classes: int,
        width: int = 32,
        num_features: int = 64,
        norm: Norm = "batch",
    ) -> None:
        channels, *sides = _checked(shape)
        layers = [_convolution(channels, width, norm=norm), nn.ReLU()]
        wide = width
        while max(sides) > 4:
            out = min(2 * wide, 4 * width)
            layers += [_convolution(wide, out, norm=norm), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
            wide = out
            sides = [math.ceil(side / 2) for side in sides]
        layers += [_convolution(wide, wide, norm=norm), nn.ReLU(), nn.Flatten()]
        layers += [nn.Linear(wide * math.prod(sides), num_features), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), num_features, num_classes)


class WideResNet(Classifier):
    """A wide residual network, WRN-40-4 unless told otherwise.

    Zagoruyko and Komodakis 2016 (arXiv 1605.07146), table 1, with the order of their section 2:
    normalisation and ReLU before each convolution.

    Args:
        shape: ``(C, H, W)`` of one image.
        num_classes: length of the logits.
        depth: convolutions, 6 n + 4.
        width: their k: channels are k times 16, 32 and 64.
        dropout: chance that a number between a block's two convolutions is dropped.
        norm: see ``SmallCNN``.

    Raises:
        UserError: a side of less than 8 pixels, or another depth.
    """

    def __init__(
        self,
        shape: Shape,
        num_classes: int,
        depth: int = 40,
        width: int = 4,
        dropout: float = 0.0,
        norm: Norm = "batch",
    ) -> None:
        channels, *_ = _checked(shape)
        widths = (16 * width, 32 * width, 64 * width)
        body = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False),
            *_stages(
                partial(_PreActivated, dropout=dropout, norm=norm),
                16,
                widths,
                _blocks("WideResNet", depth, 6, 4),
            ),
            _normalisation(norm, widths[-1]),
            nn.ReLU(),
            *_pooled(),
        )
        _initialise(body)
        super().__init__(body, widths[-1], num_classes)


class ResNet(Classifier):
    """A residual network for small images, ResNet-110 unless told otherwise.

    He et al. 2016 (arXiv 1512.03385), section 4.2, with projections where the shape changes.

    Args:
        shape: ``(C, H, W)`` of one image.
        num_classes: length of the logits.
        depth: layers, 6 n + 2.
        width: channels of the first stage; each stage doubles them.

    Raises:
        UserError: a side of less than 8 pixels, or another depth.
    """

    def __init__(self, shape: Shape, num_classes: int, depth: int = 110, width: int = 16) -> None:
        channels, *_ = _checked(shape)
        body = nn.Sequential(
            _convolution(channels, width),
            nn.ReLU(),
            *_stages(_basic, width, (width, 2 * width, 4 * width), _blocks("ResNet", depth, 6, 2)),
            *_pooled(),
        )
        _initialise(body)
        super().__init__(body, 4 * width, num_classes)


class ResNeXt(Classifier):
    """A residual network of grouped convolutions for small images, ResNeXt-29 by default.

    Xie et al. 2017 (arXiv 1611.05431), section 5.3.

    Args:
        shape: ``(C, H, W)`` of one image.
        num_classes: length of the logits.
        depth: layers, 9 n + 2.
        cardinality: groups of a convolution.
        group_width: channels of each group in the first stage; each stage doubles them.
        width: channels that leave the first stage, in units of 64; each stage doubles them.

    Raises:
        UserError: a side of less than 8 pixels, or another depth.
    """

    def __init__(
        self,
        shape: Shape,
        num_classes: int,
        depth: int = 29,
        cardinality: int = 8,
        group_width: int = 64,
        width: int = 4,
    ) -> None:
        channels, *_ = _checked(shape)
        first = 64 * width
        # Inside a block there are so many channels for each one that leaves it.
        inner = cardinality * group_width / first
        body = nn.Sequential(
            _convolution(channels, 64),
            nn.ReLU(),
            *_stages(
                partial(_bottleneck, cardinality=cardinality, inner=inner),
                64,
                (first, 2 * first, 4 * first),
                _blocks("ResNeXt", depth, 9, 2),
            ),
            *_pooled(),
        )
        _initialise(body)
        super().__init__(body, 4 * first, num_classes)


class _PreActivated(nn.Module):
    """Two 3x3 convolutions, normalised and rectified before, added to their input."""

    def __init__(self, channels: int, out: int, stride: int, dropout: float, norm: Norm) -> None:
        super().__init__()
        self.activate = nn.Sequential(_normalisation(norm, channels), nn.ReLU())
        self.body = nn.Sequential(
            _convolution(channels, out, stride=stride, norm=norm),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
        )
        self.project = (
            None
            if (channels, stride) == (out, 1)
            else nn.Conv2d(channels, out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activate(x)
        return self.body(activated) + (x if self.project is None else self.project(activated))


class _PostActivated(nn.Module):
    """A body added to its input, or to a projection of it where the shape changes; then ReLU."""

    def __init__(self, body: nn.Module, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.shortcut = (
            nn.Identity()
            if (channels, stride) == (out, 1)
            else _convolution(channels, out, kernel=1, stride=stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


def _basic(channels: int, out: int, stride: int) -> nn.Module:
    body = nn.Sequential(
        _convolution(channels, out, stride=stride), nn.ReLU(), _convolution(out, out)
    )
    return _PostActivated(body, channels, out, stride)


def _bottleneck(channels: int, out: int, stride: int, cardinality: int, inner: float) -> nn.Module:
    wide = round(inner * out)
    body = nn.Sequential(
        _convolution(channels, wide, kernel=1),
        nn.ReLU(),
        _convolution(wide, wide, stride=stride, groups=cardinality),
        nn.ReLU(),
        _convolution(wide, out, kernel=1),
    )
    return _PostActivated(body, channels, out, stride)


def _stages(block: Block, channels: int, widths: tuple[int, ...], num_blocks: int) -> nn.Sequential:
    """Stages of ``num_blocks`` blocks each; all but the first halve the image."""
    blocks = []
    for stage, out in enumerate(widths):
        for number in range(num_blocks):
            stride = 2 if stage > 0 and number == 0 else 1
            blocks.append(block(channels, out, stride))
            channels = out
    return nn.Sequential(*blocks)


def _convolution(
    channels: int,
    out: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    norm: Norm = "batch",
) -> nn.Sequential:
    """A convolution and its normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        _normalisation(norm, out),
    )


def _normalisation(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(_GROUPS, channels), channels)


def _pooled() -> tuple[nn.Module, nn.Module]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten()


def _initialise(body: nn.Module) -> None:
    """Weights of convolutions as He et al. 2015 (arXiv 1502.01852) have them."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _blocks(network: str, depth: int, layers: int, extra: int) -> int:
    """How many blocks of a stage make the depth."""
    blocks, rest = divmod(depth - extra, layers)
    if blocks < 1 or rest:
        raise UserError(
            f"depth={depth} of {network} must be {layers} n + {extra}, such as "
            f"{layers + extra} or {2 * layers + extra}."
        )
    return blocks


def _checked(shape: Shape) -> Shape:
    _, height, width = shape
    if min(height, width) < _MIN_SIDE:
        raise UserError(
            f"images of {height}x{width} pixels are too small for the evaluator's "
            f"classifier; use {_MIN_SIDE}x{_MIN_SIDE} or more, or evaluator=none."
        )
    return shape
