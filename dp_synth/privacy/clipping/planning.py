"""What one backward takes: within the rows or the memory that it may, the fastest that is known."""

import torch

from dp_synth.checks import count, positive
from dp_synth.privacy.clipping.memory import MIB, Chunk, MemoryUse, default_budget


class ChunkPlanner:
    """Decides how many examples, or draws of one, a backward takes.

    Args:
        micro_batch_size: rows of one backward; None leaves it to memory.
        memory_mib: what a backward may take beside the network's weights, in MiB; None is what
            suits the device.

    Attributes:
        fastest: examples at once that were found fastest, by multiplicity; to be added to.

    Raises:
        UserError: a value out of range.
    """

    def __init__(self, micro_batch_size: int | None, memory_mib: float | None) -> None:
        if micro_batch_size is not None:
            count("micro_batch_size", micro_batch_size)
        if memory_mib is not None:
            positive("memory_mib", memory_mib)
        self.micro_batch_size = micro_batch_size
        self.memory_mib = memory_mib
        self.fastest: dict[int, int] = {}
        self._budget: float | None = None  # in bytes

    @property
    def needs_memory_use(self) -> bool:
        """Whether memory decides at all."""
        return self.micro_batch_size is None

    def chunk(self, multiplicity: int, use: MemoryUse, device: torch.device) -> Chunk:
        """Return what one backward takes of examples with `multiplicity` draws.

        Raises:
            UserError: `memory_mib` does not hold one row.
        """
        largest = self.largest_chunk(multiplicity, use, device)
        examples = self.fastest.get(multiplicity, largest.examples)
        if self.memory_mib is None and multiplicity not in self.fastest:
            # Not measured, and far more than is needed to keep a processor busy.
            examples = max(1, largest.examples // 4)
        return Chunk(min(examples, largest.examples), largest.draws)

    def rows_chunk(self, multiplicity: int) -> Chunk:
        """Return what `micro_batch_size` rows hold: whole examples, or draws of one."""
        assert self.micro_batch_size is not None
        examples = self.micro_batch_size // multiplicity
        return Chunk(examples, multiplicity) if examples else Chunk(1, self.micro_batch_size)

    def largest_chunk(self, multiplicity: int, use: MemoryUse, device: torch.device) -> Chunk:
        """Return the most that memory holds; see `MemoryUse.largest_chunk`."""
        if self._budget is None:  # asked for once, while the engine holds nothing
            given = self.memory_mib
            self._budget = default_budget(use, device) if given is None else given * MIB
        return use.largest_chunk(self._budget, multiplicity)

    def timed_examples(self, chunk: Chunk) -> int:
        """Return how many examples to time layers with, which takes memory of its own."""
        return chunk.examples if self.memory_mib is None else max(1, chunk.examples // 2)

    def forget_budget(self) -> None:
        """Ask for free memory anew, for another network or another way."""
        self._budget = None
