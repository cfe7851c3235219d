"""The journal of a growing file of pixels: which part is on disk for certain, and its checksum."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Chunk:
    """The decoded images ``start .. stop - 1`` of a listing.

    Attributes:
        start, stop: places in the listing.
        checksum: CRC-32 of the pixels of those that could be read.
        unreadable: place and reason of those that could not; they have no pixels.
    """

    start: int
    stop: int
    checksum: int
    unreadable: Mapping[int, str] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """How many images of the chunk have pixels."""
        return self.stop - self.start - len(self.unreadable)


class Journal:
    """Chunks in the order of their listing, a line each, in a file that only grows.

    A line that a crash tore, or that was damaged later, ends the journal where it is read.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Chunk]:
        """The chunks up to the first damaged line; none where there is no file."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        chunks: list[Chunk] = []
        for line in lines:
            chunk = _parse(line)
            if chunk is None or chunk.start != (chunks[-1].stop if chunks else 0):
                break
            chunks.append(chunk)
        return chunks

    def replace(self, chunks: Iterable[Chunk]) -> None:
        """Write these chunks in place of what the file holds."""
        with open_private(self.path, "wb") as file:
            file.writelines(map(_line, chunks))
            sync(file)

    def append(self, chunk: Chunk) -> None:
        """Add a chunk, whose pixels must be on disk already."""
        with open_private(self.path, "ab") as file:
            file.write(_line(chunk))
            sync(file)


def _line(chunk: Chunk) -> bytes:
    text = json.dumps(asdict(chunk)).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> Chunk | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    values = json.loads(text)
    values["unreadable"] = {int(place): why for place, why in values["unreadable"].items()}
    return Chunk(**values)


def matching(chunks: list[Chunk], pixels: Path, image_bytes: int) -> list[Chunk]:
    """The chunks up to the first one whose pixels in a file are not those of its checksum.

    Args:
        chunks: as a journal has them; their pixels follow each other in the file.
        pixels: the file; it need not exist.
        image_bytes: bytes of an image.
    """
    if not pixels.exists():
        return []
    with pixels.open("rb") as file:
        for number, chunk in enumerate(chunks):
            data = file.read(chunk.kept * image_bytes)
            if len(data) != chunk.kept * image_bytes or zlib.crc32(data) != chunk.checksum:
                return chunks[:number]
    return chunks


def open_private(path: Path, mode: str) -> IO[bytes]:
    """Open a file that nobody else may read, whatever the umask."""

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags, 0o600)
        os.chmod(name, 0o600)
        return descriptor

    return open(path, mode, opener=opener)


def sync(file: IO[bytes]) -> None:
    """Return when everything written so far is on disk."""
    file.flush()
    os.fsync(file.fileno())
