"""CIFAR-10: 60,000 photographs of 32x32 colour pixels.

Krizhevsky 2009, "Learning multiple layers of features from tiny images",
https://www.cs.toronto.edu/~kriz/cifar.html: the version for Python, in pickled batches.
"""

import io
from pathlib import Path

import numpy as np

from dp_synth.checks import one_of
from dp_synth.data.cifar_format import count_images, read_batch
from dp_synth.data.images import Images
from dp_synth.data.publication import Publication, check_md5, unreadable
from dp_synth.data.survey import Survey
from dp_synth.data.unpickling import unpickle

# As the file batches.meta has them.
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_FILES = {
    "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test": ("test_batch",),
}
# As torchvision lists them.
_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_PUBLICATION = Publication(
    name="cifar10",
    torchvision="CIFAR10",
    folder="cifar-10-batches-py",
    files=tuple(_MD5),
)


def load(
    *,
    root: Path | str | None = None,
    split: str = "train",
    verify: bool = True,
    download: bool = False,
    cache: Path | str | None = None,
) -> Images:
    """Return one split of CIFAR-10, 50,000 images for training and 10,000 for test.

    The batches are pickles; nothing that they name is run, whether they are verified or not.

    Args:
        root: the folder that torchvision would be given, which holds ``cifar-10-batches-py/``, or
            that inner folder. None looks where ``download`` puts it.
        split: ``"train"``, the five training batches one after the other, or ``"test"``.
        verify: check that the files are the published ones before they are opened as pickles. The
            format, the image size and the range of the labels are always checked.
        download: download the files through torchvision if they are nowhere, into ``root`` or,
            where that is None, into the folder ``data`` of the cache.
        cache: see ``files.cache_folder``.

    Returns:
        Images with pixels ``[N, 32, 32, 3]``, RGB.

    Raises:
        UserError: an unknown split, files that are nowhere, broken or not the published ones, or a
            download that failed.
    """
    one_of("split", split, tuple(_FILES))
    folder = _PUBLICATION.obtain(root, cache, download=download)
    pixels, labels = [], []
    for name in _FILES[split]:
        path = folder / name
        content = _read(path)
        if verify:
            check_md5(content, _MD5[name], path)
        batch = unpickle(io.BytesIO(content), path)
        some_pixels, some_labels = read_batch(batch, path, classes=len(CLASSES))
        pixels.append(some_pixels)
        labels.append(some_labels)
    # Concatenated views would keep the order of the planes in memory.
    return Images(np.ascontiguousarray(np.concatenate(pixels)), np.concatenate(labels), CLASSES)


def survey(*, root: Path | str | None = None, cache: Path | str | None = None) -> Survey | None:
    """What the folder that ``load`` would read tells, or None where there is none.

    Of each training batch only what stands before the pixels is read.

    Raises:
        UserError: a training batch is missing or broken.
    """
    folder = _PUBLICATION.find(root, cache)
    if folder is None:
        return None
    count = 0
    for name in _FILES["train"]:
        path = folder / name
        try:
            with path.open("rb") as file:
                count += count_images(file, path)
        except OSError as error:
            raise unreadable(path, error) from None
    return Survey(
        num_examples=count,
        classes=CLASSES,
        layout="CIFAR-10 batches",
        num_files=sum((folder / name).is_file() for name in _MD5),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
