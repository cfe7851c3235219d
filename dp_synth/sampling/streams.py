"""A noise stream of its own for every image, so that image i of a seed is the same in any batch."""

import hashlib
from collections.abc import Iterable

import torch

# Indices that have streams of their own. torch's generator on the CPU keeps the low 32 bits of a
# seed and drops the others, so there are no more streams than that.
NUM_STREAMS = 2**32


def noise_streams(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """The noise streams of some images.

    Args:
        seed: public, 0 or more.
        indices: numbers of the images, each from 0 to ``NUM_STREAMS - 1``.

    Returns:
        A generator on the CPU for each index, whatever device the network is on: a GPU's generator
        draws other numbers. ``randn_tensor`` of diffusers takes the list.
    """
    return [torch.Generator().manual_seed(word) for word in stream_seeds(seed, indices)]


def stream_seeds(seed: int, indices: Iterable[int]) -> list[int]:
    """The seed of each image's stream: below 2^32, and unlike for all indices of a seed."""
    low, high = _keys(seed)
    return [_mix(_mix(index ^ low) ^ high) for index in indices]


def _keys(seed: int) -> tuple[int, int]:
    """Two numbers below 2^32, unlike for every seed."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _mix(word: int) -> int:
    """Scatter 32-bit words: the last step of MurmurHash3 (fmix32).

    Every operation can be undone, so that two images of a seed never share a stream. A hash of seed
    and index, cut to 32 bits, would give two of 100,000 images the same noise about once.
    """
    word ^= word >> 16
    word = word * 0x85EBCA6B % 2**32
    word ^= word >> 13
    word = word * 0xC2B2AE35 % 2**32
    return word ^ word >> 16
