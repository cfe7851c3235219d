"""The IDX format of MNIST and its successors: a short header, then the bytes of one array.

The header is two zero bytes, the type (8: unsigned bytes), the number of dimensions, and each
dimension as a big-endian 32-bit integer (http://yann.lecun.com/exdb/mnist/).
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from dp_synth.data.publication import check_md5, unreadable
from dp_synth.errors import UserError

_UNSIGNED_BYTES = 8
# Above every published file; a header that says more is a broken one, or a trap for the memory.
_MAX_BYTES = 1 << 30


def read(path: Path, item_shape: tuple[int, ...], md5: str | None = None) -> npt.NDArray[np.uint8]:
    """Read a file of bytes, compressed by gzip or not, whatever its name says.

    Args:
        path: the file.
        item_shape: the shape that each of its N items must have; ``()`` for numbers.
        md5: of the uncompressed content, or None to take the content as it is.

    Returns:
        uint8 ``[N, *item_shape]``.

    Raises:
        UserError: not readable, not IDX, other items, more or fewer bytes than its header says,
            or another content than the published.
    """
    try:
        with _open(path) as file:
            header, count = _read_header(file, item_shape, path)
            size = count * math.prod(item_shape)
            if size > _MAX_BYTES:
                raise UserError(f"{path} declares {size:,} bytes of data; get the file again.")
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from None
    if len(content) != size:
        found = f"{len(content):,}" if len(content) < size else "more"
        raise UserError(f"{path} declares {size:,} bytes of data and holds {found}; get it again.")
    if md5 is not None:
        check_md5(header + content, md5, path)
    return np.frombuffer(content, np.uint8).reshape(count, *item_shape).copy()


def count_items(path: Path, item_shape: tuple[int, ...]) -> int:
    """The number N of items that the header of a file declares; nothing else of it is read.

    Raises:
        UserError: not readable, not IDX, or other items.
    """
    try:
        with _open(path) as file:
            return _read_header(file, item_shape, path)[1]
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from None


def _open(path: Path) -> BinaryIO:
    """Open by content: browsers decompress files and leave the name's ``.gz``."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path)) if compressed else path.open("rb")


def _read_header(file: BinaryIO, item_shape: tuple[int, ...], path: Path) -> tuple[bytes, int]:
    """The header as it stands, and the number of items that it declares."""
    dimensions = 1 + len(item_shape)
    header = file.read(4 + 4 * dimensions)
    if header[:4] != bytes([0, 0, _UNSIGNED_BYTES, dimensions]) or len(header) < 4 + 4 * dimensions:
        raise UserError(
            f"{path} is no IDX file of bytes in {dimensions} dimensions (it begins with "
            f"{header[:4].hex(' ')}); get the file again."
        )
    count, *found = struct.unpack_from(f">{dimensions}I", header, offset=4)
    if tuple(found) != item_shape:
        raise UserError(f"{path} holds items of {tuple(found)}, not {item_shape}; get it again.")
    return header, count
