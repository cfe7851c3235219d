"""Fashion-MNIST: 70,000 articles of clothing of 28x28 grey pixels, in files like those of MNIST.

Xiao, Rasul and Vollgraf 2017 (arXiv 1708.07747), https://github.com/zalandoresearch/fashion-mnist.
"""

from pathlib import Path

from dp_synth.data.images import Images
from dp_synth.data.mnist_format import MnistLike
from dp_synth.data.survey import Survey

# As published, but for the first: "T-shirt/top" cannot be the name of a folder of images.
CLASSES = (
    "T-shirt or top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# Computed from Debian's package. Its files, compressed again with the time stamps of the
# publisher's, have the md5 that torchvision lists for those.
_FASHION_MNIST = MnistLike(
    name="fashion_mnist",
    torchvision="FashionMNIST",
    classes=CLASSES,
    md5={
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    package="dataset-fashion-mnist",
    installed=Path("/usr/share/datasets/fashion-mnist"),
)


def load(
    *,
    root: Path | str | None = None,
    split: str = "train",
    verify: bool = True,
    download: bool = False,
    cache: Path | str | None = None,
) -> Images:
    """Return one split of Fashion-MNIST, 60,000 images for training and 10,000 for test.

    Args:
        root: the folder that torchvision would be given, which holds ``FashionMNIST/raw/``, or that
            inner folder; the files in it compressed by gzip or not. None looks where Debian's
            package ``dataset-fashion-mnist`` puts them, then where ``download`` does.
        split: ``"train"`` or ``"test"``.
        verify: check that the contents are the published ones. The format, the image size and the
            range of the labels are always checked.
        download: download the files through torchvision if they are nowhere, into ``root`` or,
            where that is None, into the folder ``data`` of the cache.
        cache: see ``files.cache_folder``.

    Returns:
        Images with pixels ``[N, 28, 28, 1]``, the article bright on 0; the classes are the
        published ones, with "T-shirt or top" for "T-shirt/top", which no folder can be called.

    Raises:
        UserError: an unknown split, files that are nowhere, broken or not the published ones, or a
            download that failed.
    """
    return _FASHION_MNIST.load(root, split, verify, download, cache)


def survey(*, root: Path | str | None = None, cache: Path | str | None = None) -> Survey | None:
    """What the folder that ``load`` would read tells, or None where there is none.

    Only the header of the training images is read.

    Raises:
        UserError: the training images are missing or no IDX file.
    """
    return _FASHION_MNIST.survey(root, cache)
