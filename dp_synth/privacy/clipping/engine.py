"""The clipping engine: cuts rows into chunks and adds their clipped per-example gradients."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from dp_synth.errors import UserError
from dp_synth.privacy.clipping.gradients import ExampleGradients, FlatLayout
from dp_synth.privacy.clipping.layers import (
    Recording,
    UnsupportedInput,
    recorded_forward,
    why_unsupported,
)
from dp_synth.privacy.clipping.loop import RowLoss, example_gradient, row_losses

logger = logging.getLogger("dp_synth")

# Per-example gradients in one backward where micro_batch_size is unset. More is slower on a CPU:
# allocations beyond 32 MiB a layer come as fresh pages every time.
_CPU_MATRIX_BYTES = 256 * 2**20
_GPU_MATRIX_BYTES = 4 * 2**30


class ClippingEngine:
    """Exact sums of clipped per-example gradients for any network, fast for the usual layers.

    Guarantee: `accumulate` adds sum_i clip(mean_k grad_ik, max_grad_norm), so one example moves
    the sum by at most `max_grad_norm` (up to rounding), however the rows are chunked and whichever
    path is taken. Abadi et al. 2016 (arXiv 1607.00133), algorithm 1, with the augmentation
    multiplicity of De et al. 2022 (arXiv 2204.13650): draws are averaged, then clipped once.

    Between calls the network is untouched: same modules, same state_dict keys, same forward.

    Args:
        net: the network; its parameters that require grad when `accumulate` is called are the
            trained ones.
        max_grad_norm: the L2 bound of one example's contribution, > 0.
        micro_batch_size: rows of one backward. Where it holds fewer rows than one example has
            draws, the draws are spread over several backwards and clipped after. None takes as many
            examples at once as have per-example gradients of 256 MiB on a CPU, 4 GiB elsewhere, and
            at least one.
        mode: "auto" records with a rule per layer and falls back to "loop", one example per
            backward, where a trainable parameter's layer has no rule.

    Attributes:
        fallback_reason: why the loop is taken although the mode is "auto", with the layer's name;
            or None.

    Raises:
        UserError: a value out of range, no trainable parameter, or a layer that mixes or remembers
            examples.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> engine = ClippingEngine(net, max_grad_norm=1.0)
        >>> rows = (torch.randn(8, 3),)  # two draws of four examples
        >>> engine.accumulate(lambda x: net(x).square().sum(1), rows, multiplicity=2)
        >>> bool(net.weight.grad.norm() <= 4.0)
        True
    """

    def __init__(
        self,
        net: nn.Module,
        max_grad_norm: float,
        micro_batch_size: int | None = None,
        mode: Literal["auto", "loop"] = "auto",
    ) -> None:
        if not (max_grad_norm > 0 and math.isfinite(max_grad_norm)):
            raise UserError(f"max_grad_norm must be a finite number above 0, not {max_grad_norm}")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise UserError(f"micro_batch_size must be at least 1 or unset, not {micro_batch_size}")
        if mode not in ("auto", "loop"):
            raise UserError(f"the clipping engine's mode must be auto or loop, not {mode!r}")
        _refuse_batch_statistics(net)
        self.net = net
        self.max_grad_norm = max_grad_norm
        self.micro_batch_size = micro_batch_size
        self.mode = mode
        self.fallback_reason: str | None = None
        self._removed = False
        self._layout = FlatLayout(_trainable(net))
        self._matrix = self._layout.zeros(0)
        self._choose_path()

    def accumulate(self, loss: RowLoss, rows: tuple[Tensor, ...], multiplicity: int = 1) -> None:
        """Add sum_i clip(mean_k grad_ik, max_grad_norm) to each trainable parameter's `.grad`.

        A missing `.grad` is made, also for B = 0, where the sum is zero and `loss` is not called.
        An example whose gradient is not finite contributes nothing. If `loss` raises, no `.grad`
        has changed.

        Args:
            loss: tensors of R rows -> one loss per row, [R]; a row's loss depends on that row
                alone. It calls the network, and is called once per chunk.
            rows: tensors with K * B leading rows, draw-major: row n = k * B + i is draw k of
                example i.
            multiplicity: K, draws per example, >= 1.

        Raises:
            UserError: rows that do not divide into draws, or a loss of the wrong shape.
        """
        if self._removed:
            raise RuntimeError("this clipping engine has been removed from its network")
        examples = _count_examples(rows, multiplicity)
        self._follow_trainable_parameters()
        split = [tensor.detach().unflatten(0, (multiplicity, examples)) for tensor in rows]
        with torch.enable_grad():
            total = self._clipped_sum(loss, split)
        self._layout.add_to_grads(total)

    def remove(self) -> None:
        """Let go of the network, which is as it was but for its `.grad`; no more sums after."""
        self._removed = True
        self._matrix = self._layout.zeros(0)

    def _clipped_sum(self, loss: RowLoss, split: Sequence[Tensor]) -> Tensor:
        """Return the clipped sum over all examples of `split`, tensors [K, B, ...]."""
        multiplicity = len(split[0])
        draws_fit = self.micro_batch_size is None or multiplicity <= self.micro_batch_size
        if self.mode == "auto" and self.fallback_reason is None and draws_fit:
            try:
                return self._clipped_sum_recorded(loss, split)
            except UnsupportedInput as error:
                self._fall_back(str(error))
        return self._clipped_sum_looped(loss, split)

    def _clipped_sum_recorded(self, loss: RowLoss, split: Sequence[Tensor]) -> Tensor:
        multiplicity, examples = split[0].shape[:2]
        step = self._examples_at_once(multiplicity)
        total = self._layout.zeros()
        for start in range(0, examples, step):
            rows = [tensor[:, start : start + step].flatten(0, 1) for tensor in split]
            grads = self._record(loss, rows, multiplicity)
            total += grads.clipped_sum(self.max_grad_norm)
        return total

    def _examples_at_once(self, multiplicity: int) -> int:
        if self.micro_batch_size is not None:
            return self.micro_batch_size // multiplicity
        budget = _CPU_MATRIX_BYTES if self._layout.device.type == "cpu" else _GPU_MATRIX_BYTES
        return max(1, budget // (self._layout.size * self._layout.dtype.itemsize))

    def _record(self, loss: RowLoss, rows: Sequence[Tensor], multiplicity: int) -> ExampleGradients:
        """Return each example's gradient of its mean loss, by one backward over all rows."""
        grads = ExampleGradients(self._layout, self._memory(len(rows[0]) // multiplicity))
        anchor = torch.zeros((), device=self._layout.device, requires_grad=True)
        with self._patched(Recording(grads, multiplicity, anchor)):
            losses = row_losses(loss, rows)
            # Autocast belongs to the forward; its casts are in the graph already.
            with torch.autocast(losses.device.type, enabled=False):
                (losses.sum() / multiplicity).backward()
        return grads

    def _clipped_sum_looped(self, loss: RowLoss, split: Sequence[Tensor]) -> Tensor:
        multiplicity, examples = split[0].shape[:2]
        step = min(self.micro_batch_size or multiplicity, multiplicity)
        total = self._layout.zeros()
        for i in range(examples):
            draws = [tensor[:, i] for tensor in split]
            grads = example_gradient(self._layout, loss, draws, step, self._memory(1))
            total += grads.clipped_sum(self.max_grad_norm)
        return total

    @contextmanager
    def _patched(self, recording: Recording) -> Iterator[None]:
        """Swap in recording forwards and switch parameters' gradients off; undo both at the end.

        Forwards are set on the instances, so that module types, hooks and state_dict keys stay.
        """
        layers = list(_layers_with_trainable(self.net))
        try:
            for name, layer in layers:
                vars(layer)["forward"] = recorded_forward(name, layer, recording)
            for param in self._layout.params:
                param.requires_grad_(False)
            yield
        finally:
            for param in self._layout.params:
                param.requires_grad_(True)
            for _, layer in layers:
                vars(layer).pop("forward", None)

    def _memory(self, examples: int) -> Tensor:
        """Return memory [examples, size], kept between calls: fresh pages cost a pass."""
        if len(self._matrix) < examples:
            self._matrix = self._layout.zeros(examples)
        return self._matrix[:examples]

    def _follow_trainable_parameters(self) -> None:
        """Notice parameters frozen or freed since the last call."""
        params = _trainable(self.net)
        if [id(param) for param in params] != [id(param) for param in self._layout.params]:
            self._layout = FlatLayout(params)
            self._matrix = self._layout.zeros(0)
            self._choose_path()

    def _choose_path(self) -> None:
        if self.mode == "auto" and self.fallback_reason is None:
            reason = _why_loop(self.net)
            if reason is not None:
                self._fall_back(reason)

    def _fall_back(self, reason: str) -> None:
        self.fallback_reason = reason
        logger.warning("clipping one example at a time, which is slower: %s", reason)


def _trainable(net: nn.Module) -> list[nn.Parameter]:
    params = [param for param in net.parameters() if param.requires_grad]
    if not params:
        raise UserError("the network has no trainable parameter: nothing to clip")
    return params


def _layers_with_trainable(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for each module that owns a trainable parameter directly."""
    for name, module in net.named_modules():
        if any(param.requires_grad for param in module.parameters(recurse=False)):
            yield name or "the network itself", module


def _why_loop(net: nn.Module) -> str | None:
    for name, module in net.named_modules():
        # Compiled code has read the forwards already, so that swapping them would record nothing.
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return f"{name or 'the network itself'}: compiled"
    for name, module in _layers_with_trainable(net):
        reason = why_unsupported(module)
        if reason is not None:
            return f"{name} ({type(module).__name__}): {reason}"
    return None


def _refuse_batch_statistics(net: nn.Module) -> None:
    """Refuse layers that mix examples, or keep statistics of private images in their buffers."""
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and (
            isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats
        ):
            raise UserError(
                f"{name} ({type(module).__name__}) keeps statistics over examples, which no"
                " clipping bounds: use GroupNorm in its place"
            )


def _count_examples(rows: tuple[Tensor, ...], multiplicity: int) -> int:
    if multiplicity < 1:
        raise UserError(f"multiplicity must be at least 1, not {multiplicity}")
    lengths = {len(tensor) for tensor in rows}
    if len(lengths) != 1:
        raise UserError(f"rows must be tensors of one common length, not of {sorted(lengths)}")
    (length,) = lengths
    if length % multiplicity:
        raise UserError(
            f"{length} rows do not divide into multiplicity={multiplicity} draws per example"
        )
    return length // multiplicity
