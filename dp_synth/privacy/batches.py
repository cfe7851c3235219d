"""Which examples enter which step, as index arrays: Poisson batches and public epochs."""

from collections.abc import Iterator

import numpy as np

from dp_synth.privacy.randomness import Randomness


class PoissonBatches:
    """Each example enters each step on its own with probability `sample_rate`.

    Yields exactly `steps - first_step` int64 index arrays, ascending, of random length; an empty
    one is a step like any other and must be taken. Fit for a DataLoader's `batch_sampler`.
    The size of a batch is private: it must reach no log.
    """

    def __init__(
        self,
        sample_rate: float,
        num_examples: int,
        steps: int,
        randomness: Randomness,
        first_step: int = 0,
    ) -> None:
        self.sample_rate = sample_rate
        self.num_examples = num_examples
        self.steps = steps
        self.first_step = first_step
        self._randomness = randomness

    def __len__(self) -> int:
        return max(self.steps - self.first_step, 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(self.first_step, self.steps):
            uniforms = self._randomness.selection(step, self.num_examples)
            yield np.flatnonzero(uniforms < self.sample_rate)


class EpochBatches:
    """Shuffled epochs for public training: exactly `steps` batches of exactly `batch_size`.

    The order is keyed by (seed, epoch), so that `first_step` continues where a run stopped. What is
    left over at an epoch's end is dropped; the next epoch shuffles all examples again.
    """

    def __init__(
        self,
        batch_size: int,
        num_examples: int,
        steps: int,
        randomness: Randomness,
        first_step: int = 0,
    ) -> None:
        if not 1 <= batch_size <= num_examples:
            raise ValueError(f"batch_size={batch_size} must lie in 1..{num_examples}")
        self.batch_size = batch_size
        self.num_examples = num_examples
        self.steps = steps
        self.first_step = first_step
        self._randomness = randomness

    def __len__(self) -> int:
        return max(self.steps - self.first_step, 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        batches_per_epoch = self.num_examples // self.batch_size
        epoch_in_hand = -1
        for step in range(self.first_step, self.steps):
            epoch, place = divmod(step, batches_per_epoch)
            if epoch != epoch_in_hand:
                order = self._randomness.selection(epoch, self.num_examples).argsort()
                epoch_in_hand = epoch
            yield order[place * self.batch_size : (place + 1) * self.batch_size]
