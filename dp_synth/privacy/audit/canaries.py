"""Canaries: examples made to be found again, each in or out of the private data by a secret coin."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dp_synth.data.images import Images
from dp_synth.data.journal import open_private, sync
from dp_synth.errors import UserError
from dp_synth.privacy.audit.one_run import Coins

CANARIES_FILE = "canaries.npz"  # in a run's local/: who has the coins needs no attack


@dataclass(frozen=True, eq=False)
class Canaries:
    """What is planted in a run, and the coins that decide what of it is in.

    Every canary counts in the N of the mechanism, whichever way its coin fell: one that is out is
    an example that contributes nothing, as zero-out adjacency has it. Their places among the
    examples: the images that are in follow the data set's own images, the gradients come last.

    Attributes:
        gradient_coins: bool [G], of the gradient canaries: each contributes `max_grad_norm` at one
            coordinate of its own in every batch that it is selected for.
        image_coins: bool [I], of the image canaries.
        pixels: uint8 [I, H, W, C].
        labels: int64 [I], at random.
    """

    gradient_coins: Coins
    image_coins: Coins
    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    @classmethod
    def draw(
        cls, gradients: int, images: int, private: Images, public: Images | None = None
    ) -> Canaries:
        """Toss the coins and choose the images, from the operating system's entropy.

        Args:
            gradients: G, 0 or more.
            images: I, 0 or more.
            private: the training split; its shape and classes alone are used.
            public: images to take canaries from. Where there are none, too few or of another shape,
                canaries are images of noise.
        """
        rng = np.random.default_rng(list(os.urandom(32)))
        _, height, width, channels = private.pixels.shape
        if public is not None and public.shape == private.shape and len(public) >= images:
            pixels = public.pixels[np.sort(rng.choice(len(public), images, replace=False))]
        else:
            size = (images, height, width, channels)
            pixels = rng.integers(0, 256, size, dtype=np.uint8)
        return cls(
            gradient_coins=rng.random(gradients) < 0.5,
            image_coins=rng.random(images) < 0.5,
            pixels=np.ascontiguousarray(pixels),
            labels=rng.integers(0, len(private.classes), images),
        )

    def __len__(self) -> int:
        """Return by how much the canaries raise N."""
        return len(self.gradient_coins) + len(self.image_coins)

    def insert(self, images: Images) -> Images:
        """The training split with the canaries in it; its pixels are copied into memory.

        Where images have units, each canary is a unit of its own.
        """
        planted = int(self.image_coins.sum())
        units = images.units
        if units is not None:
            first = units.max() + 1 if len(units) else 0
            units = np.concatenate([units, first + np.arange(planted)])
        return Images(
            np.concatenate([images.pixels, self.pixels[self.image_coins]]),
            np.concatenate([images.labels, self.labels[self.image_coins]]),
            images.classes,
            units,
            images.missing + len(self) - planted,
        )

    def image_set(self, classes: tuple[str, ...]) -> Images:
        """All image canaries, whatever their coins say."""
        return Images(self.pixels, self.labels, classes)

    @property
    def fingerprint(self) -> str:
        """A hash that tells one draw of canaries from another."""
        digest = hashlib.sha256()
        for array in (self.gradient_coins, self.image_coins, self.pixels, self.labels):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write a file that its owner alone may read, whole or not at all; its folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)
        content = io.BytesIO()
        np.savez(
            content,
            gradient_coins=self.gradient_coins,
            image_coins=self.image_coins,
            pixels=self.pixels,
            labels=self.labels,
        )
        partial = path.with_name(f".{path.name}.partial")
        with open_private(partial, "wb") as file:
            file.write(content.getvalue())
            sync(file)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Canaries:
        """Read what `save` wrote; nothing in the file is run.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is missing: without the canaries' coins the run can be neither continued "
                "nor audited; restore it or start a new run."
            ) from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged; restore it or start a new run.") from error
