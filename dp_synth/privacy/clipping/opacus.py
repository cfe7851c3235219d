"""Opacus behind the face of the clipping engine: a second opinion on every update, by other code.

Opacus keeps each layer's input and output gradient and computes its per-example gradients from them
by `vmap`. Its rules per layer, faster, assume a memory layout that attention does not keep, and go
wrong on these networks; this mode has no such assumption. It costs about twice our engine's time.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from dp_synth.checks import count, one_of, positive
from dp_synth.errors import UserError
from dp_synth.privacy.clipping.gradients import CLIPPINGS, Clipping, clip_factors
from dp_synth.privacy.clipping.loss import RowLoss, count_examples, row_losses
from dp_synth.privacy.clipping.network import (
    layers_with_trainable,
    refuse_batch_statistics,
    trainable_parameters,
)

# Per-example gradients in one backward where micro_batch_size is unset.
_GRADIENT_BYTES = 256 * 2**20
_NOT_BY_VMAP = (nn.EmbeddingBag, nn.RNNBase)
_OTHERWISE = "privacy.engine=auto would work"


class OpacusEngine:
    """Sums of clipped per-example gradients by Opacus, for one draw per example.

    Guarantee: as `ClippingEngine`: `accumulate` adds sum_i c_i g_i, and no example moves the sum by
    more than `max_grad_norm` (up to rounding), however the rows are chunked. Abadi et al. 2016
    (arXiv 1607.00133), algorithm 1.

    Between calls the network is untouched: same modules, same state_dict keys, same forward.

    Args:
        net: the network; its parameters that require grad when `accumulate` is called are the
            trained ones.
        max_grad_norm: the L2 bound of one example's contribution, > 0.
        micro_batch_size: examples in one backward; None takes as many as have per-example gradients
            of 256 MiB, and at least one.
        clipping: how a norm becomes a factor; see `clip_factors`.

    Attributes:
        norms: ||g_i|| of the last sum's examples, float64, in parts; as private as these are.

    Raises:
        UserError: a value out of range, no trainable parameter, or a layer that Opacus cannot do.
    """

    def __init__(
        self,
        net: nn.Module,
        max_grad_norm: float,
        micro_batch_size: int | None = None,
        clipping: Clipping = "flat",
    ) -> None:
        self.max_grad_norm = positive("max_grad_norm", max_grad_norm)
        if micro_batch_size is not None:
            count("micro_batch_size", micro_batch_size)
        one_of("clipping", clipping, CLIPPINGS)
        refuse_batch_statistics(net)
        _trainable(net)
        self.net = net
        self.micro_batch_size = micro_batch_size
        self.clipping = clipping
        self.norms: list[Tensor] = []
        self._removed = False

    def accumulate(self, loss: RowLoss, rows: tuple[Tensor, ...], multiplicity: int = 1) -> None:
        """Add the sum of clipped per-example gradients to each trainable parameter's `.grad`.

        A missing `.grad` is made, also for no rows, where the sum is zero and `loss` is not called.
        An example whose gradient is not finite contributes nothing. If `loss` raises, no `.grad`
        has changed.

        Args:
            loss: tensors of R rows -> one loss per row, [R]; a row's loss depends on that row
                alone. It calls the network itself, once per chunk.
            rows: tensors with one leading row per example.
            multiplicity: 1.

        Raises:
            UserError: another multiplicity, rows of unlike length, a loss of the wrong shape, or a
                parameter whose per-example gradients Opacus does not find.
        """
        if self._removed:
            raise RuntimeError("this clipping engine has been removed from its network")
        if multiplicity != 1:
            raise UserError(
                f"Opacus has no augmentation multiplicity and cannot do {multiplicity} draws per"
                " example: privacy.multiplicity=1 or privacy.engine=auto would work"
            )
        examples = count_examples(rows, multiplicity)
        self.norms = []
        params = _trainable(self.net)
        at_once = self.micro_batch_size or _examples_at_once(list(params.values()))
        double = any(param.dtype == torch.float64 for param in params.values())
        dtype = torch.float64 if double else torch.float32
        total = {name: torch.zeros_like(param, dtype=dtype) for name, param in params.items()}
        with torch.enable_grad(), _opacus_attached(self.net):
            for start in range(0, examples, at_once):
                chunk = [tensor.detach()[start : start + at_once] for tensor in rows]
                gradients = _example_gradients(params, loss, chunk)
                # Autocast would round what the norms have been taken of.
                with torch.autocast(chunk[0].device.type, enabled=False):
                    self._add_clipped(gradients, total)
        for name, param in params.items():
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            param.grad.add_(total[name])

    def remove(self) -> None:
        """Let go of the network, which is as it was but for its `.grad`; no more sums after."""
        self._removed = True

    @torch.no_grad()
    def _add_clipped(self, gradients: dict[str, Tensor], total: dict[str, Tensor]) -> None:
        """Add sum_i c_i g_i of one chunk; `gradients` holds [b, *param.shape] by name."""
        parts = [
            torch.linalg.vector_norm(
                gradient.reshape(len(gradient), -1), dim=1, dtype=torch.float64
            )
            for gradient in gradients.values()
        ]
        norms = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        self.norms.append(norms)
        dtype = next(iter(total.values())).dtype
        factors = clip_factors(norms, self.max_grad_norm, self.clipping, dtype).to(dtype)
        broken = ~norms.isfinite()
        for name, gradient in gradients.items():
            if broken.any():
                gradient[broken] = 0.0  # a factor of zero would not do: 0 * NaN is NaN
            total[name] += torch.mv(gradient.to(dtype).flatten(1).t(), factors).view_as(total[name])


def _example_gradients(
    params: dict[str, nn.Parameter], loss: RowLoss, rows: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return each example's gradient by one backward, as [b, *param.shape] by name.

    A parameter on which no loss depends is left out: its gradients are zero.

    Raises:
        UserError: Opacus missed a parameter, or a use of it.
    """
    losses = row_losses(loss, rows)
    # Autocast belongs to the forward. Opacus' hooks run inside; autograd's own gradients, which come
    # along, say what they missed.
    with torch.autocast(losses.device.type, enabled=False):
        sums = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
    found = {}
    for (name, param), summed in zip(params.items(), sums, strict=True):
        gradient, vars(param)["grad_sample"] = vars(param)["grad_sample"], None
        if gradient is None and summed is None:
            continue
        if not isinstance(gradient, Tensor) or len(gradient) != len(rows[0]):
            raise UserError(
                f"Opacus does not find a gradient of {name} for each example (it is used outside"
                " its layer, the layer's input has no row per example, or activations are"
                f" checkpointed): {_OTHERWISE}"
            )
        found[name] = gradient.view(len(rows[0]), *param.shape)
    return found


