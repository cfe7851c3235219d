"""The start-up self-check: an engine must agree with brute force before it sees a private image."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from dp_synth.errors import UserError
from dp_synth.privacy.clipping.book_keeping import multiplies_in_tf32
from dp_synth.privacy.clipping.gradients import Clipping
from dp_synth.privacy.clipping.loss import RowLoss

# Random draws of the perturbation are the same in every run: the check depends on nothing secret.
_SEED = 0
# Parameters move by a tenth of their size, and by 0.02 where they are zero: enough that no gradient
# vanishes identically (LoRA's second factor starts at zero, and with it the first one's gradient).
_RELATIVE_MOVE, _LEAST_MOVE = 0.1, 0.02
# Brute force takes one draw at a time, or where there are many, this many groups of them: a hundred
# draws of a large network would take minutes.
_DRAW_GROUPS = 8


class CheckedEngine(Protocol):
    """What the check needs of an engine."""

    net: nn.Module
    max_grad_norm: float
    clipping: Clipping

    def accumulate(self, loss: RowLoss, rows: tuple[Tensor, ...], multiplicity: int) -> None:
        """Add the clipped sum to each trainable parameter's `.grad`."""


def check_engine(
    engine: CheckedEngine,
    loss: RowLoss,
    rows: tuple[Tensor, ...],
    multiplicity: int,
) -> None:
    """Refuse an engine whose clipped sum is not that of a loop over examples and draws.

    On return: for these rows, at slightly perturbed weights, (1) every trainable parameter's
    unclipped sum and (2) its clipped sum, with `max_grad_norm` at the median norm so that about
    half the examples are clipped, equal brute force, and (3) no example alone contributes more than
    `max_grad_norm`. Equal is up to a relative error of 1e-8 in float64, 1e-3 in float32, 5e-2 under
    autocast, in half precision, or where the device multiplies float32 in TF32. Weights, buffers,
    `.grad`, training mode, `max_grad_norm`, `clipping` and the global random state are as they were, also after a failure. Dropout is off while checking. Costs about four
    backwards of all rows, one of them in pieces, so a few examples are enough.

    Args:
        engine: the engine to check, attached to its network.
        loss: rows -> one loss per row, as for `ClippingEngine.accumulate`.
        rows: random rows of the run's shapes, never private ones; K * B of them, draw-major,
            B >= 2. B is best an odd number that no other dimension of the network shares.
        multiplicity: K.

    Raises:
        UserError: the engine is wrong here; names the parameter that is furthest off.
    """
    limit = _tolerance(engine.net)
    examples = len(rows[0]) // multiplicity
    if examples < 2:
        raise UserError(
            f"the clipping engine's self-check needs at least 2 examples, not {examples}"
        )
    with _everything_restored(engine):
        _perturb(engine.net)
        expected = [
            _mean_gradient(engine.net, loss, rows, multiplicity, i) for i in range(examples)
        ]
        norms = torch.stack([_norm(gradient) for gradient in expected])
        if not norms.isfinite().all() or not norms.all():
            raise UserError(
                "the clipping engine's self-check found gradients that are zero or not finite"
                " on random rows: the loss or the network's precision is unsound"
            )

        clipping = engine.clipping
        engine.max_grad_norm, engine.clipping = float("inf"), "flat"
        _compare(
            _engine_sum(engine, loss, rows, multiplicity),
            _weighted(expected, torch.ones_like(norms)),
            limit,
            "sum of per-example gradients",
        )

        engine.max_grad_norm, engine.clipping = float(norms.median()), clipping
        factors = _expected_factors(norms, engine.max_grad_norm, clipping)
        _compare(
            _engine_sum(engine, loss, rows, multiplicity),
            _weighted(expected, factors),
            limit,
            "clipped sum",
        )

        for i in range(examples):
            alone = tuple(tensor[i::examples] for tensor in rows)
            contribution = _norm(_engine_sum(engine, loss, alone, multiplicity))
            # The bound is on the very vector that was added; what is left is this norm's rounding.
            if contribution > engine.max_grad_norm * (1 + 1e-9):
                raise UserError(
                    f"the clipping engine's self-check failed: one example contributes"
                    f" {contribution:.6g}, above max_grad_norm {engine.max_grad_norm:.6g};"
                    " privacy.engine=loop may work"
                )


