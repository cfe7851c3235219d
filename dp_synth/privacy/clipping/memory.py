"""How many rows one backward may take: measured on two small ones, then a matter of division."""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dp_synth.errors import UserError

MIB = 2**20
# Where no budget is given. On a CPU still more rows at once are only slower, since allocations
# beyond 32 MiB come as fresh pages every time; a GPU may want all that it can hold.
_CPU_BYTES = 896 * MIB
_GPU_SHARE = 0.8
# Kernels' own scratch memory and what an allocator cannot use again, over what tensors take.
_OVERHEAD = 1.6


@dataclass(frozen=True)
class Chunk:
    """What one backward takes: `draws` draws of each of `examples` examples.

    Where `draws` is less than the multiplicity, `examples` is 1.
    """

    examples: int
    draws: int

    @property
    def rows(self) -> int:
        """Rows of one backward."""
        return self.examples * self.draws


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a backward beside the network's weights, as a linear function of its chunk.

    Attributes:
        fixed: the sum of gradients, and what else does not grow.
        per_row: activations and their gradients.
        per_example: gradients that are written out side by side.
    """

    fixed: float
    per_row: float
    per_example: float

    def writing(self, gradient_bytes: int) -> "MemoryUse":
        """Return this with `gradient_bytes` per example to write gradients out."""
        return replace(self, per_example=gradient_bytes * _OVERHEAD)

    def of(self, chunk: Chunk) -> float:
        """Return the peak of a chunk, in bytes."""
        return self.fixed + chunk.rows * self.per_row + chunk.examples * self.per_example

    def largest_chunk(self, budget: float, multiplicity: int) -> Chunk:
        """Return the largest chunk within `budget` bytes for examples of `multiplicity` draws.

        Raises:
            UserError: not even one row fits.
        """
        examples = (budget - self.fixed) // (multiplicity * self.per_row + self.per_example)
        if examples >= 1:
            return Chunk(int(examples), multiplicity)
        draws = (budget - self.fixed - self.per_example) // self.per_row
        if draws >= 1:
            return Chunk(1, int(draws))
        least = math.ceil(self.of(Chunk(1, 1)) / MIB)
        raise UserError(
            f"trainer.memory_mib={budget / MIB:g} does not hold the backward of one row:"
            f" {least} or more works"
        )


def default_budget(use: MemoryUse, device: torch.device) -> float:
    """Return the bytes that a backward may take on `device` where the user names none."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds and does not use is free, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + unused) * _GPU_SHARE
    return use.fixed + _CPU_BYTES


def measure(backward: Callable[[int], Any]) -> MemoryUse:
    """Return the memory use of a network, from backwards of one row and of two.

    Args:
        backward: makes a backward of that many draws of one example. What it needs whatever their
            number is fixed here, also the example's gradients.
    """
    one, two = _peak_bytes(backward, 1), _peak_bytes(backward, 2)
    per_row = max(two - one, 1)
    return MemoryUse(max(one - per_row, 0) * _OVERHEAD, per_row * _OVERHEAD, per_example=0.0)


def _peak_bytes(backward: Callable[[int], Any], draws: int) -> int:
    with _LiveBytes() as counted:
        backward(draws)
    return counted.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside and still alive, and their peak; on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_plain(t)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if _is_plain(tensor):
                self._count(tensor.untyped_storage(), before)
        return made

    def _count(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        if storage in self._seen or id(storage) in before:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._live -= size


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
