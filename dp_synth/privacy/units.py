"""Privacy units (patients, slides) that own several images: which are whose, and which a row shows."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Units:
    """Which images each unit owns; every unit owns at least one.

    Units are numbered 0 .. num_units - 1 by ascending id, whatever the order of the images. So a
    neighbouring data set, where one id stands for other images, or for more or fewer of them,
    numbers every unit alike.

    Attributes:
        grouped: int64 [N], the indices of all images, unit after unit, ascending within each.
        counts: int64 [num_units], how many of them each unit owns.
    """

    grouped: Tensor
    counts: Tensor

    @classmethod
    def from_ids(cls, ids: npt.NDArray[np.int64]) -> Self:
        """Group images by the ids of their units: int64 [N], any integers in any order."""
        _, counts = np.unique(ids, return_counts=True)
        grouped = np.argsort(ids, kind="stable")
        return cls(torch.from_numpy(grouped), torch.from_numpy(counts))

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.counts)

    def images(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """The images of `units` (int64 [B]): their indices [M], unit after unit, and counts [B]."""
        counts = self.counts[units]
        shifts = _starts(self.counts)[units] - _starts(counts)
        places = torch.arange(int(counts.sum())) + shifts.repeat_interleave(counts)
        return self.grouped[places], counts


def spread(counts: Tensor, multiplicity: int, uniform: Tensor) -> Tensor:
    """Choose the image of each row: a unit's K rows are spread over its images as evenly as can be.

    Of m images each is shown floor(K / m) times, and K mod m of them, any such set with the same
    probability, once more. A unit's rows depend on its own count and uniforms alone.

    Args:
        counts: int64 [B], m of each unit, >= 1.
        multiplicity: K, rows of each unit.
        uniform: [K*B] in [0, 1), draw-major (row n = k * B + i).

    Returns:
        int64 [K*B], draw-major: places among the images of all B units, unit after unit.
    """
    uniform_KB = uniform.view(multiplicity, len(counts))
    chosen_KB = torch.empty_like(uniform_KB, dtype=torch.int64)
    at_random = multiplicity % counts
    # R. Floyd's sampling (Bentley and Floyd 1987) draws a set with one uniform a member. A shuffle
    # would need one an image, and a unit may own more images than it has rows.
    for k in range(multiplicity):
        last = counts - at_random + k
        # Below last + 1 also after rounding, since a float32 below 1 is at most 1 - 2**-24.
        drawn = (uniform_KB[k] * (last + 1)).long()
        taken = (chosen_KB[:k] == drawn).any(0)
        chosen_KB[k] = torch.where(k < at_random, torch.where(taken, last, drawn), k % counts)
    return (chosen_KB + _starts(counts)).flatten()


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts
