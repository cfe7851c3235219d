"""From the bytes of an image file, whatever its format and mode, to pixels of one shape."""

from __future__ import annotations

import io
import os.path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from dp_synth.data.sources import printable
from dp_synth.errors import UserError

# Goes up with every change of what ``decode`` returns: pixels cached by another one are not used.
VERSION = 1

# Pillow opens some formats through other programs (EPS starts Ghostscript): name the safe ones.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pbm", ".pgm", ".ppm"}
)
MAX_PIXELS = 2**26

_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_GREY_MODES = frozenset({"1", "L", "LA"})
_BITS_PER_SAMPLE = 258  # the number of TIFF's tag


def decode(
    data: bytes, what: str, resolution: int, channels: Literal[1, 3]
) -> npt.NDArray[np.uint8]:
    """Decode an image file to pixels ``[resolution, resolution, channels]``, 0..255.

    The file may be PNG, JPEG, BMP, TIFF, WebP or PBM/PGM/PPM, of any size up to ``MAX_PIXELS``.
    What is done to it, in this order:

    1. of an animation or of many pages, the first one is taken;
    2. it is turned as its EXIF orientation says;
    3. transparency is dropped, not blended; palettes, CMYK and YCbCr become RGB; for one channel,
       colours become luma (ITU-R 601-2), for three, grey is repeated;
    4. it is cropped to the square in its middle (odd margins: the smaller one left and above);
    5. where the square's side is not ``resolution``, it is resized by Pillow's bicubic filter,
       which averages when it makes images smaller.

    Args:
        data: the file, whole.
        what: how messages call it.
        resolution: pixels of a side, 1 or more.
        channels: 1 for grey, 3 for RGB.

    Raises:
        UserError: another format, a truncated or damaged file, more than ``MAX_PIXELS`` (found out
            before they are decoded), 16 bits or floats: which of their range matters is for
            whoever made them to say.
    """
    image = read_picture(data, what, "L" if channels == 1 else "RGB")
    side = min(image.size)
    if image.size != (side, side):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if side != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(resolution, resolution, channels)


def read_picture(data: bytes, what: str, mode: Literal["L", "RGB"] | None = None) -> Image.Image:
    """The first three steps of ``decode``: a picture of its own size, upright, in a plain mode.

    Args:
        data: the file, whole.
        what: how messages call it.
        mode: ``"L"`` or ``"RGB"``; None for the one that loses nothing but transparency.

    Raises:
        UserError: see ``decode``.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            flaw = _flaw(picture)
            if flaw is None:
                return _converted(picture, mode)
    except UnidentifiedImageError:
        flaw = f"is not an image that this program reads; use {', '.join(FORMATS)}"
    except Exception as error:  # noqa: BLE001  Pillow's readers raise whatever they stumble over
        reason = printable(str(error) or type(error).__name__)
        flaw = f"is not a readable image ({reason}); mend or remove it"
    raise UserError(f"{what} {flaw}.")


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as those of images that ``decode`` reads, in any case."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _flaw(picture: ImageFile.ImageFile) -> str | None:
    """What, by its header, is wrong with a picture; nothing is decoded yet."""
    if picture.width * picture.height > MAX_PIXELS:
        return (
            f"has {picture.width}x{picture.height} pixels, more than {MAX_PIXELS} in all; cut it "
            "into smaller ones"
        )
    if picture.mode not in _MODES or _is_deep(picture):
        return (
            f"has more than 8 bits per channel or an unusual pixel mode ({picture.mode}); convert "
            "it to 8-bit grey or RGB, with the window of values that you want"
        )
    return None


def _is_deep(picture: ImageFile.ImageFile) -> bool:
    """Whether channels have more than 8 bits: of colours, Pillow would silently keep the upper 8."""
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8  # type: ignore[attr-defined]
    arguments = picture.tile[0].args if picture.tile else ()
    if picture.format == "PNG":
        return str(arguments).endswith(";16B")
    if picture.format == "PPM":
        return isinstance(arguments, tuple) and arguments[1] > 255
    return False


def _converted(picture: Image.Image, mode: str | None) -> Image.Image:
    picture.load()
    if picture.info:  # whatever a file says beside its pixels; looking for EXIF takes a while
        ImageOps.exif_transpose(picture, in_place=True)
    if mode is None:
        mode = "L" if picture.mode in _GREY_MODES else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)
