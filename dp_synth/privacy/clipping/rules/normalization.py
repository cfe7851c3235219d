"""Group and layer normalisation: gradients of their scale and shift."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dp_synth.privacy.clipping.recording import Call, UnsupportedInput, recorded_call


@dataclass(frozen=True)
class GroupNorm:
    """y = weight * normalised(x) + bias for x [R, C, *] in `groups` groups of channels."""

    groups: int
    eps: float

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows, channels = x.shape[:2]
        positions = x.shape[2:].numel()
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, rows, channels, positions, self.groups, self.eps
        )
        return y, (mean, rstd)

    def backward(
        self, call: Call, dy: Tensor, saved: tuple[Tensor, ...], needs_dx: bool
    ) -> Tensor | None:
        x, weight, mean, rstd = saved
        dx, weight_grads, bias_grads = group_norm_grads(
            x, dy, mean, rstd, weight, self.groups, call.multiplicity
        )
        _add_affine(call, weight_grads, bias_grads)
        return dx if needs_dx else None


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
        x.view(stacked),
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


def recorded_group_norm(layer: nn.GroupNorm, call: Call, x: Tensor) -> Tensor:
    """The layer's forward, recorded."""
    x = x.to(layer.weight.dtype)  # what autocast does to norms: they stay in full precision
    rule = GroupNorm(layer.num_groups, layer.eps)
    return recorded_call(rule, call, x.contiguous(), layer.weight, layer.bias)


@dataclass(frozen=True)
class LayerNorm:
    """y = weight * normalised(x) + bias for x [R, *, *shape], normalised over `shape`."""

    shape: tuple[int, ...]
    eps: float

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, mean, rstd = torch.native_layer_norm(x, self.shape, weight, bias, self.eps)
        return y, (mean, rstd)

    def backward(
        self, call: Call, dy: Tensor, saved: tuple[Tensor, ...], needs_dx: bool
    ) -> Tensor | None:
        x, weight, mean, rstd = saved
        _add_affine(call, *layer_norm_grads(x, dy, mean, rstd, self.shape, call.multiplicity))
        if not needs_dx:
            return None
        return torch.ops.aten.native_layer_norm_backward(
            dy, x, self.shape, mean, rstd, weight, None, [True, False, False]
        )[0]


def layer_norm_grads(
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


def recorded_layer_norm(layer: nn.LayerNorm, call: Call, x: Tensor) -> Tensor:
    """The layer's forward, recorded."""
    if x.dim() <= len(layer.normalized_shape):
        raise UnsupportedInput("a layer norm that spans the rows")
    x = x.to(layer.weight.dtype)
    rule = LayerNorm(layer.normalized_shape, layer.eps)
    return recorded_call(rule, call, x, layer.weight, layer.bias)


def _add_affine(call: Call, weight_grads: Tensor, bias_grads: Tensor) -> None:
    for which, grads in (("weight", weight_grads), ("bias", bias_grads)):
        if call.wants(which):
            call.add(which, grads)
