"""Images as PNG files in memory: what most formats keep."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from dp_synth.data.decoding import read_picture
from dp_synth.errors import UserError

CHANNELS = (1, 3)


def check_channels(channels: int) -> None:
    """UserError unless PNG has images of so many channels."""
    if channels not in CHANNELS:
        raise UserError(
            f"PNG files hold images of 1 or 3 channels, these have {channels}; sampler.format=npz "
            "holds any."
        )


def encode(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file, lossless: grey as mode L, three channels as RGB.

    Args:
        pixels: [H,W,1] or [H,W,3].
    """
    file = io.BytesIO()
    picture(pixels).save(file, "PNG")
    return file.getvalue()


def picture(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """Pixels [H,W,1] or [H,W,3] as Pillow has them."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def decode(data: bytes, what: str) -> npt.NDArray[np.uint8]:
    """The pixels [H,W,C] of a file that ``encode`` made; ``what`` is how messages call it.

    Raises:
        UserError: it is damaged.
    """
    return np.atleast_3d(np.asarray(read_picture(data, what)))


def number_name(number: int) -> str:
    """The number of an image as names have it, six digits or more."""
    return f"{number:06d}"
