"""One rule per layer type: its forward, its input gradient, and its gradients per example.

Words: a backward handles R = K * b rows, K draws of each of b examples, draw-major: row
n = k * b + i is draw k of example i. Each rule hands [b, *shape] gradients, summed
over the K draws, to the recording. F is the cost of the layer's forward; an ordinary backward costs
2 F, one for the input's gradient and one for the weight's. So does each rule: the weight's gradient
is computed once, only not added up over examples.

A rule is an autograd Function, not a hook: stored activations go through `save_for_backward` (an
edit in place is an error, not a wrong gradient), autograd computes no weight gradient that is
thrown away, and a module called twice, or under activation checkpointing, simply adds twice or runs
its backward once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dp_synth.privacy.clipping.gradients import ExampleGradients


class UnsupportedInput(Exception):
    """A layer's input does not show which row is which; the engine takes the loop instead."""


@dataclass(frozen=True)
class Recording:
    """What the rules of one backward share.

    `anchor` is a scalar that requires grad: parameters do not while recording, so without it the
    first layer's output would be a constant to autograd.
    """

    grads: ExampleGradients
    multiplicity: int
    anchor: Tensor

    @property
    def rows(self) -> int:
        """Rows of this backward, R = K * b."""
        return self.multiplicity * len(self.grads)


# ------------------------------------------------------------------------------------------ Linear


def linear_weight_grads(x: Tensor, dy: Tensor, multiplicity: int) -> Tensor:
    """Return [b, p, d] from x [R, *, d] and dy [R, *, p]: the sum of dy^T x per example.

    One batched product of the ordinary weight gradient's cost, F; with several positions and K > 1
    it copies x and dy once, to bring an example's draws together.
    """
    x_bnd = _by_example(x, multiplicity)
    dy_bnp = _by_example(dy, multiplicity)
    return torch.bmm(dy_bnp.transpose(1, 2), x_bnd)


def linear_bias_grads(dy: Tensor, multiplicity: int) -> Tensor:
    """Return [b, p]: the sum of dy [R, *, p] over an example's draws and positions."""
    split = _split(dy, multiplicity)
    return split.sum([dim for dim in range(split.dim() - 1) if dim != 1])


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        layer: nn.Linear,
        recording: Recording,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.recording = layer, recording
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads, multiplicity = ctx.recording.grads, ctx.recording.multiplicity
        if grads.wants(ctx.layer.weight):
            grads.add(ctx.layer.weight, linear_weight_grads(x, dy, multiplicity))
        if grads.wants(ctx.layer.bias):
            grads.add(ctx.layer.bias, linear_bias_grads(dy, multiplicity))
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None


def _linear(layer: nn.Linear, recording: Recording, x: Tensor) -> Tensor:
    x, weight, bias = _autocast(x, layer.weight, layer.bias)
    return _Linear.apply(x, weight, bias, recording.anchor, layer, recording)


# ------------------------------------------------------------------------------------------ Conv2d


@dataclass(frozen=True)
class ConvGeometry:
    """Stride, zero padding and dilation, each (height, width), and the number of channel groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, groups: int, mask: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call torch's backward with `groups` channel groups; `mask` asks for dx, dw, db."""
        return torch.ops.aten.convolution_backward(
            dy,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            (0, 0),
            groups,
            mask,
        )


# Up to this many summed terms (draws x output positions) a grouped convolution's fixed cost per
# group is much of its time. Windows take, of the grouped time, measured on CPU cores with 32 to 128
# channels: one draw, 0.1 at 16 terms and 0.3 at 64; four draws, 0.8 at 16, 1.1 at 64, 1.5 at 256.
_WINDOW_TERMS = 64


def conv2d_weight_grads(
    x: Tensor, dy: Tensor, weight: Tensor, geometry: ConvGeometry, multiplicity: int
) -> Tensor:
    """Return [b, *weight.shape] from x [R, Ci, H, W] and dy [R, Co, H', W'].

    Cost F either way. Long sums go to a grouped convolution, short ones (low resolution, few draws)
    to a product of unfolded windows.
    """
    terms = multiplicity * dy.shape[2] * dy.shape[3]
    if geometry.groups == 1 and terms <= _WINDOW_TERMS:
        return conv2d_weight_grads_by_windows(x, dy, weight, geometry, multiplicity)
    return conv2d_weight_grads_by_groups(x, dy, weight, geometry, multiplicity)


