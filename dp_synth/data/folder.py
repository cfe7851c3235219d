"""Image folders, one subfolder per class: how private images come in and synthetic ones go out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dp_synth.data.images import Images
from dp_synth.errors import UserError

# Pillow opens some formats through other programs (EPS starts Ghostscript): name the safe ones.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"},
)
_GREY_MODES = frozenset({"1", "L"})
_COLOUR_MODES = frozenset({"RGB", "RGBA", "P", "LA", "PA", "CMYK", "YCbCr"})


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
        if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
            raise UserError(f"class {name!r} cannot be a folder's name; rename the class.")
        if (root / name).exists():
            raise UserError(f"{root / name} exists already; choose another folder or remove it.")
    for name in images.classes:
        (root / name).mkdir(parents=True)
    for number, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
        picture.save(root / images.classes[label] / f"{number:06d}.png")


def read_image_folder(root: Path | str) -> Images:
    """Read a folder with one subfolder per class, the inverse of ``write_image_folder``.

    Classes are the subfolders sorted by name; images come class by class, sorted by path, and may
    lie in deeper subfolders. Hidden files and files without an image's suffix are passed over. All
    images must be of one size and 8 bits; they are grey if every file is, else all become RGB
    (transparency is dropped).

    Raises:
        UserError: no such folder, no class folder or image in it, a class folder whose files are no
            images, an unreadable file, a second size, or a link that leads out of ``root``.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give one that holds a subfolder per class.")
    class_folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not class_folders:
        raise UserError(f"{root} has no class folders; put the images in {root}/<class>/.")
    files_by_class = [_image_files(folder, root) for folder in class_folders]
    files = [path for paths in files_by_class for path in paths]
    if not files:
        raise UserError(f"{root} holds no images; put PNG or JPEG files in its class folders.")
    counts = [len(paths) for paths in files_by_class]
    return Images(
        pixels=_stack(files),
        labels=np.repeat(np.arange(len(counts), dtype=np.int64), counts),
        classes=tuple(folder.name for folder in class_folders),
    )


def _image_files(folder: Path, root: Path) -> list[Path]:
    relative = {path: path.relative_to(root) for path in folder.rglob("*")}
    visible = sorted(
        path
        for path, parts in relative.items()
        if path.is_file() and not any(part.startswith(".") for part in parts.parts)
    )
    files = [path for path in visible if path.suffix.lower() in _SUFFIXES]
    if visible and not files:
        raise UserError(
            f"{folder} holds files but no image; use one of {', '.join(sorted(_SUFFIXES))}."
        )
    for path in files:
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{path} is a link that leads out of {root}; copy the file instead.")
    return files


def _stack(files: list[Path]) -> npt.NDArray[np.uint8]:
    """Read files of one size into ``[N, H, W, C]``, C = 1 if all are grey, else 3."""
    arrays = [_read_image(path) for path in files]
    size = arrays[0].shape[:2]
    for path, array in zip(files, arrays, strict=True):
        if array.shape[:2] != size:
            raise UserError(
                f"{path} is {array.shape[1]}x{array.shape[0]} pixels but {files[0]} is "
                f"{size[1]}x{size[0]}; resize the images to one size."
            )
    channels = max(array.shape[2] for array in arrays)
    return np.stack([np.broadcast_to(array, (*size, channels)) for array in arrays])


def _read_image(path: Path) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            if picture.mode in _GREY_MODES:
                return np.asarray(picture.convert("L"))[:, :, np.newaxis]
            if picture.mode in _COLOUR_MODES:
                return np.asarray(picture.convert("RGB"))
            mode = picture.mode
    # Pillow reports a broken file by any of these, depending on the format.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image ({error}); mend or remove it.") from None
    raise UserError(f"{path} has pixel mode {mode}; convert it to 8-bit grey or RGB.")
