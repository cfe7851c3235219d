"""Gaussian random numbers rounded to whole ones without any error, from a cryptographic generator.

Float64 decides nearly all roundings; where its error could reach over a boundary, interval
arithmetic decides, on as many more random bits as that takes (Haney et al. 2022, arXiv 2207.13793).
"""

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_synth.errors import UserError

# What float64 may be off by in a draw of length r is at most _ERROR * (r + 1 / (8 r)) standard
# deviations. Conversion of words, the constant pi and products add up to 2^-48.7 r; logarithm,
# cosine and sine, each within 2 units in the last place, to 2^-49.8 r; the spacing of floating
# point below 1, where u is, to 2^-51.4 / r; the unknown bits after the 63rd of u to 2^-52 r. In all
# that is below 2^-48 (r + 1 / (8 r)), and twice as much is allowed for.
_ERROR = 2.0**-47
# Below, those unknown bits would count for more.
_SMALL = 2.0**-16
_63_BITS = 2**63 - 1


class Keystream:
    """Random words of AES-256 in counter mode, under a key that nobody knows.

    The key is the operating system's entropy, drawn when the object is made and kept nowhere else;
    no seed has any influence. NIST SP 800-38A, section 6.5.

    Raises:
        UserError: the package `cryptography` is not installed.
    """

    def __init__(self) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as error:
            raise UserError(
                "privacy.secure_noise=true needs the package cryptography: "
                "pip install 'dp-synth[secure]', or take privacy.secure_noise=false."
            ) from error
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16)))
        self._encryptor = cipher.encryptor()

    def __reduce__(self) -> str:
        raise TypeError("A Keystream is secret and has no state to save; make a new one.")

    def words(self, count: int) -> Tensor:
        """The next `count` words: int64 [count], uniform over all its values."""
        encrypted = self._encryptor.update(bytes(8 * count))
        return torch.from_numpy(np.frombuffer(bytearray(encrypted), np.int64))


def rounded_gaussian(std: float, count: int, keystream: Keystream) -> Tensor:
    """Whole numbers round(std * g), g ideal standard normal numbers: float64 [count], on the CPU.

    Guarantee: were the keystream ideal, the draws would be independent and have exactly this law,
    also in the tails, provided that torch's float64 log, cos and sin err by at most 2 units in the
    last place. Box and Muller 1958: lengths r = sqrt(-2 ln u) and angles.

    Args:
        std: > 0, and small enough that no draw exceeds 2^52.
        count: how many.
        keystream: where random words are taken from.
    """
    pairs = -(-count // 2)
    lengths, angles = keystream.words(2 * pairs).view(2, pairs)
    lengths &= _63_BITS
    u = lengths.double().add_(0.5).mul_(2.0**-63)
    radius = u.log().mul_(-2).sqrt_()
    angle = angles.double().mul_(math.pi * 2.0**-63)
    drawn = torch.stack([angle.cos(), angle.sin()]).mul_(radius).mul_(std)
    rounded = drawn.round()
    error = radius.reciprocal().mul_(1 / 8).add_(radius).mul_(std * _ERROR)
    undecided = (drawn.sub_(rounded).abs_() > 0.5 - error).any(0) | (u < _SMALL)
    for pair in undecided.nonzero().flatten().tolist():
        exact = _refined(std, int(lengths[pair]), int(angles[pair]), keystream)
        rounded[:, pair] = torch.tensor(exact, dtype=torch.float64)
    return rounded.view(-1)[:count]


def _refined(std: float, length: int, angle: int, keystream: Keystream) -> tuple[int, int]:
    """Both roundings of one pair, whose numbers begin with these bits and go on at random.

    Args:
        std: the standard deviation.
        length: the first 63 bits of u in [0, 1).
        angle: the first 64 bits of a number in [-1, 1), signed; the angle is pi times it.
        keystream: gives the bits after these.
    """
    # A context of its own: the precision of the one that mpmath exports is everybody's.
    from mpmath.ctx_iv import MPIntervalContext

    intervals = MPIntervalContext()
    bits = 63
    while True:
        # Twice as many digits as are known of the numbers: rounding adds next to nothing.
        intervals.prec = 2 * bits + 64
        u = intervals.mpf([length, length + 1]) / 2**bits
        turn = intervals.pi * intervals.mpf([angle, angle + 1]) / 2**bits
        if length > 0:  # else r has no upper bound yet
            scale = std * intervals.sqrt(-2 * intervals.log(u))
            first = _rounding(scale * intervals.cos(turn))
            second = _rounding(scale * intervals.sin(turn))
            if first is not None and second is not None:
                return first, second
        more = keystream.words(2).numpy().view(np.uint64).tolist()
        length, angle = (length << 64) + more[0], (angle << 64) + more[1]
        bits += 64


def _rounding(interval: Any) -> int | None:
    """The whole number that is nearest to all of an interval, or None where there are several."""
    from mpmath import libmp

    # Without a precision these operations are exact.
    ends = (libmp.mpf_add(end, libmp.fhalf) for end in interval._mpi_)
    lowest, highest = (libmp.to_int(end, libmp.round_floor) for end in ends)
    return lowest if lowest == highest else None
