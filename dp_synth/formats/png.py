"""A folder for each class, with a PNG file for each image: ``<class>/<number>.png``."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dp_synth.data.folder import is_folder_name, read_image_folder
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.formats import checksums
from dp_synth.formats.pictures import check_channels, encode, number_name

_TAKEN = ("README.md", checksums.NAME)  # beside the class folders


def check(classes: Sequence[str], channels: int) -> None:
    """See ``Format.check``."""
    check_channels(channels)
    for name in classes:
        if not is_folder_name(name) or name in _TAKEN:
            raise UserError(
                f"class {name!r} cannot be a folder's name; use sampler.format=webdataset, which "
                "needs none, or rename the class."
            )


def write_shard(
    directory: Path, images: Images, first: int, shard: int, num_shards: int
) -> dict[str, str]:
    """See ``Format.write_shard``."""
    _make_folders(directory, images.classes)
    sums = {}
    for number, (pixels, label) in enumerate(
        zip(images.pixels, images.labels, strict=True), start=first
    ):
        name, data = f"{images.classes[label]}/{number_name(number)}.png", encode(pixels)
        (directory / name).write_bytes(data)
        sums[name] = hashlib.sha256(data).hexdigest()
    return sums


def assemble(directory: Path, counts: Sequence[int], classes: Sequence[str]) -> dict[str, str]:
    """See ``Format.assemble``; a class without an image has a folder, too."""
    _make_folders(directory, classes)
    return {}


def _make_folders(directory: Path, classes: Sequence[str]) -> None:
    for name in classes:
        (directory / name).mkdir(exist_ok=True)


def is_in(directory: Path) -> bool:
    """See ``Format.is_in``; what no other format claims is taken for class folders."""
    return directory.is_dir()


def summary(directory: Path) -> tuple[int, tuple[str, ...]]:
    """See ``Format.summary``."""
    folders = [
        path
        for path in sorted(directory.iterdir())
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
    ]
    count = sum(1 for folder in folders for _ in folder.glob("*.png"))
    return count, tuple(folder.name for folder in folders)


def read(directory: Path, most: int | None = None) -> Images:
    """See ``Format.read``; all are read class by class, the first ones by number."""
    return read_image_folder(directory, most)


def loading(folder: str) -> str:
    """See ``Format.loading``."""
    return (
        "from torchvision.datasets import ImageFolder\n\n"
        f'data = ImageFolder("{folder}")\n\n'
        "# or\n"
        "from datasets import load_dataset\n\n"
        f'data = load_dataset("imagefolder", data_dir="{folder}", split="train")'
    )


def card_header() -> dict[str, Any]:
    """See ``Format.card_header``."""
    # `datasets` would drop the labels of images that are all of one class.
    files = {"config_name": "default", "data_files": "*/*.png", "drop_labels": False}
    return {"configs": [files]}
