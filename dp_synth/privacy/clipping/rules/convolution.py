"""Convolutions of one, two and three dimensions, plain and transposed, with any geometry."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_synth.privacy.clipping import book_keeping
from dp_synth.privacy.clipping.book_keeping import BookKept
from dp_synth.privacy.clipping.contributions import Contribution, Dense, OneByOne
from dp_synth.privacy.clipping.recording import (
    Call,
    UnsupportedInput,
    Ways,
    autocast,
    recorded_call,
    split_draws,
)

# Up to this many summed terms (draws x output positions) a grouped convolution's fixed cost per
# group is much of its time. Windows take, of the grouped time, measured on CPU cores with 32 to 128
# channels: one draw, 0.1 at 16 terms and 0.3 at 64; four draws, 0.8 at 16, 1.1 at 64, 1.5 at 256.
_WINDOW_TERMS = 64


@dataclass(frozen=True)
class Convolution:
    """y = x * W + b for x [R, Ci, *] and W [Co, Ci / groups, *kernel].

    A transposed convolution's W is [Ci, Co / groups, *kernel]. Stride, zero padding, dilation and
    output padding have one entry per dimension.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def has_windows(self) -> bool:
        """Whether outputs are plain sums over windows of two dimensions, one group of channels."""
        return len(self.stride) == 2 and self.groups == 1 and not self.transposed

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return torch.convolution(x, weight, bias, *self._geometry(self.groups)), ()

    def backward(
        self, call: Call, dy: Tensor, saved: tuple[Tensor, ...], needs_dx: bool
    ) -> Tensor | None:
        x, weight = saved
        if call.wants("weight"):
            ways = weight_ways(x, dy, weight, self, call.multiplicity)
            default = _default_way(dy, weight, self, call.multiplicity)
            call.add_weight(x, ways, default)
        if call.wants("bias"):
            call.add("bias", bias_grads(dy, call.multiplicity))
        return self.input_grad(x, dy, weight) if needs_dx else None

    def input_grad(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """Return dx [R, Ci, *]."""
        return self._backward(x, dy, weight, self.groups, [True, False, False])[0]

    def weight_grad(self, x: Tensor, dy: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Return dW, summed over the leading dimension of x; only the shape of `weight` matters."""
        return self._backward(x, dy, weight, groups, [False, True, False])[1]

    def _backward(
        self, x: Tensor, dy: Tensor, weight: Tensor, groups: int, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, *self._geometry(groups), mask
        )

    def _geometry(self, groups: int) -> tuple[Any, ...]:
        return (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            groups,
        )


def _default_way(dy: Tensor, weight: Tensor, conv: Convolution, multiplicity: int) -> str:
    terms = multiplicity * dy.shape[2:].numel()
    if conv.has_windows and book_keeping.pays_off(terms, len(weight), weight[0].numel()):
        return "book-keeping"
    return "windows" if conv.has_windows and terms <= _WINDOW_TERMS else "grouped"


def weight_ways(
    x: Tensor, dy: Tensor, weight: Tensor, conv: Convolution, multiplicity: int
) -> Ways:
    """The ways to the weight's gradients [b, *weight.shape] from x [R, Ci, *] and dy [R, Co, *].

    All but book-keeping cost F, the ordinary weight gradient's. Grouped convolutions are good for
    long sums;
    windows for short ones (low resolution, few draws); example-wise for very long sums or where a
    device has no good grouped kernel; book-keeping for wide layers at low resolution.
    """
    ways: Ways = {
        "grouped": lambda: Dense(grouped_weight_grads(x, dy, weight, conv, multiplicity)),
        "example-wise": lambda: _one_by_one(x, dy, weight, conv, multiplicity),
    }
    if conv.has_windows:
        ways["windows"] = lambda: _windowed(x, dy, weight, conv, multiplicity)
        pixels = max(x[0, 0].numel(), dy[0, 0].numel())
        if book_keeping.is_possible(x, weight, rows=multiplicity * pixels):
            ways["book-keeping"] = lambda: _book_kept(x, dy, weight, conv, multiplicity)
    return ways


def grouped_weight_grads(
    x: Tensor, dy: Tensor, weight: Tensor, conv: Convolution, multiplicity: int
) -> Tensor:
    """Return [b, *weight.shape] as the weight gradient of one convolution with b times the groups.

    Draw-major rows seen as [K, b * channels, *] are K images with a group of channels per example,
    and a grouped convolution sums the weight gradient over images only. No data moves.
    """
    examples = len(x) // multiplicity
    x_views = x.contiguous().view(multiplicity, examples * x.shape[1], *x.shape[2:])
    dy_views = dy.contiguous().view(multiplicity, examples * dy.shape[1], *dy.shape[2:])
    shape_only = weight.new_empty(examples * weight.shape[0], *weight.shape[1:])
    grads = conv.weight_grad(x_views, dy_views, shape_only, examples * conv.groups)
    return grads.view(examples, *weight.shape)


def _one_by_one(
    x: Tensor, dy: Tensor, weight: Tensor, conv: Convolution, multiplicity: int
) -> Contribution:
    x_split, dy_split = split_draws(x, multiplicity), split_draws(dy, multiplicity)
    return OneByOne(
        x_split.shape[1],
        lambda i: conv.weight_grad(x_split[:, i], dy_split[:, i], weight, conv.groups),
    )


def _windowed(
    x: Tensor, dy: Tensor, weight: Tensor, conv: Convolution, multiplicity: int
) -> Contribution:
    """Gradients as a product of dy with x's unfolded windows.

    Windows are laid out with channels last, so that unfolding copies whole runs of channels.
    """
    examples = len(x) // multiplicity
    out_channels, channels, *kernel = weight.shape
    padded = F.pad(x, _around(conv.padding))
    x_bkhwc = split_draws(padded, multiplicity).permute(1, 0, 3, 4, 2).contiguous()
    b, k, h, w, c = x_bkhwc.stride()
    (stride_h, stride_w), (dilation_h, dilation_w) = conv.stride, conv.dilation
    windows = x_bkhwc.as_strided(
        (examples, multiplicity, *dy.shape[2:], *kernel, channels),
        (b, k, h * stride_h, w * stride_w, h * dilation_h, w * dilation_w, c),
    ).reshape(examples, -1, kernel[0] * kernel[1] * channels)
    dy_bnp = (
        split_draws(dy, multiplicity).permute(1, 0, 3, 4, 2).reshape(examples, -1, out_channels)
    )
    grads = torch.bmm(dy_bnp.transpose(1, 2), windows)
    return Dense(grads.view(examples, out_channels, *kernel, channels).permute(0, 1, 4, 2, 3))


def _book_kept(
    x: Tensor, dy: Tensor, weight: Tensor, conv: Convolution, multiplicity: int
) -> BookKept:
    norms = book_keeping.squared_norms_of_products(
        window_inner_products(x, weight, dy.shape[2:], conv, multiplicity),
        book_keeping.inner_products(_positions(dy, multiplicity)),
        dy.dtype,
    )

    return BookKept(
        x,
        dy,
        norms,
        dense=lambda: grouped_weight_grads(x, dy, weight, conv, multiplicity),
        weight_grad=lambda x, dy: conv.weight_grad(x, dy, weight.to(x.dtype), conv.groups),
    )


def window_inner_products(
    x: Tensor, weight: Tensor, size: tuple[int, ...], conv: Convolution, multiplicity: int
) -> Tensor:
    """Return the inner products of all pairs of an example's windows, float64 [b, N, N].

    N = K H' W' windows of `size` (H', W'), draws outermost. Two windows' inner product is the sum,
    over the places in a window, of inner products of pixels; the latter are taken once for all
    places. That is the area of a window (nine times for 3 x 3) cheaper than unfolding.
    """
    height, width = x.shape[2:]
    examples = len(x) // multiplicity
    pixels = book_keeping.inner_products(_positions(x, multiplicity))
    pixels = pixels.view(examples, multiplicity, height, width, multiplicity, height, width)
    around = (*_around(conv.padding), 0, 0)
    pixels = F.pad(pixels, (*around, *around))
    # First over a window's rows, then over its columns: 3 + 3 sums in place of 9.
    rows = _sum_shifted(pixels, (2, 5), weight.shape[2], size[0], conv.stride[0], conv.dilation[0])
    both = _sum_shifted(rows, (3, 6), weight.shape[3], size[1], conv.stride[1], conv.dilation[1])
    count = multiplicity * size[0] * size[1]
    return both.reshape(examples, count, count)


def _sum_shifted(
    pixels: Tensor, dims: tuple[int, int], kernel: int, size: int, stride: int, dilation: int
) -> Tensor:
    """Sum `kernel` strided slices of length `size`, taken along both `dims` at once."""
    span = stride * (size - 1) + 1
    total: Tensor | None = None
    for place in range(kernel):
        index: list[slice] = [slice(None)] * pixels.dim()
        for dim in dims:
            index[dim] = slice(place * dilation, place * dilation + span, stride)
        part = pixels[tuple(index)]
        total = part.clone() if total is None else total.add_(part)
    assert total is not None
    return total


def _positions(rows: Tensor, multiplicity: int) -> Tensor:
    """Bring images [K * b, C, *] to [b, K * positions, C]."""
    split = split_draws(rows, multiplicity).flatten(3).permute(1, 0, 3, 2)
    return split.reshape(split.shape[0], -1, split.shape[3])


def _around(padding: tuple[int, ...]) -> tuple[int, ...]:
    """Padding per dimension, outermost first, as ``F.pad`` wants it."""
    return tuple(size for size in reversed(padding) for _ in range(2))


def bias_grads(dy: Tensor, multiplicity: int) -> Tensor:
    """Return [b, Co]: the sum of dy [R, Co, *] over an example's draws and positions."""
    return split_draws(dy, multiplicity).flatten(3).sum((0, 3))


Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedLayer = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def recorded_convolution(layer: Layer, call: Call, x: Tensor) -> Tensor:
    """The layer's forward, recorded."""
    _check_dimensions(layer, x)
    padding = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        # Autograd knows the gradient of the padding; the rule is then that of an unpadded
        # convolution.
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(layer.stride)
    conv = Convolution(
        layer.stride, padding, layer.dilation, False, layer.output_padding, layer.groups
    )
    return recorded_call(conv, call, *autocast(x, layer.weight, layer.bias))


def recorded_transposed_convolution(layer: TransposedLayer, call: Call, x: Tensor) -> Tensor:
    """The layer's forward, recorded."""
    _check_dimensions(layer, x)
    assert not isinstance(layer.padding, str)  # torch allows numbers alone here
    conv = Convolution(
        layer.stride, layer.padding, layer.dilation, True, layer.output_padding, layer.groups
    )
    return recorded_call(conv, call, *autocast(x, layer.weight, layer.bias))


def _check_dimensions(layer: Layer | TransposedLayer, x: Tensor) -> None:
    if x.dim() != layer.weight.dim():
        raise UnsupportedInput("a convolution of an input without rows")
