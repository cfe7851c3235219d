"""The four files of MNIST, a layout that its successors use too: images and labels of two splits."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dp_synth.checks import one_of
from dp_synth.data import idx
from dp_synth.data.images import Images
from dp_synth.data.publication import Publication
from dp_synth.data.survey import Survey
from dp_synth.errors import UserError

_IMAGE = (28, 28)
_PREFIXES = {"train": "train", "test": "t10k"}
_FILES = tuple(
    f"{prefix}-{kind}{suffix}"
    for prefix in _PREFIXES.values()
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    for suffix in ("", ".gz")
)


@dataclass(frozen=True)
class MnistLike:
    """A data set in four IDX files that have MNIST's names.

    Attributes:
        name: as in ``dataset=NAME``.
        torchvision: the class of ``torchvision.datasets`` that downloads it.
        classes: names of the labels 0, 1, ...
        md5: of the content of each file, uncompressed: compression is not part of a content, and
            several versions of it are in use.
        package: the Debian package that has the files, if there is one.
        installed: where that package puts them.
    """

    name: str
    torchvision: str
    classes: tuple[str, ...]
    md5: Mapping[str, str]
    package: str | None = None
    installed: Path | None = None

    def load(
        self,
        root: Path | str | None,
        split: str,
        verify: bool,
        download: bool,
        cache: Path | str | None,
    ) -> Images:
        """See ``mnist.load``."""
        one_of("split", split, tuple(_PREFIXES))
        folder = self._publication.obtain(root, cache, download=download)
        images = _file(folder, f"{_PREFIXES[split]}-images-idx3-ubyte")
        labels = _file(folder, f"{_PREFIXES[split]}-labels-idx1-ubyte")
        pixels = idx.read(images, _IMAGE, self._md5(images) if verify else None)
        classes = idx.read(labels, (), self._md5(labels) if verify else None)
        if len(pixels) != len(classes):
            raise UserError(
                f"{images} holds {len(pixels):,} images and {labels} {len(classes):,} labels; "
                "get both files again."
            )
        if classes.size and classes.max() >= len(self.classes):
            raise UserError(
                f"{labels} holds a label {classes.max()}, above {len(self.classes) - 1}; "
                "get the file again."
            )
        return Images(pixels[..., np.newaxis], classes.astype(np.int64), self.classes)

    def survey(self, root: Path | str | None, cache: Path | str | None) -> Survey | None:
        """See ``mnist.survey``."""
        folder = self._publication.find(root, cache)
        if folder is None:
            return None
        return Survey(
            num_examples=idx.count_items(_file(folder, "train-images-idx3-ubyte"), _IMAGE),
            classes=self.classes,
            layout="IDX files",
            num_files=sum((folder / name).is_file() for name in _FILES),
        )

    @property
    def _publication(self) -> Publication:
        return Publication(
            name=self.name,
            torchvision=self.torchvision,
            folder=f"{self.torchvision}/raw",
            files=_FILES,
            package=self.package,
            installed=self.installed,
        )

    def _md5(self, path: Path) -> str:
        return self.md5[path.name.removesuffix(".gz")]


def _file(folder: Path, name: str) -> Path:
    """The file, uncompressed if it is there in both ways."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"{folder} holds neither {name} nor {name}.gz; complete the data set.")
