"""The one value that every data source returns: labelled images in memory, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images of one size.

    Attributes:
        pixels: uint8 ``[N, H, W, C]``; N may be 0.
        labels: int64 ``[N]`` in ``0 .. len(classes) - 1``.
        classes: distinct names; label ``k`` is ``classes[k]``. A class may have no image.
        units: int64 ``[N]``, the privacy unit (patient, slide) that each image belongs to, or
            ``None`` where each image is its own unit.
        missing: units that were listed and could not be read, 0 or more. They count in N and
            contribute nothing to any step, which is what zero-out adjacency compares with.

    Raises:
        TypeError: not NumPy arrays.
        ValueError: a wrong shape or dtype, a label without a class, two classes of one name.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    classes: Sequence[str]
    units: npt.NDArray[np.int64] | None = None
    missing: int = 0

    def __post_init__(self) -> None:
        _check_array("pixels", self.pixels, np.uint8, ndim=4)
        if 0 in self.pixels.shape[1:]:
            raise ValueError(f"pixels must be [N, H, W, C] with H, W, C >= 1: {self.pixels.shape}.")
        _check_array("labels", self.labels, np.int64, ndim=1, length=len(self.pixels))
        if self.units is not None:
            _check_array("units", self.units, np.int64, ndim=1, length=len(self.pixels))
        if isinstance(self.classes, str) or not all(isinstance(c, str) for c in self.classes):
            raise ValueError("classes must be a sequence of strings.")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes must be distinct: {list(self.classes)}.")
        if self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(
                f"labels must lie in 0..{len(self.classes) - 1} (there are {len(self.classes)} "
                f"classes), found {self.labels.min()}..{self.labels.max()}."
            )

    def __len__(self) -> int:
        """Return the number of images N."""
        return len(self.pixels)

    @property
    def num_units(self) -> int:
        """The number of privacy units; where there are none, each image is one."""
        return len(self) if self.units is None else len(np.unique(self.units))

    @property
    def num_examples(self) -> int:
        """The N of the mechanism: units, those that could not be read included."""
        return self.num_units + self.missing

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape ``(C, H, W)`` of one image, as a network sees it."""
        _, height, width, channels = self.pixels.shape
        return channels, height, width

    def select(self, indices: npt.ArrayLike) -> Images:
        """Return the images at ``indices``, in that order; the classes stay, ``missing`` is 0.

        Args:
            indices: integers ``[M]`` (repeats allowed, may be empty) or a boolean mask ``[N]``.

        Raises:
            IndexError: an index out of range, or indices that are neither integers nor a mask.
        """
        index = np.asarray(indices)
        if index.size == 0 and index.dtype != bool:
            index = index.astype(np.int64)  # NumPy makes an empty list a float array
        if index.ndim != 1:
            raise IndexError(f"indices must be one-dimensional, not {index.ndim}-dimensional.")
        units = None if self.units is None else self.units[index]
        return Images(self.pixels[index], self.labels[index], self.classes, units)


def _check_array(
    name: str, array: object, dtype: type[np.generic], ndim: int, length: int | None = None
) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, not {type(array).__name__}.")
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {dtype.__name__}, not {array.dtype}.")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, not {array.ndim}: {array.shape}.")
    if length is not None and len(array) != length:
        raise ValueError(f"{name} has {len(array)} entries for {length} images.")