@contextmanager
def _opacus_attached(net: nn.Module) -> Iterator[None]:
    """Opacus' hooks are on the network's layers inside; nothing of Opacus is left on it after.

    The wrapper that Opacus makes is not called: its hooks see the layers whoever calls them.
    """
    layers = [layer for _, layer in layers_with_trainable(net)]
    modes = [layer.training for layer in layers]
    holders: list[object] = [*net.modules(), *net.parameters()]
    names = [set(vars(holder)) for holder in holders]
    wrapper = GradSampleModule(net, loss_reduction="sum", force_functorch=True)
    try:
        # Opacus keeps quiet in evaluation mode. These layers have no dropout inside, so that they
        # do the same in both modes.
        for layer in layers:
            layer.train()
        with _known_warnings_silenced():
            yield
    finally:
        wrapper.remove_hooks()
        for layer, training in zip(layers, modes, strict=True):
            layer.training = training
        for holder, before in zip(holders, names, strict=True):
            for name in set(vars(holder)) - before:
                del vars(holder)[name]


@contextmanager
def _known_warnings_silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        # The first layer's input needs no gradient, which is as it should be.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        # An embedding's integer input looks to Opacus like a lower precision.
        warnings.filterwarnings("ignore", message="In .* autocast, but the target d")
        yield


def _trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name; UserError where Opacus cannot do one of them."""
    params = trainable_parameters(net)
    for name, param in net.named_parameters(remove_duplicate=False):
        if param.requires_grad and name not in params:
            raise UserError(f"Opacus cannot do {name}, which several layers share: {_OTHERWISE}")
    for name, layer in layers_with_trainable(net):
        what = f"Opacus cannot do {name} ({type(layer).__name__})"
        if isinstance(layer, _NOT_BY_VMAP):
            raise UserError(f"{what}: {_OTHERWISE}")
        if any(True for _ in layer.buffers()):
            raise UserError(f"{what}, which trains and has buffers: {_OTHERWISE}")
        if any(True for _ in layer.children()):
            raise UserError(f"{what}, which has parameters beside its sublayers': {_OTHERWISE}")
    for name, module in net.named_modules():
        if getattr(module, "inplace", False):
            raise UserError(f"Opacus cannot do {name}, which works in place: {_OTHERWISE}")
    return params


def _examples_at_once(params: Sequence[nn.Parameter]) -> int:
    return max(1, _GRADIENT_BYTES // sum(param.nbytes for param in params))