def conv2d_weight_grads_by_groups(
    x: Tensor, dy: Tensor, weight: Tensor, geometry: ConvGeometry, multiplicity: int
) -> Tensor:
    """Return [b, *weight.shape] as the weight gradient of one convolution with b times the groups.

    Draw-major rows seen as [K, b * channels, H, W] are K images with a group of channels per
    example, and a grouped convolution sums the weight gradient over images only. No data moves.
    """
    examples = len(x) // multiplicity
    x_views = x.contiguous().view(multiplicity, examples * x.shape[1], *x.shape[2:])
    dy_views = dy.contiguous().view(multiplicity, examples * dy.shape[1], *dy.shape[2:])
    # Only the shape of the weight enters its own gradient.
    shape_only = weight.new_empty(examples * weight.shape[0], *weight.shape[1:])
    groups = examples * geometry.groups
    grads = geometry.backward(dy_views, x_views, shape_only, groups, [False, True, False])[1]
    return grads.view(examples, *weight.shape)


def conv2d_weight_grads_by_windows(
    x: Tensor, dy: Tensor, weight: Tensor, geometry: ConvGeometry, multiplicity: int
) -> Tensor:
    """Return [b, *weight.shape] as a product of dy with x's unfolded windows; one group only.

    Windows are laid out with channels last, so that unfolding copies whole runs of channels.
    """
    examples = len(x) // multiplicity
    out_channels, channels, *kernel = weight.shape
    pad_h, pad_w = geometry.padding
    padded = F.pad(x, (pad_w, pad_w, pad_h, pad_h))
    x_bkhwc = _split(padded, multiplicity).permute(1, 0, 3, 4, 2).contiguous()
    b, k, h, w, c = x_bkhwc.stride()
    windows = x_bkhwc.as_strided(
        (examples, multiplicity, *dy.shape[2:], *kernel, channels),
        (
            b,
            k,
            h * geometry.stride[0],
            w * geometry.stride[1],
            h * geometry.dilation[0],
            w * geometry.dilation[1],
            c,
        ),
    ).reshape(examples, -1, kernel[0] * kernel[1] * channels)
    dy_bnp = _split(dy, multiplicity).permute(1, 0, 3, 4, 2).reshape(examples, -1, out_channels)
    grads = torch.bmm(dy_bnp.transpose(1, 2), windows)
    return grads.view(examples, out_channels, *kernel, channels).permute(0, 1, 4, 2, 3)


def conv2d_bias_grads(dy: Tensor, multiplicity: int) -> Tensor:
    """Return [b, Co]: the sum of dy [R, Co, H', W'] over an example's draws and positions."""
    return _split(dy, multiplicity).sum((0, 3, 4))


