"""Parquet files as Hugging Face's ``datasets`` writes them: ``data/train-00000-of-00017.parquet``.

Columns ``image``, a PNG file with its name, and ``label``; the schema's metadata tell ``datasets``
that they are an ``Image`` and a ``ClassLabel``
(https://huggingface.co/docs/datasets/about_dataset_features).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.formats import checksums
from dp_synth.formats.pictures import check_channels, decode, encode, number_name

_FOLDER = "data"
_METADATA = b"huggingface"


def check(classes: Sequence[str], channels: int) -> None:
    """See ``Format.check``."""
    check_channels(channels)
    _arrow()


def _arrow() -> Any:
    """The library, which not everybody needs."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "sampler.format=parquet needs pyarrow; install it by pip install 'dp-synth[formats]'."
        ) from error
    return pyarrow


def write_shard(
    directory: Path, images: Images, first: int, shard: int, num_shards: int
) -> dict[str, str]:
    """See ``Format.write_shard``."""
    arrow = _arrow()
    names = [f"{number_name(number)}.png" for number in range(first, first + len(images))]
    pictures = [
        {"bytes": encode(pixels), "path": name}
        for pixels, name in zip(images.pixels, names, strict=True)
    ]
    table = arrow.table([pictures, images.labels], schema=_schema(arrow, images.classes))
    name = f"{_FOLDER}/train-{shard:05d}-of-{num_shards:05d}.parquet"
    (directory / _FOLDER).mkdir(exist_ok=True)
    arrow.parquet.write_table(table, directory / name)
    return {name: checksums.digest(directory / name)}


def _schema(arrow: Any, classes: Sequence[str]) -> Any:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
    }
    return arrow.schema(
        {
            "image": arrow.struct({"bytes": arrow.binary(), "path": arrow.string()}),
            "label": arrow.int64(),
        },
        metadata={_METADATA: json.dumps({"info": {"features": features}})},
    )


def assemble(directory: Path, counts: Sequence[int], classes: Sequence[str]) -> dict[str, str]:
    """See ``Format.assemble``; nothing is left to do."""
    return {}


def is_in(directory: Path) -> bool:
    """See ``Format.is_in``."""
    return bool(_files(directory))


def _files(directory: Path) -> list[Path]:
    return sorted((directory / _FOLDER).glob("train-*-of-*.parquet"))


def summary(directory: Path) -> tuple[int, tuple[str, ...]]:
    """See ``Format.summary``."""
    files = [_open(path) for path in _files(directory)]
    return sum(file.metadata.num_rows for file in files), _classes(files[0])


def read(directory: Path, most: int | None = None) -> Images:
    """See ``Format.read``."""
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for path in _files(directory):
        file = _open(path)
        classes = _classes(file)
        rows = file.read().slice(0, None if most is None else most - len(labels))
        for picture in rows["image"].to_pylist():
            pixels.append(decode(picture["bytes"], f"{picture['path']} in {path}"))
        labels += rows["label"].to_pylist()
        if len(labels) == most:
            break
    return Images(np.stack(pixels), np.array(labels, np.int64), classes)


def _open(path: Path) -> Any:
    arrow = _arrow()
    try:
        return arrow.parquet.ParquetFile(path)
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{path} is damaged; draw the data set again.") from error


def _classes(file: Any) -> tuple[str, ...]:
    features = json.loads(file.schema_arrow.metadata[_METADATA])["info"]["features"]
    return tuple(features["label"]["names"])


def loading(folder: str) -> str:
    """See ``Format.loading``."""
    return (
        "from datasets import load_dataset\n\n"
        f'data = load_dataset("parquet", data_files="{folder}/data/*.parquet", split="train")'
    )


def card_header() -> dict[str, Any]:
    """See ``Format.card_header``."""
    return {"configs": [{"config_name": "default", "data_files": "data/train-*"}]}
