"""The ways to get a gradient that are compared, each behind one calling convention.

``make(net, loss, max_grad_norm)`` attaches to a network of its own and returns
``run(rows, multiplicity)``, which leaves sum_i clip(mean_k grad_ik, max_grad_norm) in ``.grad``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from networks import Point, Rows
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dp_synth.privacy.clipping import ClippingEngine
from dp_synth.privacy.clipping.tuning import timings_file
from dp_synth.process import RowLoss

Run = Callable[[Rows, int], None]


@dataclass(frozen=True)
class Engine:
    """One row of the table.

    Args:
        make: see the module's docstring.
        private: clips at all.
        bf16: run under bfloat16 autocast whatever the rest of the table does.
        holds: whose gradients are in memory at once, one by one ("none"), each example's or each
            draw's; known in advance, so that what cannot fit is not tried.
        clips_draws: clips each draw on its own: another mechanism wherever K > 1.
    """

    make: Callable[[nn.Module, RowLoss, float], Run]
    private: bool = True
    bf16: bool = False
    holds: Literal["none", "examples", "draws"] = "none"
    clips_draws: bool = False

    def gradients_held(self, point: Point) -> int:
        """How many gradients of the whole network are in memory at once, at least."""
        examples, multiplicity = point
        return {"none": 1, "examples": examples, "draws": examples * multiplicity}[self.holds]


def non_private(net: nn.Module, loss: RowLoss, max_grad_norm: float) -> Run:
    """The ordinary backward of the summed loss, which all others are compared with."""
    return lambda rows, multiplicity: (loss(*rows).sum() / multiplicity).backward()


def dp_synth(net: nn.Module, loss: RowLoss, max_grad_norm: float, **options: Any) -> Run:
    """The clipping engine with any of its options, tuned at its first call as a run tunes it."""
    engine = ClippingEngine(net, max_grad_norm, **options)
    tuned: set[int] = set()

    def run(rows: Rows, multiplicity: int) -> None:
        if multiplicity not in tuned:
            tuned.add(multiplicity)
            engine.tune(
                loss, rows, multiplicity, len(rows[0]) // multiplicity, cache=timings_file()
            )
        engine.accumulate(loss, rows, multiplicity)

    return run


def dp_synth_checkpointed(net: nn.Module, loss: RowLoss, max_grad_norm: float) -> Run:
    """The clipping engine on a network that recomputes its activations."""
    net.enable_gradient_checkpointing()  # type: ignore[operator]
    return dp_synth(net, loss, max_grad_norm)


def vmap_grad(net: nn.Module, loss: RowLoss, max_grad_norm: float) -> Run:
    """``vmap(grad)`` over examples, draws inside the loss."""
    wrapped = _LossModule(net, loss)
    params = dict(wrapped.named_parameters())

    def example_loss(values: Mapping[str, Tensor], *draws: Tensor) -> Tensor:
        return functional_call(wrapped, dict(values), draws).mean()

    def run(rows: Rows, multiplicity: int) -> None:
        draws = [row.unflatten(0, (multiplicity, -1)) for row in rows]
        values = {name: param.detach() for name, param in params.items()}
        grads = vmap(grad(example_loss), in_dims=(None, 1, 1, 1, 1))(values, *draws)
        _set_clipped_sum({params[name]: g for name, g in grads.items()}, max_grad_norm)

    return run


def opacus_per_draw(
    net: nn.Module, loss: RowLoss, max_grad_norm: float, force_functorch: bool
) -> Run:
    """Opacus' per-sample gradients with draws as samples; their mean is clipped.

    Opacus knows no multiplicity: this is how one gets the right mechanism out of it.
    """
    GradSampleModule(net, loss_reduction="sum", force_functorch=force_functorch)

    def run(rows: Rows, multiplicity: int) -> None:
        loss(*rows).sum().backward()
        grads: dict[nn.Parameter, Tensor] = {}
        for param in net.parameters():
            per_draw: Tensor = param.grad_sample  # type: ignore[attr-defined]
            grads[param] = per_draw.unflatten(0, (multiplicity, -1)).mean(0)
            param.grad_sample = None  # type: ignore[attr-defined]
        _set_clipped_sum(grads, max_grad_norm)

    return run


def opacus_ghost(net: nn.Module, loss: RowLoss, max_grad_norm: float) -> Run:
    """Opacus' ghost clipping: norms in one backward, the sum of clipped gradients in a second.

    There is no gradient of an example to average, so it can only clip each draw on its own.
    """
    module = GradSampleModuleFastGradientClipping(
        net, loss_reduction="sum", max_grad_norm=max_grad_norm
    )
    optimizer = torch.optim.SGD(net.parameters())  # only its zero_grad is called

    def run(rows: Rows, multiplicity: int) -> None:
        losses = loss(*rows)
        DPTensorFastGradientClipping(module, optimizer, losses, "sum").backward()
        for param in net.parameters():
            assert param.grad is not None
            param.grad /= multiplicity

    return run


def _set_clipped_sum(grads: Mapping[nn.Parameter, Tensor], max_grad_norm: float) -> None:
    """Clip per-example gradients [B, ...] jointly and leave their sum in ``.grad``."""
    norms = [torch.linalg.vector_norm(g.flatten(1).float(), dim=1) for g in grads.values()]
    factors = (max_grad_norm / torch.stack(norms).double().norm(dim=0)).clamp(max=1)
    for param, per_example in grads.items():
        # Opacus' hooks leave bfloat16 under autocast.
        param.grad = torch.einsum("i,i...->...", factors.to(param), per_example.to(param))


class _LossModule(nn.Module):
    """The loss as a module, so that ``functional_call`` can swap the network's parameters."""

    def __init__(self, net: nn.Module, loss: RowLoss) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, *rows: Tensor) -> Tensor:
        return self.loss(*rows)


ENGINES = {
    "non-private": Engine(non_private, private=False),
    "non-private bf16": Engine(non_private, private=False, bf16=True),
    "dp_synth": Engine(dp_synth),
    "dp_synth bf16": Engine(dp_synth, bf16=True),
    "dp_synth 300 MiB": Engine(partial(dp_synth, memory_mib=300)),
    "dp_synth checkpointed": Engine(dp_synth_checkpointed),
    "per-example loop": Engine(partial(dp_synth, mode="loop")),
    "vmap(grad)": Engine(vmap_grad, holds="examples"),
    "Opacus hooks": Engine(partial(opacus_per_draw, force_functorch=False), holds="draws"),
    "Opacus functorch": Engine(partial(opacus_per_draw, force_functorch=True), holds="draws"),
    "Opacus ghost": Engine(opacus_ghost, clips_draws=True),
}
