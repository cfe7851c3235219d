"""The sheet of the samples that are most like copies, beside the real images nearest to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from dp_synth.data.journal import open_private

_ROW = 1.6  # inches


@dataclass(frozen=True)
class NearestPair:
    """A sample with the training and the held-out image nearest to it.

    Attributes:
        sample: uint8 ``[H, W, C]``, C 1 or 3.
        train: the nearest training image, alike.
        held_out: the nearest held-out image, alike.
        to_train: distance of the two, in grey levels of 255.
        to_held_out: distance to the held-out image.
    """

    sample: npt.NDArray[np.uint8]
    train: npt.NDArray[np.uint8]
    held_out: npt.NDArray[np.uint8]
    to_train: float
    to_held_out: float


def write_nearest_pairs(pairs: Sequence[NearestPair], path: Path) -> None:
    """Write a PNG with one row a pair, which shows private images.

    The file has mode 0600 and its folder, made if missing, 0700, whatever the umask.

    Args:
        pairs: at least 1.
        path: an earlier file of the name is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.parent.chmod(0o700)
    figure = Figure(figsize=(6, _ROW * (len(pairs) + 1)), layout="constrained")
    figure.suptitle(
        "Synthetic images that are most like copies of one training image.\n"
        "This sheet shows private images: keep it here, it is never part of a release.",
        fontsize=9,
    )
    rows = figure.subplots(len(pairs), 3, squeeze=False)
    for axes, pair in zip(rows, pairs, strict=True):
        captions = {
            "sample": pair.sample,
            f"training, {pair.to_train:.1f} away": pair.train,
            f"held out, {pair.to_held_out:.1f} away": pair.held_out,
        }
        for axis, (caption, image) in zip(axes, captions.items(), strict=True):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title(caption, fontsize=7)
            axis.set_axis_off()
    partial = path.with_name(f".{path.name}.partial")
    with open_private(partial, "wb") as file:
        figure.savefig(file, format="png")
    partial.rename(path)
