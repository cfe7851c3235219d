"""Image files decoded once, in parallel, into one memory-mapped array on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from dp_synth.checks import count, one_of
from dp_synth.data import decoding
from dp_synth.data.images import Images
from dp_synth.data.journal import Chunk, Journal, matching, open_private, sync
from dp_synth.data.listing import Listing
from dp_synth.errors import UserError

logger = logging.getLogger("dp_synth")

OnError = Literal["raise", "skip"]

# A chunk is what is decoded, written and journalled at once, and what a crash may cost: about a
# second of work. The bytes of its files bound it where large photographs become small images.
_CHUNK_IMAGES = 1024
_CHUNK_BYTES = 8 * 2**20
_CHUNK_FILE_BYTES = 32 * 2**20

_REFRESH_SECONDS = 0.2 if sys.stderr.isatty() else 10.0
_GONE = (-1, -1)  # size and time of a file that is not there


def load(
    listing: Listing,
    *,
    resolution: int,
    channels: Literal[1, 3],
    on_error: OnError = "raise",
    directory: Path,
) -> Images:
    """Return a listing's images, decoded by ``decoding.decode`` now or by an earlier call.

    The pixels are private and are kept, uncompressed, in ``directory/<key>/`` until someone
    removes them. The key is a hash of the place of the source, all names, sizes and times of
    change, the resolution, the channels and ``decoding.VERSION``; labels and units are no part of
    it. Folders have mode 0700 and files 0600, whatever the umask.

    A cache gets its name when it is whole and on disk. Until then, each finished chunk is
    journalled with a checksum, and a later call goes on behind the last one, however this one
    ended; everything from the first damaged chunk on is decoded again. Of two calls at once, the
    second waits for the first.

    A whole cache is used after its journal and its size were checked, and read through only if its
    pixels were written to since their checksums were last known to be right, which the file's time
    tells: this finds what programs and people do, and not bits that a disk lost silently.

    Threads decode, one per core: Pillow lets go of the interpreter while it works, and processes
    would have to import torch each. Memory holds about 24 MiB a core, however many images.

    Args:
        listing: where the images are; it may be empty.
        resolution: pixels of a side, 1 or more.
        channels: 1 for grey, 3 for RGB.
        on_error: what an unreadable image does: ``"raise"``, or ``"skip"``, which leaves it out
            and writes the reason to ``skipped.txt`` beside the pixels. A cache that lacks images
            serves ``"raise"`` only if they are readable by now, and is then mended.
        directory: the folder of all such caches; made if missing.

    Returns:
        Images with pixels ``[N, resolution, resolution, channels]``, a read-only ``np.memmap``, in
        the listing's order. ``missing`` is the number of units of which no image could be read,
        or of unreadable images where there are no units.

    Raises:
        UserError: an argument; an unreadable image, or all of them unreadable; a file that changed
            or vanished between its listing and its decoding, also with ``"skip"``; a directory
            that cannot be written or is full.
    """
    count("dataset.resolution", resolution)
    one_of("dataset.on_error", on_error, ("raise", "skip"))
    if channels not in (1, 3):
        raise UserError(f"images can have 1 or 3 channels, not {channels}.")
    decoder = _Decoder(listing, resolution, channels, on_error)
    if len(listing) == 0:
        return Images(
            np.empty((0, *decoder.shape), np.uint8), listing.labels, listing.classes, listing.units
        )
    home = Path(directory) / decoder.key()
    try:
        _make_private(home.parent)
        with _alone(home):
            chunks = _whole(home, decoder)
            if chunks is None:
                chunks = _complete(home, decoder)
        return _images(home, decoder, chunks)
    # NotImplementedError is filelock's, of a file system without locks.
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"decoded images cannot be kept in {directory} ({reason}); set DP_SYNTH_CACHE to a "
            "folder of your own on a disk with space."
        ) from error


class _Decoder:
    """Decodes images of a listing by their place, and sees to it that no file changes meanwhile."""

    def __init__(
        self, listing: Listing, resolution: int, channels: Literal[1, 3], on_error: OnError
    ) -> None:
        self.listing = listing
        self.resolution = resolution
        self.channels = channels
        self.on_error = on_error
        self.shape = (resolution, resolution, channels)
        self.image_bytes = resolution * resolution * channels
        self.stamps = np.empty((len(listing), 2), np.int64)
        for place in range(len(listing)):
            self.stamps[place] = self._stamp(place, on_error)

    def __len__(self) -> int:
        return len(self.listing)

    def key(self) -> str:
        """What the pixels depend on, hashed."""
        facts = (repr(self.listing.source), self.shape, decoding.VERSION)
        digest = hashlib.sha256(repr(facts).encode(errors="surrogateescape"))
        for name in self.listing.names:
            digest.update(name.encode(errors="surrogateescape") + b"\0")
        digest.update(self.stamps.tobytes())
        return digest.hexdigest()[:32]

    def one(self, place: int) -> npt.NDArray[np.uint8]:
        """The pixels of one image.

        Raises:
            UserError: it cannot be read.
        """
        source, name = self.listing.source, self.listing.names[place]
        data = source.read(name)
        return decoding.decode(data, source.describe(name), self.resolution, self.channels)

    def chunk(self, start: int, stop: int) -> tuple[Chunk, npt.NDArray[np.uint8]]:
        """The images ``start .. stop - 1``, without those that are to be left out.

        Raises:
            UserError: one cannot be read and ``on_error`` is ``"raise"``, or its file changed.
        """
        pixels = np.empty((stop - start, *self.shape), np.uint8)
        unreadable: dict[int, str] = {}
        kept = 0
        for place in range(start, stop):
            try:
                pixels[kept] = self.one(place)
                kept += 1
            except UserError as error:
                unreadable[place] = str(error)
            self._check_unchanged(place)
            if place in unreadable and self.on_error == "raise":
                raise UserError(unreadable[place])
        return Chunk(start, stop, zlib.crc32(pixels[:kept].data), unreadable), pixels[:kept]

    def ranges(self, start: int) -> Iterator[tuple[int, int]]:
        """Cut the places from ``start`` on into chunks."""
        most = max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // self.image_bytes))
        while start < len(self):
            sizes = np.cumsum(self.stamps[start : start + most, 0])
            stop = start + max(1, int(np.searchsorted(sizes, _CHUNK_FILE_BYTES)))
            yield start, stop
            start = stop

    def _stamp(self, place: int, on_error: OnError) -> tuple[int, int]:
        try:
            return self.listing.source.stat(self.listing.names[place])
        except UserError:
            if on_error == "raise":
                raise
            return _GONE

    def _check_unchanged(self, place: int) -> None:
        if self._stamp(place, "skip") != tuple(self.stamps[place]):
            raise UserError(
                f"{self.listing.source.describe(self.listing.names[place])} changed or vanished "
                "while images were decoded; start again when its folder is at rest, and what is "
                "decoded already will be used."
            )


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Keep other processes out of a cache; wait while one is in it."""
    lock = FileLock(home.with_name(f".{home.name}.lock"), mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another process decodes the same images; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _whole(home: Path, decoder: _Decoder) -> list[Chunk] | None:
    """The chunks of a cache that can be used as it is, else None.

    Raises:
        UserError: it lacks an image that is still unreadable, and ``on_error`` is ``"raise"``.
    """
    pixels = home / "pixels"
    chunks = Journal(home / "journal").read()
    if not chunks or chunks[-1].stop != len(decoder) or not pixels.exists():
        return None
    if pixels.stat().st_size != _kept(chunks) * decoder.image_bytes:
        return None
    if not _is_verified(home):
        if matching(chunks, pixels, decoder.image_bytes) != chunks:
            return None
        _mark_verified(home)
    unreadable = [place for chunk in chunks for place in chunk.unreadable]
    if decoder.on_error == "raise" and unreadable:
        for place in unreadable:
            decoder.one(place)
        return None
    return chunks


def _complete(home: Path, decoder: _Decoder) -> list[Chunk]:
    """Decode what is missing beside ``home``, and give it that name when it is whole."""
    staging = home.with_name(f".{home.name}.partial")
    if home.exists():
        shutil.rmtree(staging, ignore_errors=True)
        home.rename(staging)
    _make_private(staging)
    chunks = _usable(staging, decoder)
    _check_space(staging, (len(decoder) - _stop(chunks)) * decoder.image_bytes)
    # Neither the key, which follows the files' sizes, nor how many images are unreadable: what is
    # said on a screen or in a log is the same, whatever one of the images is.
    logger.warning(
        "Decoded images are kept in %s, which only you may read, until you remove them.",
        home.parent,
    )
    if decoder.on_error == "skip":
        logger.warning("Images that cannot be read are left out; skipped.txt beside them says why.")
    _decode_rest(staging, chunks, decoder)
    reasons = [why for chunk in chunks for why in chunk.unreadable.values()]
    if len(reasons) == len(decoder):
        shutil.rmtree(staging)
        raise UserError(f"None of the {len(reasons)} images can be read; the first: {reasons[0]}")
    if reasons:
        _write(staging / "skipped.txt", "".join(f"{why}\n" for why in reasons))
    _mark_verified(staging)
    _sync_folder(staging)
    staging.rename(home)
    _sync_folder(home.parent)
    return chunks


def _usable(staging: Path, decoder: _Decoder) -> list[Chunk]:
    """What an earlier call left behind; pixels and journal are cut back to it."""
    chunks = matching(Journal(staging / "journal").read(), staging / "pixels", decoder.image_bytes)
    if decoder.on_error == "raise":
        chunks = list(takewhile(lambda chunk: not chunk.unreadable, chunks))
    (staging / "skipped.txt").unlink(missing_ok=True)
    Journal(staging / "journal").replace(chunks)
    with open_private(staging / "pixels", "ab") as pixels:
        pixels.truncate(_kept(chunks) * decoder.image_bytes)
        sync(pixels)
    return chunks


def _decode_rest(staging: Path, chunks: list[Chunk], decoder: _Decoder) -> None:
    """Decode, write and journal what comes after ``chunks``, and append it to them."""
    journal = Journal(staging / "journal")
    with (
        tqdm(
            total=len(decoder),
            initial=_stop(chunks),
            desc="decoding images",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}",
            mininterval=_REFRESH_SECONDS,
            delay=1,
        ) as bar,
        open_private(staging / "pixels", "ab") as file,
        closing(_decoded(decoder, _stop(chunks))) as decoded,
    ):
        for chunk, pixels in decoded:
            file.write(pixels.data)
            sync(file)  # first the pixels, then the line that says that they are there
            journal.append(chunk)
            chunks.append(chunk)
            bar.update(chunk.stop - chunk.start)


