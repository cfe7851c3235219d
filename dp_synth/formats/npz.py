"""One NumPy archive, ``samples.npz``: arr_0 uint8 [N,H,W,C], arr_1 int64 [N], classes [classes].

The first two are what guided-diffusion's sampling scripts write and its evaluator reads
(https://github.com/openai/guided-diffusion). Nothing in it is pickled.
"""

import math
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.formats import checksums

_FILE = "samples.npz"
_PARTS = "parts"  # the shards, until all are there


def check(classes: Sequence[str], channels: int) -> None:
    """See ``Format.check``; any can be written."""


def write_shard(
    directory: Path, images: Images, first: int, shard: int, num_shards: int
) -> dict[str, str]:
    """See ``Format.write_shard``; none of a shard's files is there in the end."""
    (directory / _PARTS).mkdir(exist_ok=True)
    pixels, labels = _parts(directory, shard)
    np.save(pixels, images.pixels, allow_pickle=False)
    np.save(labels, images.labels, allow_pickle=False)
    return {}


def _parts(directory: Path, shard: int) -> tuple[Path, Path]:
    """The files of a shard's pixels and labels."""
    folder = directory / _PARTS
    return folder / f"{shard:05d}-pixels.npy", folder / f"{shard:05d}-labels.npy"


def assemble(directory: Path, counts: Sequence[int], classes: Sequence[str]) -> dict[str, str]:
    """See ``Format.assemble``; one shard is in memory at a time."""
    path = directory / _FILE
    if not path.exists():
        partial = directory / f".{_FILE}.partial"
        pixels, labels = zip(
            *(_parts(directory, shard) for shard in range(len(counts))), strict=True
        )
        with zipfile.ZipFile(partial, "w") as archive:
            _join(archive, "arr_0", pixels, sum(counts))
            _join(archive, "arr_1", labels, sum(counts))
            with _member(archive, "classes") as file:
                npy.write_array(file, np.array(classes, np.str_), allow_pickle=False)
        partial.replace(path)
    shutil.rmtree(directory / _PARTS, ignore_errors=True)
    return {_FILE: checksums.digest(path)}


def _join(archive: zipfile.ZipFile, name: str, parts: Iterable[Path], count: int) -> None:
    """Write arrays from files, one after another, as one array of ``count`` rows."""
    with _member(archive, name) as file:
        for number, part in enumerate(parts):
            array = np.load(part, allow_pickle=False)
            if number == 0:
                header = npy.header_data_from_array_1_0(array)
                npy.write_array_header_1_0(file, header | {"shape": (count, *array.shape[1:])})
            file.write(array.tobytes())


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """An array's file in the archive, of the year 1980, of any size."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def is_in(directory: Path) -> bool:
    """See ``Format.is_in``."""
    return (directory / _FILE).is_file()


def summary(directory: Path) -> tuple[int, tuple[str, ...]]:
    """See ``Format.summary``."""
    labels, classes = _load(directory, "arr_1", "classes")
    return len(labels), tuple(map(str, classes))


def read(directory: Path, most: int | None = None) -> Images:
    """See ``Format.read``."""
    pixels, labels = _load(directory, "arr_0", "arr_1", most=most)
    (classes,) = _load(directory, "classes")
    return Images(pixels, labels, tuple(map(str, classes)))


def _load(directory: Path, *names: str, most: int | None = None) -> list[np.ndarray]:
    """Arrays of the archive, or so many of their first rows: the rest is not read."""
    path = directory / _FILE
    try:
        with zipfile.ZipFile(path) as archive:
            return [_rows(archive, name, most) for name in names]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged; draw the data set again.") from error


def _rows(archive: zipfile.ZipFile, name: str, most: int | None) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        if most is None:
            return npy.read_array(file, allow_pickle=False)
        npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
        shape = (min(most, shape[0]), *shape[1:])
        data = file.read(math.prod(shape) * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(shape).copy()


def loading(folder: str) -> str:
    """See ``Format.loading``."""
    return (
        "import numpy as np\n\n"
        f'data = np.load("{folder}/{_FILE}")\n'
        'images, labels, classes = data["arr_0"], data["arr_1"], data["classes"]'
    )


def card_header() -> dict[str, Any]:
    """See ``Format.card_header``; Hugging Face shows no such files."""
    return {"viewer": False}
