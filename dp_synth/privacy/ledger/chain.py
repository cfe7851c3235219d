"""A file of JSON lines that only grows, each line with the hash of the one before.

Nothing here knows what an entry means; the ledger does. Light imports only: this part is tested by
killing processes that write.
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from dp_synth.errors import UserError

logger = logging.getLogger("dp_synth")

Entry = dict[str, Any]

# Stands where the first line would have the hash of the line before: what the file is.
FIRST = "dp_synth privacy ledger, format 1"

_BEGINNING = b'{"entry":'
_TORN = b" torn\n"
_PATIENCE = 10.0  # seconds until somebody who waits is told so

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Content:
    """What stands in a file.

    Attributes:
        entries: oldest first.
        hashes: one per entry, 64 hexadecimal digits.
        torn: lines of which a crash left only the beginning; nobody was told that they are written.
        lead: what must come before a new line, so that it stands on a line of its own.
    """

    entries: list[Entry]
    hashes: list[str]
    torn: int
    lead: bytes


class Chain:
    """Entries that any number of processes append to one file, and nobody changes unnoticed.

    A line is ``{"entry": ..., "hash": ..., "previous": ...}`` in canonical JSON (sorted keys, no
    blanks). ``previous`` is the hash of the line before, in the first line ``FIRST``; ``hash`` is
    the SHA-256 of the line without its hash.

    Shown: a line that was changed, removed, inserted or moved, by the line that no longer follows.
    Not shown by the file alone: that its *last* lines were cut off, or that somebody rewrote every
    line from some place on. Both change the newest hash, so a hash that was noted down elsewhere
    shows them.

    A crash at any byte leaves at most the beginning of a line. It stays where it is and the next
    writer marks it, so that the file is only ever appended to, and can be put on a file system, or
    under an attribute, that allows nothing else.

    Args:
        path: the file; it need not exist. Made with mode 0600, in folders of mode 0700 where these
            are missing; what exists keeps its mode, since a site may share one ledger.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Content:
        """Everything in the file, checked; empty where there is none. Takes no lock.

        Raises:
            UserError: the chain is broken, naming the line; the file holds something else or cannot
                be read.
        """
        with self._named():
            try:
                self._refuse_other_kinds()
                with self.path.open("rb") as file:
                    return self._parse(file)
            except FileNotFoundError:
                return Content([], [], 0, b"")

    def extend(self, decide: Callable[[list[Entry]], Iterable[Entry]]) -> None:
        """Append what ``decide`` answers to the entries so far; others wait meanwhile.

        On return the new entries are on disk. If ``decide`` raises, nothing is written.

        Raises:
            UserError: as ``read``; or the file cannot be written.
        """
        with self._named():
            _make_folder(self.path.parent)
            self._refuse_other_kinds()
            with self._alone(), open(self.path, "a+b", opener=_open_private) as file:
                file.seek(0)
                content = self._parse(file)
                new = list(decide(content.entries))
                if new:
                    _write(file.fileno(), content.lead + _lines(new, content.hashes))
                    _sync_folder(self.path.parent)

    def _parse(self, file: BinaryIO) -> Content:
        entries: list[Entry] = []
        hashes: list[str] = []
        torn, lead = 0, b""
        for number, line in enumerate(file, start=1):
            if line.endswith(_TORN):
                torn += 1
                continue
            is_whole = line.endswith(b"\n")
            found = _verified(line.removesuffix(b"\n"), _newest(hashes))
            if found is not None:
                entries.append(found[0])
                hashes.append(found[1])
                lead = b"" if is_whole else b"\n"
            elif is_whole or (number == 1 and not _begins_an_entry(line)):
                raise UserError(self._broken(number))
            else:
                torn, lead = torn + 1, _TORN
        return Content(entries, hashes, torn, lead)

    def _broken(self, number: int) -> str:
        if number == 1:
            return (
                f"ledger.path={self.path} does not begin like a privacy ledger: it holds something "
                "else, or its first line was changed or removed; name another file, or restore it."
            )
        return (
            f"ledger.path={self.path} was changed: line {number} does not follow from the one "
            "before, so one of the two is not what was written; restore the file from a backup."
        )

    def _refuse_other_kinds(self) -> None:
        if self.path.is_dir():
            raise UserError(
                f"ledger.path={self.path} is a folder; name a file, such as "
                f"{self.path / 'ledger.jsonl'}."
            )
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"ledger.path={self.path} is no ordinary file; name one.")

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say of what the operating system refuses which key it belongs to."""
        try:
            yield
        # NotImplementedError is filelock's, of a file system without locks.
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"ledger.path={self.path} cannot be read and written ({reason}); name a file on a "
                "disk where you may write."
            ) from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other writers out; wait while there is one."""
        mode = stat.S_IMODE(self.path.stat().st_mode) if self.path.exists() else 0
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), mode=mode | 0o600)
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            logger.warning("Another process writes the privacy ledger; waiting for it.")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _verified(line: bytes, previous: str) -> tuple[Entry, str] | None:
    """The entry of a line and its hash; None unless every byte is as it was written."""
    try:
        entry = json.loads(line)["entry"]
        text, digest = _line(entry, previous)
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return (entry, digest) if isinstance(entry, dict) and line == text else None


def _line(entry: Entry, previous: str) -> tuple[bytes, str]:
    """An entry as its line without the newline, and its hash."""
    content = _ENCODER.encode(entry)
    digest = hashlib.sha256(f'{{"entry":{content},"previous":"{previous}"}}'.encode()).hexdigest()
    return f'{{"entry":{content},"hash":"{digest}","previous":"{previous}"}}'.encode(), digest


def _lines(entries: Iterable[Entry], hashes: list[str]) -> bytes:
    lines, previous = [], _newest(hashes)
    for entry in entries:
        line, previous = _line(entry, previous)
        lines.append(line + b"\n")
    return b"".join(lines)


def _newest(hashes: list[str]) -> str:
    return hashes[-1] if hashes else FIRST


def _begins_an_entry(line: bytes) -> bool:
    """Whether a crash can have left this of a first line."""
    return _BEGINNING.startswith(line) or line.startswith(_BEGINNING)


def _write(descriptor: int, data: bytes) -> None:
    """Return when all of it is on disk."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


def _open_private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _make_folder(folder: Path) -> None:
    """Make a folder for the owner alone, and those above it; what exists is left as it is."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
