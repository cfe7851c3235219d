"""Down-sampled ImageNet as a public source: 1,281,167 photographs of 32x32 pixels, 1,000 classes.

Chrabaszcz, Loshchilov and Hutter 2017 (arXiv 1707.08819), https://image-net.org/download-images: ten
training batches and one of validation images, as pickles or as NumPy's npz.
"""

import os.path
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dp_synth.checks import count, one_of
from dp_synth.data.cifar_format import ROW_BYTES, SIDE, read_batch
from dp_synth.data.images import Images
from dp_synth.data.publication import unreadable
from dp_synth.data.unpickling import unpickle
from dp_synth.errors import UserError

# The publisher's numbers 1..1000 (map_clsloc.txt), with a word before them: the public model's
# labels are carried over to private classes of the same name, and "7" is a figure of MNIST.
CLASSES = tuple(f"imagenet {number}" for number in range(1, 1001))
_BATCHES = {
    "train": tuple(f"train_data_batch_{number}" for number in range(1, 11)),
    "test": ("val_data",),
}
# What the publisher's archives are called, and unpack to where they are given a folder.
_FOLDERS = {
    "train": (".", "Imagenet32_train", "Imagenet32_train_npz"),
    "test": (".", "Imagenet32_val", "Imagenet32_val_npz"),
}


def load(
    root: Path | str | None,
    split: str = "train",
    *,
    image_shape: tuple[int, int, int] = (3, SIDE, SIDE),
    num_images: int | None = None,
) -> Images:
    """Return ImageNet's photographs, reduced to 32x32 pixels by their publisher.

    The pixels are written once into the array that is returned; beside it only one batch of
    128,117 images (0.4 GB) is in memory. All images at 3x32x32 take 3.9 GB. Nothing that a pickled
    batch names is run.

    Args:
        root: the folder that holds the files ``train_data_batch_1`` to ``_10`` and ``val_data``,
            with or without ``.npz``, or the publisher's folders (``Imagenet32_train``,
            ``Imagenet32_train_npz``, ``Imagenet32_val``, ``Imagenet32_val_npz``) that hold them.
        split: ``"train"``, or ``"test"``, the 50,000 validation images.
        image_shape: ``(C, H, W)``, C = 1 or 3 and H = W. Grey is ITU-R 601 luma
            (299 R + 587 G + 114 B) / 1000; another side than 32 is Pillow's bicubic resampling,
            which averages where it makes smaller.
        num_images: the first so many of the split, or None for all; the publisher shuffled them.

    Returns:
        Images with pixels ``[N, H, W, C]`` and the classes ``imagenet 1`` to ``imagenet 1000``,
        in the publisher's order.

    Raises:
        UserError: a wrong value, files that are missing or broken, fewer than ``num_images``, or
            more than the memory holds.
    """
    one_of("split", split, tuple(_BATCHES))
    channels, height, width = image_shape
    if channels not in (1, 3) or height != width or height < 1:
        raise UserError(
            f"public=imagenet32 has no images of shape {tuple(image_shape)}; "
            "dataset.image_shape must be [1, H, H] or [3, H, H]."
        )
    if num_images is not None:
        num_images = count("public.load.num_images", num_images)
    paths = _find(root, split)

    room = sum(_most_images(path) for path in paths)
    room = room if num_images is None else min(room, num_images)
    pixels, labels = _allocate(room, height, channels)
    filled = 0
    for path in paths:
        if num_images is None or filled < num_images:
            filled += _fill(pixels[filled:], labels[filled:], path)
    if num_images is not None and filled < num_images:
        raise UserError(
            f"public.load.num_images={num_images}, but {paths[0].parent} holds {filled:,} images "
            "for this split; use at most as many."
        )
    return Images(pixels[:filled], labels[:filled], CLASSES)


def _find(root: Path | str | None, split: str) -> list[Path]:
    """The files of a split in their order.

    Raises:
        UserError: no folder given, or one of the files is nowhere.
    """
    if root is None:
        raise UserError(
            "public=imagenet32 needs public.root, the folder that holds train_data_batch_1 to "
            "train_data_batch_10 of https://image-net.org/download-images."
        )
    return [_find_file(Path(root).expanduser(), name, split) for name in _BATCHES[split]]


def _find_file(root: Path, name: str, split: str) -> Path:
    for folder in _FOLDERS[split]:
        for suffix in ("", ".npz"):
            path = root / folder / f"{name}{suffix}"
            if os.path.isfile(path):
                return path
    raise UserError(
        f"public.root={root} holds neither {name} nor {name}.npz; give the folder into which "
        "down-sampled ImageNet's 32x32 batches were unpacked."
    )


def _most_images(path: Path) -> int:
    """As many images as a file of this size can hold: a pixel takes a byte or more."""
    try:
        if path.suffix != ".npz":
            return path.stat().st_size // ROW_BYTES
        with zipfile.ZipFile(path) as archive:
            return archive.getinfo("data.npy").file_size // ROW_BYTES
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise unreadable(path, error) from None


def _allocate(
    number: int, side: int, channels: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    try:
        # What is not written to takes no memory, so that a little too large does no harm.
        return np.empty((number, side, side, channels), np.uint8), np.empty(number, np.int64)
    except (MemoryError, ValueError):
        raise UserError(
            f"{number:,} images of public=imagenet32 do not fit in memory; set "
            "public.load.num_images to fewer."
        ) from None


def _fill(pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], path: Path) -> int:
    """Write a batch, or as much of it as there is room for; return how many images that is."""
    found, found_labels = read_batch(_read(path), path, classes=len(CLASSES), first_label=1)
    number = min(len(found), len(pixels))
    _convert(found[:number], pixels[:number])
    labels[:number] = found_labels[:number]
    return number


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix != ".npz":
            with path.open("rb") as file:
                return unpickle(file, path)
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("data", "labels")}
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  NumPy and zipfile raise whatever they stumble over
        raise unreadable(path, error) from None


def _convert(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> None:
    """Write ``[n, 32, 32, 3]`` into ``[n, side, side, channels]``, in grey where that is 1."""
    _, side, _, channels = target.shape
    if (side, channels) == (SIDE, 3):
        target[:] = source
        return
    for photograph, place in zip(source, target, strict=True):
        picture = Image.fromarray(np.ascontiguousarray(photograph))
        if channels == 1:
            picture = picture.convert("L")
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        place[:] = np.asarray(picture).reshape(side, side, channels)
