"""Public pictures drawn by rule: a prior for photographs, clothing and histology without any data.

Each class is a family of random drawings: leaves that hide one another, noise with the spectrum of
photographs, lit things, cut-out silhouettes, stained tissue, and so on. Everything in them comes
from general knowledge and published papers (Baradad et al. 2021, "Learning to see by looking at
noise", shows that such pictures teach a network to see); nothing was chosen by looking at private
data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dp_synth import checks
from dp_synth.data.drawing import scenes, textures, tissue
from dp_synth.data.drawing.canvas import Canvas
from dp_synth.data.drawing.colours import luma
from dp_synth.data.images import Images
from dp_synth.errors import UserError

FAMILIES: Mapping[str, Callable[[Canvas], Tensor]] = MappingProxyType(
    {
        "leaves": textures.leaves,
        "noise": textures.noise,
        "stripes": textures.stripes,
        "mosaic": textures.mosaic,
        "landscape": scenes.landscape,
        "thing": scenes.thing,
        "silhouette": scenes.silhouette,
        "strokes": scenes.strokes,
        "epithelium": tissue.epithelium,
        "stroma": tissue.stroma,
    }
)
CLASSES = tuple(FAMILIES)
_SPLITS = ("train", "test")
_SIDES = (8, 128)
_SUPERSAMPLING = 2  # samples a side of each pixel
# Pictures drawn at once, and samples in a channel of them: few enough for a processor's cache.
_CHUNK = 32
_CHUNK_SAMPLES = 2**17


def load(
    split: str = "train",
    *,
    image_shape: Sequence[int],
    num_images: int = 20_000,
    seed: int = 0,
) -> Images:
    """Draw ``num_images`` pictures of ten families, of any size and in grey or colour.

    Args:
        split: ``"train"`` or ``"test"``: other random draws.
        image_shape: ``(C, H, W)``: 1 or 3 channels, sides of 8 to 128 pixels.
        num_images: how many; classes are balanced to within one image and in random order.
        seed: not negative; same arguments, same images on every machine, but for the rounding of
            floating point. More images begin with the same ones.

    Returns:
        Images with pixels ``[num_images, H, W, C]`` over the whole range 0..255, and the names of
        the families as classes.

    Raises:
        UserError: an unknown split, a shape out of range, a negative number.
    """
    checks.one_of("public.load.split", split, _SPLITS)
    channels, height, width = _checked(image_shape)
    num_images = checks.whole("public.load.num_images", num_images)
    stream = [checks.whole("public.load.seed", seed), _SPLITS.index(split)]
    labels = _labels(num_images, stream)
    pixels = np.empty((num_images, height, width, channels), dtype=np.uint8)
    chunk = max(1, min(_CHUNK, _CHUNK_SAMPLES // (height * width * _SUPERSAMPLING**2)))
    for label, family in enumerate(FAMILIES.values()):
        rows = np.flatnonzero(labels == label)
        for start in range(0, len(rows), chunk):
            rng = np.random.default_rng([*stream, 1 + label, start])
            # Always a whole chunk, so that a picture does not depend on how many are wanted.
            drawn = _draw(family, rng, chunk, (channels, height, width))
            wanted = rows[start : start + chunk]
            pixels[wanted] = drawn[: len(wanted)]
    return Images(pixels, labels, CLASSES)


def _checked(image_shape: Any) -> tuple[int, int, int]:
    try:
        channels, height, width = (checks.count("side", side) for side in image_shape)
    except (TypeError, ValueError):  # UserError is a ValueError
        raise _wrong_shape(image_shape) from None
    least, most = _SIDES
    if channels not in (1, 3) or not least <= min(height, width) <= max(height, width) <= most:
        raise _wrong_shape(image_shape)
    return channels, height, width


def _wrong_shape(image_shape: object) -> UserError:
    return UserError(
        f"public.load.image_shape={image_shape} must be [channels, height, width] with 1 or 3 "
        f"channels and sides of {_SIDES[0]} to {_SIDES[1]} pixels."
    )


def _labels(num_images: int, stream: Sequence[int]) -> npt.NDArray[np.int64]:
    """Labels in random order; any number of them from the start is balanced to within one."""
    rng = np.random.default_rng([*stream, 0])
    rounds = -(-num_images // len(CLASSES))
    every_class = np.tile(np.arange(len(CLASSES), dtype=np.int64), (rounds, 1))
    return rng.permuted(every_class, axis=1).reshape(-1)[:num_images]


def _draw(
    family: Callable[[Canvas], Tensor],
    rng: np.random.Generator,
    count: int,
    image_shape: tuple[int, int, int],
) -> npt.NDArray[np.uint8]:
    """Draw ``[count, H, W, C]`` bytes, each pixel the mean of its samples."""
    channels, height, width = image_shape
    canvas = Canvas(count, height * _SUPERSAMPLING, width * _SUPERSAMPLING, rng)
    picture = F.avg_pool2d(family(canvas).clamp(0, 1), _SUPERSAMPLING)
    if channels == 1:
        picture = luma(picture)
    array: npt.NDArray[np.uint8] = (
        picture.mul(255).round_().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    )
    return array