class _Conv2d(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        layer: nn.Conv2d,
        geometry: ConvGeometry,
        recording: Recording,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.geometry, ctx.recording = layer, geometry, recording
        return F.conv2d(
            x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        geometry: ConvGeometry = ctx.geometry
        grads, multiplicity = ctx.recording.grads, ctx.recording.multiplicity
        if grads.wants(ctx.layer.weight):
            weight_grads = conv2d_weight_grads(x, dy, weight, geometry, multiplicity)
            grads.add(ctx.layer.weight, weight_grads)
        if grads.wants(ctx.layer.bias):
            grads.add(ctx.layer.bias, conv2d_bias_grads(dy, multiplicity))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = geometry.backward(dy, x, weight, geometry.groups, [True, False, False])[0]
        return dx, None, None, None, None, None, None


def _conv2d(layer: nn.Conv2d, recording: Recording, x: Tensor) -> Tensor:
    if x.dim() != 4:
        raise UnsupportedInput("a convolution of an input without rows")
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        # Autograd knows the gradient of the padding; the rule is then that of an unpadded
        # convolution.
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0, 0)
    geometry = ConvGeometry(
        _pair(layer.stride), _pair(padding), _pair(layer.dilation), layer.groups
    )
    x, weight, bias = _autocast(x, layer.weight, layer.bias)
    return _Conv2d.apply(x, weight, bias, recording.anchor, layer, geometry, recording)


# --------------------------------------------------------------------------------------- GroupNorm


def group_norm_grads(
    x: Tensor,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    groups: int,
    multiplicity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx [R, C, *], and weight's and bias' gradients [b, C] each, at no extra pass.

    Draw-major rows seen as [K, b * C, *] with b * groups groups are normalised alike, since a group
    lies within one row; the framework's backward sums the affine gradients over the K images only.
    """
    examples, channels = len(x) // multiplicity, x.shape[1]
    stacked = (multiplicity, examples * channels, *x.shape[2:])
    dx, weight_grads, bias_grads = torch.ops.aten.native_group_norm_backward(
        dy.contiguous().view(stacked),
        x.contiguous().view(stacked),
        mean.view(multiplicity, -1),
        rstd.view(multiplicity, -1),
        weight.repeat(examples),
        multiplicity,
        examples * channels,
        x.shape[2:].numel(),
        examples * groups,
        [True, True, True],
    )
    return dx.view(x.shape), weight_grads.view(examples, -1), bias_grads.view(examples, -1)


class _GroupNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        anchor: Tensor,
        layer: nn.GroupNorm,
        recording: Recording,
    ) -> Tensor:
        x = x.contiguous()
        rows, channels = x.shape[:2]
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, rows, channels, x.shape[2:].numel(), layer.num_groups, layer.eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.layer, ctx.recording = layer, recording
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        layer, recording = ctx.layer, ctx.recording
        dx, weight_grads, bias_grads = group_norm_grads(
            x, dy, mean, rstd, weight, layer.num_groups, recording.multiplicity
        )
        for param, param_grads in ((layer.weight, weight_grads), (layer.bias, bias_grads)):
            if recording.grads.wants(param):
                recording.grads.add(param, param_grads)
        return dx if ctx.needs_input_grad[0] else None, None, None, None, None, None


def _group_norm(layer: nn.GroupNorm, recording: Recording, x: Tensor) -> Tensor:
    x = x.to(layer.weight.dtype)  # what autocast does to norms: they stay in full precision
    return _GroupNorm.apply(x, layer.weight, layer.bias, recording.anchor, layer, recording)


# --------------------------------------------------------------------------------------- LayerNorm


def layer_norm_affine_grads(
    x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor, shape: tuple[int, ...], multiplicity: int
) -> tuple[Tensor, Tensor]:
    """Return weight's and bias' gradients [b, *shape]: dy * (x - mean) * rstd, and dy, summed.

    The sums are over an example's draws and positions. One pass over x more than an ordinary
    backward, small beside the products around it.
    """
    examples = len(x) // multiplicity
    split = (multiplicity, examples, -1, *shape)
    weight_grads = (dy * ((x - mean) * rstd)).reshape(split).sum((0, 2))
    return weight_grads, dy.reshape(split).sum((0, 2))


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        layer: nn.LayerNorm,
        recording: Recording,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.layer, ctx.recording = layer, recording
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        layer, recording = ctx.layer, ctx.recording
        weight_grads, bias_grads = layer_norm_affine_grads(
            x, dy, mean, rstd, layer.normalized_shape, recording.multiplicity
        )
        for param, param_grads in ((layer.weight, weight_grads), (layer.bias, bias_grads)):
            if recording.grads.wants(param):
                recording.grads.add(param, param_grads)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.native_layer_norm_backward(
                dy, x, layer.normalized_shape, mean, rstd, weight, None, [True, False, False]
            )[0]
        return dx, None, None, None, None, None


def _layer_norm(layer: nn.LayerNorm, recording: Recording, x: Tensor) -> Tensor:
    if x.dim() <= len(layer.normalized_shape):
        raise UnsupportedInput("a layer norm that spans the rows")
    x = x.to(layer.weight.dtype)
    return _LayerNorm.apply(x, layer.weight, layer.bias, recording.anchor, layer, recording)


# --------------------------------------------------------------------------------------- Embedding


def embedding_weight_grads(
    index: Tensor, dy: Tensor, num_embeddings: int, padding_idx: int | None, multiplicity: int
) -> Tensor:
    """Return [b, num_embeddings, d]: dy [R, *, d] added at each example's own copy of the table.

    One addition per index, and b * num_embeddings * d entries to clear.
    """
    examples, width = len(index) // multiplicity, dy.shape[-1]
    example = torch.arange(examples, device=index.device).repeat(multiplicity)
    example = example.view(-1, *(1,) * (index.dim() - 1))
    grads = dy.new_zeros(examples * num_embeddings, width)
    grads.index_add_(0, (example * num_embeddings + index).flatten(), dy.reshape(-1, width))
    grads = grads.view(examples, num_embeddings, width)
    if padding_idx is not None:
        grads[:, padding_idx] = 0.0
    return grads


class _Embedding(Function):
    @staticmethod
    def forward(
        ctx: Any,
        index: Tensor,
        weight: Tensor,
        anchor: Tensor,
        layer: nn.Embedding,
        recording: Recording,
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.layer, ctx.recording = layer, recording
        return F.embedding(index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        (index,) = ctx.saved_tensors
        layer, recording = ctx.layer, ctx.recording
        recording.grads.add(
            layer.weight,
            embedding_weight_grads(
                index, dy, layer.num_embeddings, layer.padding_idx, recording.multiplicity
            ),
        )
        return None, None, None, None, None


def _embedding(layer: nn.Embedding, recording: Recording, index: Tensor) -> Tensor:
    return _Embedding.apply(index, layer.weight, recording.anchor, layer, recording)


# ---------------------------------------------------------------------------------------- dispatch

_RULES: dict[type[nn.Module], Callable[[Any, Recording, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}


def why_unsupported(module: nn.Module) -> str | None:
    """Return why no rule covers this module's own trainable parameters, or None if one does.

    The type must match exactly: a subclass may compute anything.
    """
    own = {name for name, param in module.named_parameters(recurse=False) if param.requires_grad}
    if type(module) not in _RULES or not own <= {"weight", "bias"}:
        return "no rule for this layer type"
    if "forward" in vars(module):
        return "its forward has been replaced"
    if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq):
        return "max_norm and scale_grad_by_freq act across rows"
    return None


def recorded_forward(
    name: str, module: nn.Module, recording: Recording
) -> Callable[[Tensor], Tensor]:
    """Return a forward for `module` that computes the same, and records gradients on the way back.

    Its input must hold the recording's rows in its leading dimension, else it raises
    `UnsupportedInput`. An input whose leading dimension is another thing of by chance the same
    length cannot be told: the self-check, which runs with another number of rows, finds it.
    """
    rule = _RULES[type(module)]

    def forward(input: Tensor) -> Tensor:  # torch's own name: callers may pass it by keyword
        if input.dim() == 0 or len(input) != recording.rows:
            raise UnsupportedInput(f"{name}: its input's leading dimension is not the rows")
        try:
            return rule(module, recording, input)
        except UnsupportedInput as error:
            raise UnsupportedInput(f"{name}: {error}") from None

    return forward


# ----------------------------------------------------------------------------------------- helpers


def _split(rows: Tensor, multiplicity: int) -> Tensor:
    """View draw-major rows [K * b, ...] as [K, b, ...]; any strides."""
    return rows.unflatten(0, (multiplicity, -1))


def _by_example(rows: Tensor, multiplicity: int) -> Tensor:
    """Bring rows [K * b, *, f] to [b, K * positions, f]; a view if K = 1 or positions = 1."""
    split = _split(rows, multiplicity).transpose(0, 1)
    return split.reshape(len(split), -1, rows.shape[-1])


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return height, width


def _autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would, but before the rule, so that it saves what it multiplied."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
