"""Records per-example gradients on the way back, by one autograd Function for all rules.

Words: a backward handles R = K * b rows, K draws of each of b examples, draw-major: row
n = k * b + i is draw k of example i.

A rule is run by an autograd Function, not a hook: stored activations go through
`save_for_backward` (an edit in place is an error, not a wrong gradient), autograd computes no weight
gradient that is thrown away, and a module called twice, or under activation checkpointing, simply
adds twice or runs its backward once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dp_synth.privacy.clipping.contributions import Contribution, Dense
from dp_synth.privacy.clipping.gradients import ExampleGradients

Ways = dict[str, Callable[[], Contribution]]


class UnsupportedInput(Exception):
    """A layer's input does not show which row is which; the engine takes the loop instead."""


class Chooser(Protocol):
    """Chooses one of several ways to the same gradients; each gives the same up to rounding."""

    def choose(self, call: "Call", x: Tensor, ways: Ways, default: str) -> Contribution:
        """Return what one of `ways` contributes, for input `x`.

        The first of `ways` is always there; `default` is good without measurement.
        """


@dataclass(frozen=True)
class Recording:
    """What the layers of one backward share.

    `anchor` is a scalar that requires grad: parameters do not while recording, so without it the
    first layer's output would be a constant to autograd.
    """

    grads: ExampleGradients
    multiplicity: int
    anchor: Tensor
    chooser: Chooser

    @property
    def examples(self) -> int:
        """Examples of this backward, b."""
        return len(self.grads)

    @property
    def rows(self) -> int:
        """Rows of this backward, R = K * b."""
        return self.multiplicity * self.examples


@dataclass(frozen=True)
class Call:
    """One call of one layer; a rule hands it the layer's part of the per-example gradients."""

    name: str
    layer: nn.Module
    recording: Recording

    @property
    def multiplicity(self) -> int:
        """Draws per example, K."""
        return self.recording.multiplicity

    @property
    def weight(self) -> nn.Parameter:
        """The layer's weight."""
        weight = self.layer.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def wants(self, which: str) -> bool:
        """Whether the layer's parameter of this name ("weight", "bias") is there and trained."""
        return self.recording.grads.wants(getattr(self.layer, which, None))

    def add(self, which: str, grads: Tensor) -> None:
        """Add gradients [b, *shape], summed over draws and positions."""
        self.recording.grads.add(getattr(self.layer, which), Dense(grads))

    def add_weight(self, x: Tensor, ways: Ways, default: str) -> None:
        """Add the weight's gradients by one of several ways; `x` is the layer's input."""
        contribution = self.recording.chooser.choose(self, x, ways, default)
        self.recording.grads.add(self.weight, contribution)


class Rule(Protocol):
    """How one call of one layer type is computed and differentiated.

    F is the cost of the forward; an ordinary backward costs 2 F, one for the input's gradient and
    one for the weight's. So does a rule's, but for what `book_keeping` and layer norms add: the
    weight's gradient is computed once, only not added up over examples.
    """

    def forward(self, x: Tensor, weight: Any, bias: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output, and what `backward` needs beside input and weight."""

    def backward(
        self, call: Call, dy: Tensor, saved: tuple[Tensor, ...], needs_dx: bool
    ) -> Tensor | None:
        """Hand the wanted parameters' gradients to `call`; return the input's if asked for.

        `saved` is the input, the weight, and what `forward` returned.
        """


class _Recorded(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor,
        rule: Rule,
        call: Call,
    ) -> Tensor:
        y, more = rule.forward(x, weight, bias)
        ctx.save_for_backward(x, weight, *more)
        ctx.rule, ctx.call = rule, call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_dx = ctx.needs_input_grad[0]
        # Out of the graph: the recording may keep them, and the graph keeps the recording. Through
        # autograd's nodes such a cycle is one that Python cannot see, and it would never be freed.
        saved = tuple(t if t is None else t.detach() for t in ctx.saved_tensors)
        dx = ctx.rule.backward(ctx.call, dy, saved, needs_dx)
        return dx, None, None, None, None, None


def recorded_call(
    rule: Rule, call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return the layer's output; its backward hands gradients per example to the recording."""
    return _Recorded.apply(x, weight, bias, call.recording.anchor, rule, call)


def autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would, but before the rule, so that it saves what it multiplied."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def split_draws(rows: Tensor, multiplicity: int) -> Tensor:
    """View draw-major rows [K * b, ...] as [K, b, ...]; any strides."""
    return rows.unflatten(0, (multiplicity, -1))


def by_example(rows: Tensor, multiplicity: int) -> Tensor:
    """Bring rows [K * b, *, f] to [b, K * positions, f]; a view if K = 1 or positions = 1."""
    split = split_draws(rows, multiplicity).transpose(0, 1)
    return split.reshape(len(split), -1, rows.shape[-1])