def _expected_factors(norms: Tensor, max_grad_norm: float, clipping: Clipping) -> Tensor:
    """Return the factors by their definition, apart from the engine's own code."""
    if clipping == "automatic":
        return max_grad_norm / (norms + 0.01)
    return (max_grad_norm / norms).clamp(max=1.0)


Gradient = dict[str, Tensor]


def _named_trainable(net: nn.Module) -> Gradient:
    return {name: param for name, param in net.named_parameters() if param.requires_grad}


def _mean_gradient(
    net: nn.Module, loss: RowLoss, rows: Sequence[Tensor], multiplicity: int, example: int
) -> Gradient:
    """Return one example's gradient in float64, the mean over its draws, by plain backwards."""
    params = _named_trainable(net)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    examples = len(rows[0]) // multiplicity
    draws = torch.arange(example, len(rows[0]), examples)
    for group in draws.chunk(_DRAW_GROUPS):
        value = loss(*(tensor[group.to(tensor.device)] for tensor in rows)).sum()
        parts = torch.autograd.grad(value, list(params.values()), allow_unused=True)
        for name, part in zip(params, parts, strict=True):
            if part is not None:
                total[name] += part.to_dense() if part.is_sparse else part
    return {name: gradient / multiplicity for name, gradient in total.items()}


def _engine_sum(
    engine: CheckedEngine, loss: RowLoss, rows: tuple[Tensor, ...], multiplicity: int
) -> Gradient:
    params = _named_trainable(engine.net)
    for param in params.values():
        param.grad = None
    engine.accumulate(loss, rows, multiplicity)
    # A parameter without `.grad` is one the engine does not cover; as zeros it fails the
    # comparison.
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.double()
        for name, p in params.items()
    }


def _weighted(gradients: Sequence[Gradient], factors: Tensor) -> Gradient:
    return {
        name: sum((f * g[name] for f, g in zip(factors, gradients, strict=True)), torch.zeros(()))
        for name in gradients[0]
    }


def _norm(gradient: Gradient) -> Tensor:
    return torch.stack([part.double().norm().cpu() for part in gradient.values()]).norm()


def _compare(found: Gradient, expected: Gradient, limit: float, what: str) -> None:
    """Raise for the parameter that is furthest off, in units of its own expected norm.

    A gradient that is zero in exact arithmetic (an attention key's bias) is rounding noise: errors
    below 1e-3 of the limit relative to the whole gradient are none.
    """
    noise = 1e-3 * float(_norm(expected))
    errors = {}
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm())
        # Not finite compares false with everything, and must not pass.
        errors[name] = error / (float(gradient.norm()) + noise) if error < float("inf") else error
    worst = max(
        errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf")
    )
    if not errors[worst] <= limit:
        raise UserError(
            f"the clipping engine's self-check failed at parameter {worst}: its {what} is off by"
            f" {errors[worst]:.1e} of its size (at most {limit:.0e} may be);"
            " either a row's loss depends on other rows, or privacy.engine=loop would work"
        )


def _tolerance(net: nn.Module) -> float:
    params = list(_named_trainable(net).values())
    device = params[0].device.type
    if all(param.dtype == torch.float64 for param in params):
        return 1e-8
    tf32 = multiplies_in_tf32(params[0].device)
    half = any(param.dtype in (torch.float16, torch.bfloat16) for param in params)
    return 5e-2 if half or tf32 or torch.is_autocast_enabled(device) else 1e-3


def _perturb(net: nn.Module) -> None:
    with torch.no_grad():
        for param in _named_trainable(net).values():
            size = param.std(correction=0) * _RELATIVE_MOVE + _LEAST_MOVE
            param.add_(torch.randn_like(param) * size)


@contextmanager
def _everything_restored(engine: CheckedEngine) -> Iterator[None]:
    """Evaluation mode and a fixed seed inside; everything as it was outside."""
    net = engine.net
    modes = {module: module.training for module in net.modules()}
    tensors = [*net.parameters(), *net.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    grads = {param: param.grad for param in net.parameters()}
    max_grad_norm, clipping = engine.max_grad_norm, engine.clipping
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(_SEED)
            net.eval()
            yield
    finally:
        engine.max_grad_norm, engine.clipping = max_grad_norm, clipping
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for module, training in modes.items():
            module.training = training
        for param, grad in grads.items():
            param.grad = grad
