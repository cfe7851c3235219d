"""MNIST: 70,000 handwritten digits of 28x28 grey pixels.

LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/: four IDX files.
"""

from pathlib import Path

from dp_synth.data.images import Images
from dp_synth.data.mnist_format import MnistLike
from dp_synth.data.survey import Survey

CLASSES = tuple("0123456789")

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
    cache: Path | str | None = None,
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
        cache: see ``files.cache_folder``.

    Returns:
        Images with pixels ``[N, 28, 28, 1]``, ink 255 on 0; the classes are the ten figures.

    Raises:
        UserError: an unknown split, files that are nowhere, broken or not the published ones, or a
            download that failed.
    """
    return _MNIST.load(root, split, verify, download, cache)


def survey(*, root: Path | str | None = None, cache: Path | str | None = None) -> Survey | None:
    """What the folder that ``load`` would read tells, or None where there is none.

    Only the header of the training images is read.

    Raises:
        UserError: the training images are missing or no IDX file.
    """
    return _MNIST.survey(root, cache)
