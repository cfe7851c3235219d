"""Data sets as plain values: every source is a function ``load(...) -> Images``."""

from dp_synth.data import (
    camelyon17,
    cifar10,
    digits,
    fashion_mnist,
    folder,
    font_digits,
    image_folder,
    imagenet32,
    mnist,
    pixels,
    shapes,
)
from dp_synth.data.images import Images

__all__ = [
    "Images",
    "camelyon17",
    "cifar10",
    "digits",
    "fashion_mnist",
    "folder",
    "font_digits",
    "image_folder",
    "imagenet32",
    "mnist",
    "pixels",
    "shapes",
]
