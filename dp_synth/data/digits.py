"""The default private data set: 1,797 handwritten digits of 8x8 pixels that ship in scikit-learn.

They are the test part of the UCI "Optical Recognition of Handwritten Digits" set: 32x32 one-bit
bitmaps, reduced to the count (0..16) of set pixels in each 4x4 block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dp_synth.checks import one_of
from dp_synth.data.images import Images

CLASSES = tuple("0123456789")
MAX_COUNT = 16
_TEST_STRIDE = 5


def load(split: str = "train") -> Images:
    """Return one split of the digits; no network, no file written.

    The split is fixed and depends on no seed: sort the 1,797 images by label (stably, in
    scikit-learn's order); every fifth, beginning with the first, is ``test`` (360), the others
    are ``train`` (1,437), both in scikit-learn's order. So each class is split 4 : 1. The set names
    no writers: the same 13 people wrote both splits.

    Args:
        split: ``"train"`` or ``"test"``.

    Returns:
        Images with pixels ``[N, 8, 8, 1]``, each count v stored as ``round(v * 255 / 16)``.

    Raises:
        UserError: an unknown split.
    """
    one_of("split", split, ("train", "test"))
    # Imported here: scikit-learn takes a second, and font_digits needs only from_counts.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[np.argsort(labels, kind="stable")[::_TEST_STRIDE]] = True
    images = Images(from_counts(bunch.images), labels, CLASSES)
    return images.select(is_test if split == "test" else ~is_test)


def from_counts(counts: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Map block counts 0..16 ``[N, H, W]`` to bytes 0..255 ``[N, H, W, 1]``, one level each."""
    scaled = np.rint(counts.astype(np.float64) * (255 / MAX_COUNT))
    return scaled.astype(np.uint8)[..., np.newaxis]
