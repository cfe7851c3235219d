"""Toy images whose classes are plain to see, and a classifier's training that is short enough."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from dp_synth.data.images import Images
from dp_synth.metrics.classifiers import train_classifier

train = functools.partial(
    train_classifier,
    steps=60,
    batch_size=32,
    lr=3e-3,
    weight_decay=0.01,
    label_smoothing=0.05,
    elastic=0.3,
    width=8,
    device="cpu",
)
PLACES = 4  # of a toy image's bright bar: its class


def toy(n: int, seed: int, channels: int = 1, side: int = 8) -> Images:
    """A bright horizontal bar at one of four heights, in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(PLACES, size=n)
    pixels = rng.integers(0, 80, size=(n, side, side, channels), dtype=np.uint8)
    for row, label in zip(pixels, labels, strict=True):
        start = label * side // PLACES
        row[start : start + side // PLACES] += 150
    return Images(pixels, labels, tuple("abcd"))


def shuffled(images: Images, seed: int = 0) -> Images:
    labels = np.random.default_rng(seed).permutation(images.labels)
    return Images(images.pixels, labels, images.classes)


def mislabelled(images: Images) -> Images:
    return Images(images.pixels, (images.labels + 1) % PLACES, images.classes)


def mapped(images: Images, path: Path) -> Images:
    """The same images, their pixels read-only in a file."""
    images.pixels.tofile(path)
    pixels = np.memmap(path, np.uint8, "r", shape=images.pixels.shape)
    return Images(pixels, images.labels, images.classes)


def noisy(images: Images, scale: float) -> Images:
    noise = np.random.default_rng(0).normal(0, scale, images.pixels.shape)
    pixels = np.clip(images.pixels + noise, 0, 255).astype(np.uint8)
    return Images(pixels, images.labels, images.classes)
