"""Digits of fonts as midlines: rendered large, thinned to lines, turned into distance maps."""

import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from dp_synth.errors import UserError

GLYPH = 80  # pixels of a glyph's height in its distance map
CANVAS = 128  # pixels of the distance map's side: room to bend the glyph


@functools.cache
def midline_distances(faces: tuple[str, ...], digits: tuple[str, ...]) -> Tensor:
    """Return ``[faces, digits, 128, 128]``: the distance, in glyph heights, to each midline.

    One pen for all of a digit is what handwriting has and print has not; and thin strokes of a bold
    face, which plain erosion would cut, stay whole.

    Args:
        faces: file names of matplotlib's TrueType fonts.
        digits: the characters to draw.
    """
    glyphs = np.stack([render(face, digit) for face in faces for digit in digits])
    distances = np.stack([distance_transform_edt(~line) for line in thinned(glyphs)]) / GLYPH
    shape = len(faces), len(digits), CANVAS, CANVAS
    return torch.from_numpy(distances.astype(np.float32)).view(shape)


def thinned(glyphs: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Thin strokes ``[M, H, W]`` to lines of one pixel that keep their ends and crossings.

    The parallel algorithm of Zhang and Suen (1984), on all glyphs at once; they must not touch the
    canvas's edge.
    """
    thin = glyphs.copy()
    changed = True
    while changed:
        changed = False
        for east_south in (True, False):
            n, ne, e, se, s, sw, w, nw = _neighbours(thin)
            ring = np.stack([n, ne, e, se, s, sw, w, nw])
            count = ring.sum(axis=0, dtype=np.uint8)
            runs = (~ring & np.roll(ring, -1, axis=0)).sum(axis=0, dtype=np.uint8)
            kept = (e & s & (n | w)) if east_south else (n & w & (e | s))
            removed = thin & (count >= 2) & (count <= 6) & (runs == 1) & ~kept
            thin &= ~removed
            changed |= bool(removed.any())
    return thin


def _neighbours(x: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.bool_]]:
    """Return the eight neighbours of every pixel, clockwise from the north."""
    steps = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))
    return [np.roll(x, step, axis=(1, 2)) for step in steps]


def render(face: str, digit: str) -> npt.NDArray[np.bool_]:
    """Draw a digit 80 pixels high in the middle of a one-bit canvas of 128x128."""
    large = 4 * GLYPH
    picture = Image.new("L", (2 * large, 2 * large))
    ImageDraw.Draw(picture).text((large // 2, large // 2), digit, font=font(face, large), fill=255)
    glyph = picture.crop(picture.getbbox())
    width = round(glyph.width * GLYPH / glyph.height)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(
        glyph.resize((width, GLYPH), Image.Resampling.BOX),
        ((CANVAS - width) // 2, (CANVAS - GLYPH) // 2),
    )
    return np.asarray(canvas) >= 128


@functools.cache
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """Open one of matplotlib's TrueType files; UserError if it is not there."""
    import matplotlib  # only where its fonts live is needed

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / face
    try:
        return ImageFont.truetype(str(path), size)
    except OSError:
        raise UserError(f"font {path} is missing; reinstall matplotlib, which ships it.") from None
