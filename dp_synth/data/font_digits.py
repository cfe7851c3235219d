"""Public digits drawn from fonts: the prior for ``digits``, and a proxy to tune settings on.

Digits of the TrueType fonts that matplotlib ships are thinned to lines, bent at random, redrawn
with a pen and passed through the preprocessing that the UCI handwritten set documents: 32x32
one-bit bitmaps, set pixels counted in 4x4 blocks. Nothing here was chosen by looking at the private
digits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dp_synth.checks import one_of, whole
from dp_synth.data.digits import CLASSES, from_counts
from dp_synth.data.glyphs import CANVAS, GLYPH, midline_distances
from dp_synth.data.images import Images
from dp_synth.errors import UserError

# Named one by one: some of matplotlib's fonts (cmsy10, cmex10, LastResort) map the characters 0-9
# to other signs, so that a character map does not tell which fonts have digits. DejaVu Sans Mono is
# left out: it has the figures of DejaVu Sans but a dot in the zero, which few people write.
FONTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "prior": (
            "DejaVuSans.ttf",
            "DejaVuSans-Bold.ttf",
            "DejaVuSans-Oblique.ttf",
            "DejaVuSans-BoldOblique.ttf",
            "DejaVuSerif.ttf",
            "DejaVuSerif-Bold.ttf",
            "DejaVuSerif-Italic.ttf",
            "DejaVuSerif-BoldItalic.ttf",
            "STIXGeneral.ttf",
            "STIXGeneralBol.ttf",
            "STIXGeneralItalic.ttf",
            "STIXGeneralBolIta.ttf",
        ),
        # Computer Modern: another designer, old-style and open figures among them.
        "held_out": (
            "cmr10.ttf",
            "cmb10.ttf",
            "cmmi10.ttf",
            "cmss10.ttf",
            "cmti10.ttf",
            "cmtt10.ttf",
        ),
    }
)
_SPLITS = ("train", "test")

_BITMAP = 32
_BLOCK = 4
_MAX_WIDTH = 20  # NIST's normalisation puts a character into 20 x 32 pixels
_SPAN = CANVAS / GLYPH / 2  # half the canvas in glyph heights: grid_sample's unit
_WARPED = 64  # side of the warped field, before size normalisation
_CONTROL = 5  # control points a side of the elastic displacement
_CHUNK = 500  # images warped at once; bounds memory to tens of MB


@dataclasses.dataclass(frozen=True)
class Warp:
    """Strengths of the random bending; each image draws uniformly within them.

    Attributes:
        rotation: degrees, drawn in +-rotation.
        shear: horizontal shift per unit of height, in +-shear.
        aspect: log of the horizontal stretch, in +-aspect.
        elastic: displacement of each of 5x5 control points, in glyph heights, in +-elastic.
        style: the same, but drawn once for each digit of each face and shared by its images in
            both splits: it makes a face the hand of one writer.
        pen_min: least half-width of a stroke, in glyph heights (1/32 is a pixel of the bitmap).
        pen_max: greatest half-width of a stroke.
        shift: offset of the bitmap after centring, in its pixels, in +-shift.

    Raises:
        UserError: a strength out of the range in which a digit fits its canvas.
    """

    rotation: float
    shear: float
    aspect: float
    elastic: float
    style: float
    pen_min: float
    pen_max: float
    shift: float

    def __post_init__(self) -> None:
        limits = {"rotation": 45, "shear": 0.6, "aspect": 0.5, "elastic": 0.2, "style": 0.2}
        for name, limit in (limits | {"shift": 4}).items():
            if not 0 <= getattr(self, name) <= limit:
                raise UserError(f"{name}={getattr(self, name)} must lie in 0..{limit}.")
        if not 0.01 <= self.pen_min <= self.pen_max <= 0.15:
            raise UserError(
                f"pen_min={self.pen_min}, pen_max={self.pen_max} must satisfy "
                "0.01 <= pen_min <= pen_max <= 0.15."
            )


# "held_out" is the handwriting preset: its figures differ from print as one hand's do (style), and
# each image strays further than in print.
WARPS: Mapping[str, Warp] = MappingProxyType(
    {
        "prior": Warp(
            rotation=12.0,
            shear=0.25,
            aspect=0.3,
            elastic=0.1,
            style=0.0,
            pen_min=0.03,
            pen_max=0.1,
            shift=1.0,
        ),
        "held_out": Warp(
            rotation=10.0,
            shear=0.2,
            aspect=0.2,
            elastic=0.06,
            style=0.12,
            pen_min=0.03,
            pen_max=0.09,
            shift=0.75,
        ),
    }
)


def load(
    split: str = "train",
    fonts: str = "prior",
    num_images: int = 20_000,
    seed: int = 0,
    **strengths: float,
) -> Images:
    """Draw ``num_images`` digits of 8x8 pixels, in the same format as ``digits.load``.

    Args:
        split: ``"train"`` or ``"test"``: other random draws of the same fonts and styles.
        fonts: ``"prior"`` (12 faces of DejaVu and STIX, bent freely), or ``"held_out"`` (6 faces
            of Computer Modern, bent like the handwriting of 6 people), which plays the private set
            when settings are tuned.
        num_images: how many; classes are balanced to within one image and in random order.
        seed: not negative; same arguments, same images. Splits share the styles, no other draw.
        strengths: fields of ``Warp`` that replace the preset of ``fonts``.

    Returns:
        Images with pixels ``[num_images, 8, 8, 1]`` of 17 levels, classes ``"0"`` to ``"9"``.

    Raises:
        UserError: an unknown split, font set or strength, a value out of range, a missing font.
    """
    one_of("split", split, _SPLITS)
    one_of("fonts", fonts, tuple(FONTS))
    num_images = whole("num_images", num_images)
    seed = whole("seed", seed)
    warp = _warp(fonts, strengths)
    stream = [seed, list(FONTS).index(fonts)]
    styles = _control_points(
        np.random.default_rng(stream), warp.style, len(FONTS[fonts]), len(CLASSES)
    )
    rng = np.random.default_rng([*stream, 1 + _SPLITS.index(split)])
    labels = rng.permutation(np.arange(num_images, dtype=np.int64) % len(CLASSES))
    bitmaps = np.zeros((num_images, _BITMAP, _BITMAP), dtype=bool)
    for start in range(0, num_images, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        bitmaps[chunk] = _draw(labels[chunk], fonts, warp, styles, rng)
    return Images(from_counts(block_counts(bitmaps)), labels, CLASSES)


def block_counts(bitmaps: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Count the set pixels of ``[N, H, W]`` in disjoint 4x4 blocks: 0..16, ``[N, H/4, W/4]``."""
    n, height, width = bitmaps.shape
    blocks = bitmaps.reshape(n, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    counts: npt.NDArray[np.uint8] = blocks.sum(axis=(2, 4), dtype=np.uint8)
    return counts


def _warp(fonts: str, strengths: Mapping[str, float]) -> Warp:
    known = [field.name for field in dataclasses.fields(Warp)]
    for name in strengths:
        if name not in known:
            raise UserError(f"font_digits has no strength {name!r}; use one of {', '.join(known)}.")
    return dataclasses.replace(WARPS[fonts], **strengths)


def _draw(
    labels: npt.NDArray[np.int64],
    fonts: str,
    warp: Warp,
    styles: Tensor,
    rng: np.random.Generator,
) -> npt.NDArray[np.bool_]:
    """Draw one bitmap ``[32, 32]`` per label, each of a random face."""
    lines = midline_distances(FONTS[fonts], CLASSES)
    face = torch.from_numpy(rng.integers(len(lines), size=len(labels)))
    digit = torch.from_numpy(labels)
    line = lines[face, digit].unsqueeze(1)
    control = styles[face, digit] + _control_points(rng, warp.elastic, len(labels))
    grid = _affine_grid(warp, len(labels), rng) + _elastic_grid(control)
    distance = F.grid_sample(line, grid, padding_mode="border", align_corners=False)
    pen = _uniform(rng, warp.pen_min, warp.pen_max, len(labels), 1, 1, 1)
    shift = _uniform(rng, -warp.shift, warp.shift, len(labels), 2)
    return (_normalise_size(pen - distance, shift) > 0).squeeze(1).numpy()


def _affine_grid(warp: Warp, n: int, rng: np.random.Generator) -> Tensor:
    """Return sampling grids ``[n, 64, 64, 2]`` of a random rotation, shear and stretch."""
    angle = torch.deg2rad(_uniform(rng, -warp.rotation, warp.rotation, n))
    shear = _uniform(rng, -warp.shear, warp.shear, n)
    stretch = _uniform(rng, -warp.aspect, warp.aspect, n).exp()
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(n)
    # Stretch and shear the upright glyph, then rotate; written as output -> source.
    x_row = torch.stack([(cos + shear * sin) / stretch, (shear * cos - sin) / stretch, zero], 1)
    y_row = torch.stack([sin, cos, zero], 1)
    theta = torch.stack([x_row, y_row], 1)
    return F.affine_grid(theta, [n, 1, _WARPED, _WARPED], align_corners=False)


def _control_points(rng: np.random.Generator, strength: float, *shape: int) -> Tensor:
    """Draw displacements ``[*shape, 2, 5, 5]``, each in +-strength glyph heights."""
    return _uniform(rng, -strength, strength, *shape, 2, _CONTROL, _CONTROL)


def _elastic_grid(control: Tensor) -> Tensor:
    """Spread ``[n, 2, 5, 5]`` smoothly over a grid ``[n, 64, 64, 2]``, in grid_sample's unit."""
    smooth = F.interpolate(control, (_WARPED, _WARPED), mode="bicubic", align_corners=True)
    return smooth.permute(0, 2, 3, 1) / _SPAN


def _normalise_size(field: Tensor, shift: Tensor) -> Tensor:
    """Sample fields ``[n, 1, 64, 64]`` at 32x32 so that what is positive fills the height.

    The width follows in proportion, up to 20 pixels, and the box is centred, then moved by
    ``shift`` ``[n, 2]`` (x, y) pixels.
    """
    inside = field.squeeze(1) > 0
    left, right = _extent(inside.any(dim=1))
    top, bottom = _extent(inside.any(dim=2))
    scale_y = (bottom - top) / _WARPED
    scale_x = torch.maximum(scale_y, (right - left) / _WARPED * (_BITMAP / _MAX_WIDTH))
    centre_x = (left + right) / _WARPED - 1
    centre_y = (top + bottom) / _WARPED - 1
    offset_x = centre_x - shift[:, 0] * (2 / _BITMAP) * scale_x
    offset_y = centre_y - shift[:, 1] * (2 / _BITMAP) * scale_y
    zero = torch.zeros_like(scale_x)
    theta = torch.stack(
        [torch.stack([scale_x, zero, offset_x], 1), torch.stack([zero, scale_y, offset_y], 1)], 1
    )
    grid = F.affine_grid(theta, [len(field), 1, _BITMAP, _BITMAP], align_corners=False)
    # Zeros outside: ink at the field's edge must not run on into the margin.
    return F.grid_sample(field, grid, padding_mode="zeros", align_corners=False)


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and one past the last true column of bool ``[n, W]``, as floats."""
    first = occupied.int().argmax(dim=1)
    last = occupied.shape[1] - occupied.flip(1).int().argmax(dim=1)
    return first.float(), last.float()


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))