def _decoded(
    decoder: _Decoder, start: int
) -> Generator[tuple[Chunk, npt.NDArray[np.uint8]], None, None]:
    """Decode in threads; chunks come in order, and a few are ready in advance."""
    workers = cores()
    pending: deque[Future[tuple[Chunk, npt.NDArray[np.uint8]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for first, stop in decoder.ranges(start):
            pending.append(pool.submit(decoder.chunk, first, stop))
            # Twice as many as can run: nobody is to wait while a chunk is being written.
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _images(home: Path, decoder: _Decoder, chunks: list[Chunk]) -> Images:
    listing = decoder.listing
    kept = np.ones(len(listing), dtype=bool)
    kept[[place for chunk in chunks for place in chunk.unreadable]] = False
    pixels = np.memmap(home / "pixels", np.uint8, "r", shape=(int(kept.sum()), *decoder.shape))
    if listing.units is None:
        units, missing = None, len(listing) - len(pixels)
    else:
        units = listing.units[kept]
        missing = listing.num_examples - len(np.unique(units))
    return Images(pixels, listing.labels[kept], listing.classes, units, missing)


def _is_verified(home: Path) -> bool:
    """Whether nothing was written to the pixels since their checksums were right."""
    try:
        return (home / "verified").read_text() == _written(home)
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _mark_verified(home: Path) -> None:
    _write(home / "verified", _written(home))


def _written(home: Path) -> str:
    return str((home / "pixels").stat().st_mtime_ns)


def _kept(chunks: list[Chunk]) -> int:
    return sum(chunk.kept for chunk in chunks)


def _stop(chunks: list[Chunk]) -> int:
    return chunks[-1].stop if chunks else 0


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"decoded images need {needed / 2**30:.1f} GiB, and {directory.parent} has "
            f"{free / 2**30:.1f} GiB left; set DP_SYNTH_CACHE to a folder on a larger disk."
        )


def _make_private(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.chmod(0o700)


def _write(path: Path, text: str) -> None:
    with open_private(path, "wb") as file:
        file.write(text.encode(errors="backslashreplace"))
        sync(file)


def _sync_folder(directory: Path) -> None:
    """Have the names in a folder on disk, where the system can do that (Windows cannot)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
