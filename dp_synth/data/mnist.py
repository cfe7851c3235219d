"""MNIST: 70,000 handwritten digits of 28x28 grey pixels, and how to read what is laid out like it.

LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/: four IDX files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dp_synth.checks import one_of
from dp_synth.data import idx
from dp_synth.data.images import Images
from dp_synth.data.publication import DEFAULT_CACHE, Publication
from dp_synth.data.survey import Survey
from dp_synth.errors import UserError

CLASSES = tuple("0123456789")
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
        cache: Path | str,
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

    def survey(self, root: Path | str | None, cache: Path | str) -> Survey | None:
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


# torchvision lists the md5 of the compressed files; these, of what is in them, are what several
# public programs that read the uncompressed files check independently of each other.
_MNIST = MnistLike(
    name="mnist",
    torchvision="MNIST",
    classes=CLASSES,
    md5={
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
)


def load(
    *,
    root: Path | str | None = None,
    split: str = "train",
    verify: bool = True,
    download: bool = False,
    cache: Path | str = DEFAULT_CACHE,
) -> Images:
    """Return one split of MNIST, 60,000 images for training and 10,000 for test.

    Args:
        root: the folder that torchvision would be given, which holds ``MNIST/raw/``, or that inner
            folder; the files in it compressed by gzip or not. None looks where ``download`` puts
            them.
        split: ``"train"`` or ``"test"``.
        verify: check that the contents are the published ones. The format, the image size and the
            range of the labels are always checked.
        download: download the files through torchvision if they are nowhere, into ``root`` or,
            where that is None, into the folder ``data`` of the cache.
        cache: the program's cache.

    Returns:
        Images with pixels ``[N, 28, 28, 1]``, ink 255 on 0; the classes are the ten figures.

    Raises:
        UserError: an unknown split, files that are nowhere, broken or not the published ones, or a
            download that failed.
    """
    return _MNIST.load(root, split, verify, download, cache)


def survey(*, root: Path | str | None = None, cache: Path | str = DEFAULT_CACHE) -> Survey | None:
    """What the folder that ``load`` would read tells, or None where there is none.

    Only the header of the training images is read.

    Raises:
        UserError: the training images are missing or no IDX file.
    """
    return _MNIST.survey(root, cache)
