"""Sources of the Gaussian noise that is added to a sum: a torch generator, or a cryptographic one.

Neither has to do with the public seed.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from dp_synth.errors import UserError
from dp_synth.privacy.rounded_gaussian import Keystream, rounded_gaussian

# Whole numbers up to here are exact in float64, and so are their sums and roundings.
_LARGEST_WHOLE = 2.0**52
# Standard deviations that a draw exceeds with a chance of 2^-188: of no draw that is ever made.
_REACH = 16
_LENGTHENING = 2.0**-14
_AT_ONCE = 2**18


class GaussianNoise(Protocol):
    """Noise for one sum; a further sum needs another one."""

    def add_to(self, total: Tensor) -> Tensor:
        """`total` [any shape] with independent noise on every entry; same shape, type, device."""


class GeneratorNoise:
    """Noise as torch draws it, added in floating point.

    Guarantee: ideal Gaussian noise up to rounding, whose low-order bits tell of the sum (Mironov
    2012, doi 10.1145/2382196.2382264; Jin et al. 2022, arXiv 2112.05307), and up to the
    generator, which is no cryptographic one.

    Args:
        std: standard deviation.
        generator: on the device of the sums.
    """

    def __init__(self, std: float, generator: torch.Generator) -> None:
        self.std = std
        self.generator = generator

    def add_to(self, total: Tensor) -> Tensor:
        noise = torch.normal(
            mean=0,
            std=self.std,
            size=total.shape,
            generator=self.generator,
            dtype=total.dtype,
            device=total.device,
        )
        return total + noise


class SecureNoise:
    """Noise from a cryptographic generator, added on a grid so that nothing but the sum is noised.

    Guarantee: `add_to` returns round(s + z) in the sum's own floating-point type, where s is the sum
    moved to the nearest points of the grid of multiples of `spacing`, z is ideal Gaussian noise of
    standard deviation `std` moved to the grid in the same way, and s + z is exact. Since s lies on
    the grid, moving z to it is the same as moving s + z: what is released is computed from s plus
    ideal Gaussian noise, and none of its digits, the last included, tells more of s than that does.

    Moving to the grid can lengthen the difference of two sums of neighbours by `spacing` times the
    square root of the number of entries. The noise is larger by the factor that this makes of
    `max_grad_norm`, at most 1 + 2^-14, so that it stays `noise_multiplier` times the bound.

    What this does not cover: the rounding inside the sum that is given here, by which neighbours may
    differ a little more than by the bound (Casacuberta et al. 2022, arXiv 2207.10635); a break of
    AES-256, which stands in for ideal random bits; float64 functions that err more than
    `rounded_gaussian` assumes; the time that drawing takes (Jin et al. 2022, arXiv 2112.05307).
    After Google's "Secure Noise Generation" (2020,
    github.com/google/differential-privacy/blob/main/common_docs/Secure_Noise_Generation.pdf).
    Opacus' `secure_mode`, a sum of four draws (Holohan and Braghin 2021, arXiv 2107.10138), makes
    the digits harder to read, not meaningless (github.com/meta-pytorch/opacus/issues/616).

    Args:
        noise_multiplier: standard deviation of the noise over `max_grad_norm`, > 0.
        max_grad_norm: by how much the sums of neighbours differ at most, > 0 (L2 norm).
        size: entries of a sum, over all the tensors that `add_to` is given.
        num_examples: how many contributions a sum can have at most.

    Raises:
        UserError: the package `cryptography` is not installed; or a sum of so many entries and
            contributions, or noise so large, that the grid would need more than 52 bits.
    """

    def __init__(
        self, *, noise_multiplier: float, max_grad_norm: float, size: int, num_examples: int
    ) -> None:
        self.spacing = _power_of_two_below(_LENGTHENING * max_grad_norm / math.sqrt(size))
        lengthening = self.spacing * math.sqrt(size) / max_grad_norm
        self.std = noise_multiplier * max_grad_norm * (1 + lengthening)
        largest = num_examples * max_grad_norm + _REACH * self.std
        if largest > _LARGEST_WHOLE * self.spacing:
            raise UserError(
                f"privacy.secure_noise=true cannot add noise of noise_multiplier="
                f"{noise_multiplier:g} exactly to sums of {size} parameters' gradients over "
                f"{num_examples} examples: fewer of either, or privacy.secure_noise=false, would "
                "work."
            )
        self._keystream = Keystream()

    def add_to(self, total: Tensor) -> Tensor:
        noised = torch.empty(total.numel(), dtype=total.dtype, device=total.device)
        # In parts, and on the CPU whatever the device: float64 copies of it all would not fit.
        parts = zip(total.reshape(-1).split(_AT_ONCE), noised.split(_AT_ONCE), strict=True)
        for part, place in parts:
            # The spacing is a power of two: neither the division nor the product rounds.
            on_grid = part.to("cpu", torch.float64).div(self.spacing).round_()
            on_grid += rounded_gaussian(self.std / self.spacing, part.numel(), self._keystream)
            place.copy_(on_grid.mul_(self.spacing))
        return noised.view(total.shape)


def _power_of_two_below(number: float) -> float:
    """The largest power of two that is not above a number > 0."""
    return 2.0 ** (math.frexp(number)[1] - 1)
