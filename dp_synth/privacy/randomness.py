"""Where randomness comes from: secret for private training, seeded for public training and tests.

Whoever can guess the noise, the batches or an example's own draws can undo the guarantee of DP-SGD:
in private training none of them depends on a seed that anyone knows.
"""

import os
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# First word of every seeded key, so that streams for different purposes never coincide.
_SELECTION, _ROWS, _NOISE = range(3)
_MERSENNE_WORDS = 624


class RowRandomness(Protocol):
    """Draws for the K * B rows of one step, draw-major (row n = k * B + i); each call is fresh."""

    def uniform(self) -> Tensor:
        """Float32 [K*B] in [0, 1)."""

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Float32 [K*B, *shape], standard normal."""


class Randomness(Protocol):
    """Everything random in training, by step."""

    def selection(self, step: int, num_units: int) -> np.ndarray:
        """Float64 [num_units] in [0, 1): unit i is in the batch if entry i is below q."""

    def rows(
        self, step: int, units: Tensor, multiplicity: int, device: torch.device | str
    ) -> RowRandomness:
        """Draws for `multiplicity` rows of each of `units` (int64 [B])."""

    def noise_generator(self, step: int, device: torch.device | str) -> torch.Generator:
        """The generator of the gradient noise of one step."""


class PrivateRandomness:
    """Secret randomness from the operating system: what private training uses.

    Seeds are neither recorded nor derivable: every call asks the system for new entropy, so no two
    streams share a seed and a resumed run draws afresh. Selection is the system's cryptographic
    generator itself; rows and noise are torch generators with as much entropy as they can hold.

    Under `privacy.secure_noise` the noise has a source of its own, `SecureNoise`, and rows stay with
    torch's: an example's contribution is bounded whatever its draws are, their law depends on no
    other example, and none is released but within the noised sum, so that nothing is there from
    which to find the generator's state.
    """

    def __reduce__(self) -> str:
        raise TypeError("PrivateRandomness is secret and has no state to save; make a new one.")

    def selection(self, step: int, num_units: int) -> np.ndarray:
        words = np.frombuffer(os.urandom(8 * num_units), dtype=np.uint64)
        return (words >> np.uint64(11)) * 2.0**-53

    def rows(
        self, step: int, units: Tensor, multiplicity: int, device: torch.device | str
    ) -> RowRandomness:
        return _SharedRows(_secret_generator(device), multiplicity * len(units))

    def noise_generator(self, step: int, device: torch.device | str) -> torch.Generator:
        return _secret_generator(device)


class RepeatablePrivateRandomness:
    """UNSAFE, for tests only: private training whose every draw can be repeated from a seed.

    Keyed by (seed, step, unit): the selection and the draws of a unit do not depend on which other
    units exist or are in the batch, so neighbouring data sets differ in one unit's draws only.
    Draws of rows are made on the CPU and moved, so that they are the same on every device.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def selection(self, step: int, num_units: int) -> np.ndarray:
        # Philox gives one word per value in order: the i-th value does not depend on num_units.
        return _numpy_generator(_SELECTION, self.seed, step).random(num_units)

    def rows(
        self, step: int, units: Tensor, multiplicity: int, device: torch.device | str
    ) -> RowRandomness:
        generators = [_numpy_generator(_ROWS, self.seed, step, int(unit)) for unit in units]
        return _UnitRows(generators, multiplicity, device)

    def noise_generator(self, step: int, device: torch.device | str) -> torch.Generator:
        return _seeded_generator(device, _NOISE, self.seed, step)


class PublicRandomness:
    """Seeded randomness for public training, keyed by (seed, step): fast and repeatable."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def selection(self, step: int, num_units: int) -> np.ndarray:
        return _numpy_generator(_SELECTION, self.seed, step).random(num_units)

    def rows(
        self, step: int, units: Tensor, multiplicity: int, device: torch.device | str
    ) -> RowRandomness:
        generator = _seeded_generator(device, _ROWS, self.seed, step)
        return _SharedRows(generator, multiplicity * len(units))

    def noise_generator(self, step: int, device: torch.device | str) -> torch.Generator:
        return _seeded_generator(device, _NOISE, self.seed, step)


class _SharedRows:
    """Rows drawn together from one generator on its own device."""

    def __init__(self, generator: torch.Generator, num_rows: int) -> None:
        self._generator = generator
        self._num_rows = num_rows

    def uniform(self) -> Tensor:
        device = self._generator.device
        return torch.rand(self._num_rows, generator=self._generator, device=device)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        device = self._generator.device
        return torch.randn((self._num_rows, *shape), generator=self._generator, device=device)


class _UnitRows:
    """Rows drawn by one generator per unit."""

    def __init__(
        self,
        generators: list[np.random.Generator],
        multiplicity: int,
        device: torch.device | str,
    ) -> None:
        self._generators = generators
        self._multiplicity = multiplicity
        self._device = device

    def uniform(self) -> Tensor:
        return self._rows([g.random(self._multiplicity, np.float32) for g in self._generators], ())

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        size = (self._multiplicity, *shape)
        return self._rows([g.standard_normal(size, np.float32) for g in self._generators], shape)

    def _rows(self, draws_BK: list[np.ndarray], shape: tuple[int, ...]) -> Tensor:
        if not draws_BK:
            return torch.empty((0, *shape), device=self._device)
        draws_KB = np.stack(draws_BK, axis=1)
        return torch.from_numpy(draws_KB.reshape(-1, *shape)).to(self._device)


def _numpy_generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _secret_generator(device: torch.device | str) -> torch.Generator:
    return _torch_generator(device, np.frombuffer(os.urandom(4 * _MERSENNE_WORDS), np.uint32))


def _seeded_generator(device: torch.device | str, *key: int) -> torch.Generator:
    return _torch_generator(device, np.random.SeedSequence(key).generate_state(_MERSENNE_WORDS))


def _torch_generator(device: torch.device | str, words: np.ndarray) -> torch.Generator:
    """A torch generator whose whole state is set from random words (uint32 [624]).

    `manual_seed` would keep only 32 bits of its seed on the CPU, few enough to try them all, and
    few enough for two of a long run's streams to coincide.
    """
    generator = torch.Generator(device)
    if generator.device.type == "cpu":
        # Layout of torch's CPU state: seed, two positions, 624 words of Mersenne Twister in 64 bits
        # each, then the cached normals. Position 1 left is a state about to be renewed.
        state = generator.manual_seed(0).get_state().numpy().view(np.uint64).copy()
        state[3 : 3 + _MERSENNE_WORDS] = words
        generator.set_state(torch.from_numpy(state.view(np.uint8)))
        return generator
    seed, offset = (int(word) for word in words[:4].view(np.uint64))
    generator.manual_seed(seed)
    if generator.device.type == "cuda":
        # The counter's start, a multiple of 4, adds 60 secret bits to the key's 64.
        generator.set_offset((offset >> 4) & ~3)
    return generator
