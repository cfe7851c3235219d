"""The clipping engine: cuts rows into chunks and adds their clipped per-example gradients."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dp_synth.checks import one_of, positive
from dp_synth.errors import UserError
from dp_synth.privacy.clipping.gradients import (
    CLIPPINGS,
    Clipping,
    ExampleGradients,
    FlatLayout,
)
from dp_synth.privacy.clipping.loop import example_gradient
from dp_synth.privacy.clipping.loss import RowLoss, count_examples, row_losses
from dp_synth.privacy.clipping.memory import MIB, Chunk, MemoryUse, measure
from dp_synth.privacy.clipping.network import (
    layers_with_trainable,
    refuse_batch_statistics,
    trainable_parameters,
)
from dp_synth.privacy.clipping.planning import ChunkPlanner
from dp_synth.privacy.clipping.recording import Chooser, Recording, UnsupportedInput
from dp_synth.privacy.clipping.rules import recorded_forward, why_unrecorded
from dp_synth.privacy.clipping.tuning import LayerWays, TimingsCache, Tuner, fastest_size

logger = logging.getLogger("dp_synth")


@dataclass(frozen=True)
class EnginePlan:
    """How an engine will do its sums; see `ClippingEngine.tune`.

    Attributes:
        chunk: what one backward takes.
        memory_mib: its predicted peak beside the network's weights.
        ways: how each layer's weight gradient is computed, by layer name, where there is a choice.
        fallback_reason: why examples are taken one at a time, or None.
    """

    chunk: Chunk
    memory_mib: float
    ways: dict[str, str]
    fallback_reason: str | None


class ClippingEngine:
    """Exact sums of clipped per-example gradients for any network, fast for the usual layers.

    Guarantee: `accumulate` adds sum_i c_i g_i with g_i = mean_k grad_ik and c_i ||g_i|| at most
    `max_grad_norm`, so one example moves the sum by at most that (up to rounding of the sum),
    however the rows are chunked and whichever path is taken. Abadi et al. 2016 (arXiv 1607.00133),
    algorithm 1, with the augmentation multiplicity of De et al. 2022 (arXiv 2204.13650): draws are
    averaged, then clipped once.

    Between calls the network is untouched: same modules, same state_dict keys, same forward.

    Args:
        net: the network; its parameters that require grad when `accumulate` is called are the
            trained ones.
        max_grad_norm: the L2 bound of one example's contribution, > 0.
        micro_batch_size: rows of one backward. Where it holds fewer rows than one example has
            draws, the draws are spread over several backwards and clipped after. None takes the
            number of `memory_mib` that `tune` finds fastest; before that, as many as it holds, or a
            quarter of them where it is None.
        mode: "auto" records with a rule per layer and falls back to "loop", one example per
            backward, where a trainable parameter's layer has no rule.
        clipping: how a norm becomes a factor; see `gradients.clip_factors`.
        memory_mib: what a backward may take beside the network's weights, in MiB, > 0; an estimate
            from the tensors of two small ones, with six tenths on top for kernels and allocator.
            None is 896 more than what does not grow with the rows on a CPU, and four fifths of what
            is free on a GPU.

    Attributes:
        fallback_reason: why the loop is taken although the mode is "auto", with the layer's name;
            or None.
        norms: ||g_i|| of the last sum's examples, float64, in parts; as private as these are.

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
        clipping: Clipping = "flat",
        memory_mib: float | None = None,
    ) -> None:
        positive("max_grad_norm", max_grad_norm)
        one_of("mode", mode, ("auto", "loop"))
        one_of("clipping", clipping, CLIPPINGS)
        refuse_batch_statistics(net)
        self.net = net
        self.max_grad_norm = max_grad_norm
        self.mode = mode
        self.clipping = clipping
        self.fallback_reason: str | None = None
        self.norms: list[Tensor] = []
        self._removed = False
        self._state: list[tuple[int, object, object]]
        self._layers: list[tuple[str, nn.Module]]
        self._layout: FlatLayout
        self._matrix: Tensor
        self._knows_written: bool
        self._measured: MemoryUse | None
        self._planner = ChunkPlanner(micro_batch_size, memory_mib)
        self._ways = LayerWays()
        self._forget()
        self._choose_path()

    def accumulate(self, loss: RowLoss, rows: tuple[Tensor, ...], multiplicity: int = 1) -> None:
        """Add sum_i c_i mean_k grad_ik to each trainable parameter's `.grad`.

        A missing `.grad` is made, also for B = 0, where the sum is zero and `loss` is not called.
        An example whose gradient is not finite contributes nothing. If `loss` raises, no `.grad`
        has changed.

        Args:
            loss: tensors of R rows -> one loss per row, [R]; a row's loss depends on that row
                alone. It calls the network, and is called once per chunk; the first time also on a
                row and on two, to measure memory, where no micro_batch_size is given.
            rows: tensors with K * B leading rows, draw-major: row n = k * B + i is draw k of
                example i.
            multiplicity: K, draws per example, >= 1.

        Raises:
            UserError: rows that do not divide into draws, a loss of the wrong shape, or a
                `memory_mib` that does not hold one row.
        """
        split = self._split(rows, multiplicity)
        with torch.enable_grad():
            total = self._clipped_sum(loss, split)
        self._layout.add_to_grads(total)

    def tune(
        self,
        loss: RowLoss,
        rows: tuple[Tensor, ...],
        multiplicity: int = 1,
        batch_size: int | None = None,
        cache: Path | None = None,
    ) -> EnginePlan:
        """Time every way to each layer's gradients on rows of the run's shapes; use the fastest.

        Also how many examples to take at once, where no micro_batch_size is given. The sum is the
        same up to rounding; `.grad` stays as it is. Costs up to fifteen sums over a chunk, and
        three calls of each way for each shape of layer: seconds, once per machine with `cache`.
        Without it, ways are chosen by rules of thumb.

        Args:
            loss: as for `accumulate`.
            rows: random rows of the run's shapes, never private ones; K * B of them, draw-major,
                B >= 1. They are repeated to fill a chunk.
            multiplicity: K.
            batch_size: the expected examples of a call, above which no chunk is tried; None is no
                limit.
            cache: a file of what was measured earlier on this machine, or None.

        Raises:
            UserError: no example, or as for `accumulate`.
        """
        split = self._split(rows, multiplicity)
        if not split[0].shape[1]:
            raise UserError("tuning needs the rows of at least one example")
        with torch.enable_grad():
            if self._records(self._chunk(loss, split), multiplicity):
                self._find_fastest(loss, split, cache, batch_size)
            chunk = self._chunk(loss, split)
            memory_mib = self._memory_use(loss, split).of(chunk) / MIB
        return EnginePlan(chunk, memory_mib, self._ways.as_dict(), self.fallback_reason)

    def remove(self) -> None:
        """Let go of the network, which is as it was but for its `.grad`; no more sums after."""
        self._removed = True
        self._matrix = self._layout.zeros(0, 0)

    def _split(self, rows: tuple[Tensor, ...], multiplicity: int) -> list[Tensor]:
        """View rows as tensors [K, B, ...] that require no gradient."""
        if self._removed:
            raise RuntimeError("this clipping engine has been removed from its network")
        examples = count_examples(rows, multiplicity)
        self._follow_network()
        return [tensor.detach().unflatten(0, (multiplicity, examples)) for tensor in rows]

    # ------------------------------------------------------------------------------- clipped sums

    def _clipped_sum(self, loss: RowLoss, split: Sequence[Tensor]) -> Tensor:
        """Return the clipped sum over all examples of `split`, tensors [K, B, ...]."""
        if not split[0].shape[1]:
            self.norms = []
            return self._layout.zeros(self._layout.size)
        return self._clipped_sum_in_chunks(loss, split, self._chunk(loss, split))

    def _clipped_sum_in_chunks(
        self, loss: RowLoss, split: Sequence[Tensor], chunk: Chunk
    ) -> Tensor:
        if self._records(chunk, multiplicity=len(split[0])):
            try:
                return self._clipped_sum_recorded(loss, split, chunk.examples)
            except UnsupportedInput as error:
                self._fall_back(str(error))
        return self._clipped_sum_looped(loss, split, chunk.draws)

    def _records(self, chunk: Chunk, multiplicity: int) -> bool:
        """Whether chunks are recorded; where not all draws fit, autograd adds them up itself."""
        has_rules = self.mode == "auto" and self.fallback_reason is None
        return has_rules and chunk.draws == multiplicity

    def _clipped_sum_recorded(
        self, loss: RowLoss, split: Sequence[Tensor], examples_at_once: int
    ) -> Tensor:
        examples = split[0].shape[1]
        self.norms = []
        total = self._layout.zeros(self._layout.size)
        chunks = -(-examples // examples_at_once)
        for part in zip(*(tensor.tensor_split(chunks, dim=1) for tensor in split), strict=True):
            total = self._add_chunk(loss, part, total)
        return total

    def _add_chunk(self, loss: RowLoss, part: Sequence[Tensor], total: Tensor) -> Tensor:
        """Return `total` with one chunk's clipped sum added; its gradients are let go of."""
        grads = self._record(loss, part, self._ways)
        self.norms.append(grads.add_clipped_sum(total, self.max_grad_norm, self.clipping))
        return self._give_memory_to_written(grads, total)

    def _clipped_sum_looped(
        self, loss: RowLoss, split: Sequence[Tensor], draws_at_once: int
    ) -> Tensor:
        self.norms = []
        total = self._layout.zeros(self._layout.size)
        for i in range(split[0].shape[1]):
            draws = [tensor[:, i] for tensor in split]
            memory = self._memory(1, self._layout.size)
            grads = example_gradient(self._layout, loss, draws, draws_at_once, memory)
            self.norms.append(grads.add_clipped_sum(total, self.max_grad_norm, self.clipping))
        return total

    def _record(self, loss: RowLoss, part: Sequence[Tensor], chooser: Chooser) -> ExampleGradients:
        """Return each example's gradient of its mean loss, by one backward over [K, b, ...]."""
        multiplicity, examples = part[0].shape[:2]
        columns = self._layout.stored_size if self._knows_written else 0
        grads = ExampleGradients(self._layout, self._memory(examples, columns))
        anchor = torch.zeros((), device=self._layout.device, requires_grad=True)
        with self._patched(Recording(grads, multiplicity, anchor, chooser)):
            losses = row_losses(loss, [tensor.flatten(0, 1) for tensor in part])
            # Autocast belongs to the forward; its casts are in the graph already.
            with torch.autocast(losses.device.type, enabled=False):
                # To the layers alone: whatever else the loss depends on gets no gradient here.
                (losses.sum() / multiplicity).backward(inputs=[anchor])
        return grads

    @contextmanager
    def _patched(self, recording: Recording) -> Iterator[None]:
        """Swap in recording forwards and switch parameters' gradients off; undo both at the end.

        Forwards are set on the instances, so that module types, hooks and state_dict keys stay.
        """
        try:
            for name, layer in self._layers:
                vars(layer)["forward"] = recorded_forward(name, layer, recording)
            for param in self._layout.params:
                param.requires_grad_(False)
            yield
        finally:
            for param in self._layout.params:
                param.requires_grad_(True)
            for _, layer in self._layers:
                vars(layer).pop("forward", None)

    # --------------------------------------------------------------------------- memory and chunks

    def _chunk(self, loss: RowLoss, split: Sequence[Tensor]) -> Chunk:
        """Return what one backward takes of `split`, tensors [K, B, ...]."""
        multiplicity = len(split[0])
        if not self._planner.needs_memory_use:
            return self._planner.rows_chunk(multiplicity)
        return self._planner.chunk(multiplicity, self._memory_use(loss, split), self._layout.device)

    def _memory_use(self, loss: RowLoss, split: Sequence[Tensor]) -> MemoryUse:
        """Return the bytes that backwards of these rows take; measured once, on the first row."""
        if self._measured is None:
            row = [tensor[:1, :1] for tensor in split]
            try:
                self._measured = measure(lambda draws: self._measured_backward(loss, row, draws))
            except UnsupportedInput as error:
                self._fall_back(str(error))
                return self._memory_use(loss, split)
        # The largest layer's gradients are there twice while they are written, and its inner
        # products take up to twice as much as they would.
        numbers = self._layout.stored_size + 2 * self._layout.largest
        return self._measured.writing(numbers * self._layout.dtype.itemsize)

    def _measured_backward(self, loss: RowLoss, row: Sequence[Tensor], draws: int) -> None:
        self._matrix = self._layout.zeros(0, 0)
        draws_of_one = [tensor.repeat_interleave(draws, 0) for tensor in row]
        if self._records(Chunk(1, draws), draws):
            total = self._layout.zeros(self._layout.size)
            grads = self._record(loss, draws_of_one, LayerWays())
            grads.add_clipped_sum(total, self.max_grad_norm, self.clipping)
        else:
            self._clipped_sum_looped(loss, draws_of_one, draws)

    def _memory(self, examples: int, columns: int) -> Tensor:
        """Return memory [examples, columns], kept between calls: fresh pages cost a pass."""
        if self._matrix.shape[0] < examples or self._matrix.shape[1] != columns:
            self._matrix = self._layout.zeros(0, 0)  # let go of the old one first
            self._matrix = self._layout.zeros(examples, columns)
        return self._matrix[:examples]

    def _give_memory_to_written(self, grads: ExampleGradients, total: Tensor) -> Tensor:
        """After the first chunk, keep columns only for gradients that are written out."""
        if self._knows_written:
            return total
        self._knows_written = True
        old, self._layout = self._layout, FlatLayout(self._layout.params, grads.book_kept)
        return old.rearrange(total, self._layout)

    # ---------------------------------------------------------------------------- choice of a path

    def _find_fastest(
        self, loss: RowLoss, split: Sequence[Tensor], path: Path | None, batch_size: int | None
    ) -> None:
        """Measure first how many examples to take at once, then the layers' ways for so many."""
        cache = TimingsCache(path, self._layout.device)
        # What is written out, and so how many examples fit, shows when one is recorded.
        one = _repeat_examples(split, 1)
        try:
            self._clipped_sum_recorded(loss, one, 1)
            if self._planner.needs_memory_use:
                self._time_chunks(loss, split, cache, batch_size or sys.maxsize)
            tuner = Tuner(cache.ways)
            examples = self._planner.timed_examples(self._chunk(loss, split))
            self._record(loss, _repeat_examples(split, examples), tuner)
            self._ways.take(tuner.ways)
            self._forget()
            self._clipped_sum_recorded(loss, one, 1)
        except UnsupportedInput as error:
            self._fall_back(str(error))
        cache.save()

    def _time_chunks(
        self, loss: RowLoss, split: Sequence[Tensor], cache: TimingsCache, most: int
    ) -> None:
        """Find the number of examples, a sixteenth to all of what fits, that is fastest."""
        multiplicity = len(split[0])
        use = self._memory_use(loss, split)
        fits = self._planner.largest_chunk(multiplicity, use, self._layout.device)
        largest = min(most, fits.examples)
        key = (
            f"{type(self.net).__name__} of {self._layout.size} trained, {split[0].dtype} autocast"
            f" {torch.is_autocast_enabled(self._layout.device.type)}, {self._measured},"
            f" K={multiplicity}, at most {largest}"
        )
        if key not in cache.sizes:
            cache.sizes[key] = fastest_size(
                largest,
                lambda size: self._clipped_sum_recorded(loss, _repeat_examples(split, size), size),
            )
        self._planner.fastest[multiplicity] = cache.sizes[key]

    def _forget(self) -> None:
        """Start afresh with the network as it is now."""
        self._state = _state_of(self.net)
        self._layers = list(layers_with_trainable(self.net))
        self._layout = FlatLayout(list(trainable_parameters(self.net).values()))
        self._matrix = self._layout.zeros(0, 0)
        self._knows_written = False
        self._measured = None
        self._planner.forget_budget()

    def _follow_network(self) -> None:
        """Notice what was frozen, freed, moved, replaced or compiled since the last call."""
        if _state_of(self.net) != self._state:
            self._forget()
            self._planner.fastest.clear()
            self.fallback_reason = None
        self._choose_path()

    def _choose_path(self) -> None:
        if self.mode == "auto" and self.fallback_reason is None:
            reason = why_unrecorded(self.net)
            if reason is not None:
                self._fall_back(reason)

    def _fall_back(self, reason: str) -> None:
        self.fallback_reason = reason
        self._forget()
        logger.warning("clipping one example at a time, which is slower: %s", reason)


def _state_of(net: nn.Module) -> list[tuple[int, object, object]]:
    """Return what must not change for what is known about a network to hold."""
    layers = [(id(layer), None, None) for _, layer in layers_with_trainable(net)]
    params = trainable_parameters(net).values()
    return [*layers, *((id(param), param.dtype, param.device) for param in params)]


def _repeat_examples(split: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return tensors [K, count, ...] with the examples of `split` in turn."""
    index = torch.arange(count) % split[0].shape[1]
    return [tensor[:, index.to(tensor.device)] for tensor in split]
