"""WebDataset: tar files in which each image is ``<number>.png`` beside its label ``<number>.cls``.

https://github.com/webdataset/webdataset. Beside the tar files, ``dataset.json`` has the names of the
classes and the number of images in each tar file.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.formats import checksums
from dp_synth.formats.pictures import check_channels, decode, encode, number_name

_INDEX = "dataset.json"


def check(classes: Sequence[str], channels: int) -> None:
    """See ``Format.check``."""
    check_channels(channels)


def write_shard(
    directory: Path, images: Images, first: int, shard: int, num_shards: int
) -> dict[str, str]:
    """See ``Format.write_shard``."""
    path = directory / _name(shard)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (pixels, label) in enumerate(
            zip(images.pixels, images.labels, strict=True), start=first
        ):
            _add(tar, f"{number_name(number)}.cls", str(label).encode())
            _add(tar, f"{number_name(number)}.png", encode(pixels))
    return {path.name: checksums.digest(path)}


def _name(shard: int) -> str:
    return f"samples-{shard:05d}.tar"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no user, of the year 1970
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def assemble(directory: Path, counts: Sequence[int], classes: Sequence[str]) -> dict[str, str]:
    """See ``Format.assemble``."""
    index = {
        "classes": list(classes),
        "shards": {_name(shard): count for shard, count in enumerate(counts)},
    }
    path = directory / _INDEX
    path.write_text(json.dumps(index, indent=2) + "\n")
    return {path.name: checksums.digest(path)}


def is_in(directory: Path) -> bool:
    """See ``Format.is_in``."""
    return (directory / _INDEX).is_file()


def summary(directory: Path) -> tuple[int, tuple[str, ...]]:
    """See ``Format.summary``."""
    index = _index(directory)
    return sum(index["shards"].values()), tuple(index["classes"])


def read(directory: Path, most: int | None = None) -> Images:
    """See ``Format.read``."""
    index = _index(directory)
    shards = ((directory / name, count) for name, count in index["shards"].items())
    rows = list(islice((row for path, count in shards for row in _rows(path, count)), most))
    if not rows:
        raise UserError(f"{directory} holds no image; draw the data set again.")
    pixels, labels = zip(*rows, strict=True)
    return Images(np.stack(pixels), np.array(labels, np.int64), tuple(index["classes"]))


def _rows(path: Path, count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Pixels and label of each of the ``count`` images of a tar file."""
    try:
        with tarfile.open(path, "r:") as tar:
            label = -1
            for member in tar:
                file = tar.extractfile(member)
                data = b"" if file is None else file.read()
                if member.name.endswith(".cls"):
                    label = int(data)
                else:
                    yield decode(data, f"{member.name} in {path}"), label
                    count -= 1
        if count:  # a file that was cut between two images reads like a shorter one
            raise ValueError("images are missing")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); draw the data set again.") from error


def _index(directory: Path) -> Any:
    path = directory / _INDEX
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged; draw the data set again.") from error


def loading(folder: str) -> str:
    """See ``Format.loading``."""
    return (
        "from glob import glob\n\n"
        "from webdataset import WebDataset\n\n"
        f'tars = sorted(glob("{folder}/samples-*.tar"))\n'
        'data = WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("png", "cls")\n\n'
        "# or\n"
        "from datasets import load_dataset\n\n"
        'data = load_dataset("webdataset", data_files={"train": tars}, split="train")'
    )


def card_header() -> dict[str, Any]:
    """See ``Format.card_header``."""
    return {"configs": [{"config_name": "default", "data_files": "samples-*.tar"}]}
