"""The images of a split by name: found, labelled and grouped before any of them is opened."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dp_synth.data.sources import Source


@dataclass(frozen=True, eq=False)
class Listing:
    """Names of N image files with their labels and units.

    Attributes:
        source: the folder or archive that the names lie in.
        names: distinct, relative to the source, ``/``-separated.
        labels: int64 ``[N]`` in ``0 .. len(classes) - 1``.
        classes: distinct names of the classes.
        units: int64 ``[N]``, the privacy unit that each image belongs to, or None where each image
            is its own.
    """

    source: Source
    names: Sequence[str]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    units: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.names)

    @property
    def num_examples(self) -> int:
        """The number of privacy units; where there are none, each image is one."""
        return len(self) if self.units is None else len(np.unique(self.units))
