"""The batches of CIFAR-10, a layout that down-sampled ImageNet uses too.

A batch is a dictionary with ``data``, uint8 ``[n, 3072]``, one image a row: 1,024 red values, then
green, then blue, each row by row; and ``labels``, n integers
(https://www.cs.toronto.edu/~kriz/cifar.html).
"""

import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dp_synth.errors import UserError

SIDE = 32
ROW_BYTES = 3 * SIDE * SIDE


def read_batch(
    batch: Mapping[str, Any], path: Path, *, classes: int, first_label: int = 0
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Take the images and labels out of a batch.

    Args:
        batch: the dictionary; other entries are passed over.
        path: the file that it came from, for messages.
        classes: how many there are.
        first_label: the label of the first of them.

    Returns:
        Pixels uint8 ``[n, 32, 32, 3]``, a view of the batch's, and labels int64 ``[n]`` in
        ``0 .. classes - 1``.

    Raises:
        UserError: an entry is missing, or not as described above.
    """
    if "data" not in batch or "labels" not in batch:
        raise UserError(
            f"{path} has no entries 'data' and 'labels'; get the file again from its publisher."
        )
    rows, labels = batch["data"], batch["labels"]
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (ROW_BYTES,):
        raise UserError(
            f"{path} holds images in another form than {ROW_BYTES} bytes a row; get the file "
            "again from its publisher."
        )
    numbers = _integers(labels, path)
    if len(numbers) != len(rows):
        raise UserError(
            f"{path} holds {len(rows):,} images and {len(numbers):,} labels; get the file again."
        )
    numbers = numbers - first_label
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < classes:
        raise UserError(
            f"{path} holds labels outside {first_label}..{first_label + classes - 1}; "
            "get the file again."
        )
    return rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), numbers


def count_images(file: BinaryIO, path: Path) -> int:
    """The number of images in a pickled batch, read from what stands before the pixels.

    Nothing is built from the pickle: its instructions are followed until one makes the array's
    shape.

    Raises:
        UserError: not a pickled batch.
    """
    numbers: list[int] = []
    try:
        for instruction, argument, _ in pickletools.genops(file):
            if isinstance(argument, int):
                numbers.append(argument)
            elif instruction.name.startswith("TUPLE") and numbers[-1:] == [ROW_BYTES]:
                return numbers[-2]
    except (LookupError, MemoryError, OverflowError, ValueError) as error:
        raise UserError(f"{path} is a broken pickle ({error}); get the file again.") from None
    raise UserError(f"{path} holds no images of {ROW_BYTES} bytes; get the file again.")


def _integers(labels: Any, path: Path) -> npt.NDArray[np.int64]:
    # Looked at one by one: a small pickle can hold lists that NumPy would unfold to any size.
    if isinstance(labels, list) and all(type(label) is int for label in labels):
        try:
            return np.array(labels, dtype=np.int64)
        except OverflowError:
            pass
    elif isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu":
        return labels.astype(np.int64)
    raise UserError(f"{path} holds labels that are no integers; get the file again.")
