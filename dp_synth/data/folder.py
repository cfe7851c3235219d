"""Folders of class folders of small images of one size: how synthetic data sets are kept."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from heapq import nsmallest
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dp_synth.data.decoding import read_picture
from dp_synth.data.images import Images
from dp_synth.data.layout import class_folders
from dp_synth.data.sources import Folder
from dp_synth.errors import UserError

_MAX_NAME_BYTES = 255  # on the file systems in use


def write_image_folder(images: Images, root: Path | str) -> None:
    """Write ``root/<class>/<number>.png``, lossless: grey images as mode L, three channels as RGB.

    The number is the image's place in ``images``, six digits or more, so that within a class the
    order is kept. Each class has a folder, also where it has no image. Units are not written.

    Args:
        images: one or three channels.
        root: made if missing; other files in it stay.

    Raises:
        UserError: a class folder that exists already (nothing is overwritten), a class name that
            cannot be a folder's name, another number of channels. Then nothing was written.
    """
    root = Path(root)
    channels = images.shape[0]
    if channels not in (1, 3):
        raise UserError(f"PNG folders hold images of 1 or 3 channels, these have {channels}.")
    for name in images.classes:
        if not is_folder_name(name):
            raise UserError(f"class {name!r} cannot be a folder's name; rename the class.")
        if (root / name).exists():
            raise UserError(f"{root / name} exists already; choose another folder or remove it.")
    for name in images.classes:
        (root / name).mkdir(parents=True)
    for number, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
        picture.save(root / images.classes[label] / f"{number:06d}.png")


def is_folder_name(name: str) -> bool:
    """Whether a class of this name can have a folder of its own, and be shown in a terminal."""
    return (
        name != ""
        and not name.startswith(".")
        and "/" not in name
        and "\\" not in name
        and len(os.fsencode(name)) <= _MAX_NAME_BYTES
        and all(unicodedata.category(character) != "Cc" for character in name)
    )


def read_image_folder(root: Path | str, most: int | None = None) -> Images:
    """Read a folder with one subfolder per class, the inverse of ``write_image_folder``.

    Classes are the subfolders sorted by name; images come class by class, and may lie in deeper
    subfolders. What ``Source.walk`` passes over and files without an image's suffix do not count.
    All images must be of one size; they are grey if every file is, else all become RGB. Otherwise
    files are read as ``decoding.read_picture`` says.

    Args:
        root: the folder.
        most: read no more images than so many, those whose files' names come first in number.

    Raises:
        UserError: no such folder, no image in a class folder, a class folder whose files are no
            images, an unreadable file, a second size, or what ``Source.walk`` refuses, such as a
            link that leads out of ``root``.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give one that holds a subfolder per class.")
    source = Folder(root)
    table = class_folders(source, list(source.walk()), "")
    # Classes without an image have a folder too.
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    rows = sorted(zip(table.labels, table.names, strict=True))
    if most is not None:
        rows = nsmallest(most, rows, key=lambda row: _place(row[1]))
    labels, names = zip(*rows, strict=True)
    return Images(
        pixels=_stack(source, names),
        labels=np.searchsorted(classes, labels),
        classes=tuple(classes),
    )


def _place(name: str) -> tuple[int, str]:
    """A key that sorts files by the number that is their name, also beyond six digits."""
    base = os.path.basename(name)
    return len(base), base


def _stack(source: Folder, names: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Read files of one size into ``[N, H, W, C]``, C = 1 if all are grey, else 3."""
    arrays = [_read(source, name) for name in names]
    size = arrays[0].shape[:2]
    for name, array in zip(names, arrays, strict=True):
        if array.shape[:2] != size:
            raise UserError(
                f"{source.describe(name)} is {array.shape[1]}x{array.shape[0]} pixels but "
                f"{names[0]} is {size[1]}x{size[0]}; resize the images to one size."
            )
    channels = max(array.shape[2] for array in arrays)
    return np.stack([np.broadcast_to(array, (*size, channels)) for array in arrays])


def _read(source: Folder, name: str) -> npt.NDArray[np.uint8]:
    picture = read_picture(source.read(name), source.describe(name))
    return np.atleast_3d(np.asarray(picture))
