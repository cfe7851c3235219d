"""Where image files lie: a folder or a zip archive, read by name and never outside of it."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from dp_synth.errors import UserError

MAX_FILE_BYTES = 256 * 2**20

# What macOS adds to archives beside the files that they are for.
_RESOURCE_FORKS = "__MACOSX"
# Python bounds the output of no other method while it unpacks, so that a bomb would go off.
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
# zipfile and zlib report a broken archive by any of these.
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,
    struct.error,
)
# Folders whose links one Folder remembers as resolved: names come folder by folder.
_FOLDERS_REMEMBERED = 1024


class Source(Protocol):
    """Files by name; names are relative, ``/``-separated, without ``.`` and ``..``.

    Sources can be pickled. All methods raise UserError, which names the file, for whatever is
    wrong with a file, a name or the source itself, also where files vanish in the meantime.
    """

    def walk(self) -> Iterator[str]:
        """The names of all regular files, sorted; no file is opened.

        Hidden files and folders (``.name``), ``__MACOSX``, pipes, sockets and devices are passed
        over.
        """
        ...

    def stat(self, name: str) -> tuple[int, int]:
        """The size of a file in bytes and when it was last changed, in nanoseconds."""
        ...

    def read(self, name: str) -> bytes:
        """All of a file's bytes; UserError if they are more than ``MAX_FILE_BYTES``."""
        ...

    def describe(self, name: str) -> str:
        """How messages call a file: its path in full, printable whatever its name holds."""
        ...


class Folder:
    """The files below a folder.

    Links are followed where they stay below it. One that leads out of it is refused, and so is a
    folder that is reached twice: a link to itself would be walked for ever, a link to another
    would list its images again.

    Args:
        root: the folder; it need not exist yet.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = os.path.abspath(root)
        self._real_folders: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Folder({self.root!r})"

    def walk(self) -> Iterator[str]:
        """See ``Source.walk``.

        Raises:
            UserError: no such folder, a folder that cannot be listed or is reached twice, a name
                that is not UTF-8, a link that leads out of the root or to nothing.
        """
        reached: set[tuple[int, int]] = set()
        pending = [""]  # what is still to come, the next one last; folders end in "/"
        while pending:
            name = pending.pop()
            if name == "" or name.endswith("/"):
                pending.extend(sorted(self._entries(name, reached), reverse=True))
            else:
                yield name

    def stat(self, name: str) -> tuple[int, int]:
        """See ``Source.stat``; of a link, the file that it leads to."""
        try:
            _, status = self._file(name)
        except OSError as error:
            raise self._unreadable(name, error) from None
        return status.st_size, status.st_mtime_ns

    def read(self, name: str) -> bytes:
        """See ``Source.read``; also refuses a file whose size changes while it is read."""
        try:
            path, status = self._file(name)
            size = status.st_size
            if size > MAX_FILE_BYTES:
                raise _too_large(self.describe(name), size)
            data = _read(path, size + 1)
        except OSError as error:
            raise self._unreadable(name, error) from None
        if len(data) != size:
            raise UserError(
                f"{self.describe(name)} changed while it was read; start again when nothing "
                "writes to it."
            )
        return data

    def describe(self, name: str) -> str:
        """See ``Source.describe``."""
        return printable(os.path.join(self.root, name))

    def _entries(self, folder: str, reached: set[tuple[int, int]]) -> Iterator[str]:
        """The names below one folder that ``walk`` is to visit; folders end in "/"."""
        path = os.path.join(self.root, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in reached:
                raise UserError(
                    f"{printable(path)} is a folder that is listed already under another name; "
                    "remove the link that leads to it."
                )
            reached.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == _RESOURCE_FORKS:
                        continue
                    name = folder + entry.name
                    if not _is_utf8(entry.name):
                        raise _not_utf8(self.describe(name))
                    if entry.is_symlink():
                        self._check_link(name)
                    if entry.is_dir():
                        yield name + "/"
                    elif entry.is_file():
                        yield name
        except OSError as error:
            raise UserError(
                f"{printable(path)} cannot be listed ({error.strerror}); name a folder that "
                "exists and that you may read."
            ) from None

    def _check_link(self, name: str) -> None:
        if not os.path.exists(self._resolved(name)):
            raise UserError(f"{self.describe(name)} is a link that leads nowhere; remove it.")

    def _file(self, name: str) -> tuple[str, os.stat_result]:
        """The path of a file, links resolved, and its status; it lies below the root."""
        if not _is_plain(name):
            raise _not_plain(self.describe(name))
        folder, _, last = name.rpartition("/")
        path = os.path.join(self._real_folder(folder), last)
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            path = self._resolved(name)
            status = os.stat(path)
        # Found out before it is opened: one would wait for ever for somebody to write to a pipe.
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{self.describe(name)} is not a file; remove or replace it.")
        return path, status

    def _real_folder(self, folder: str) -> str:
        """A folder's path with its links resolved, which costs as much as reading a small file."""
        path = self._real_folders.get(folder)
        if path is None:
            path = self._resolved(folder)
            if len(self._real_folders) == _FOLDERS_REMEMBERED:
                self._real_folders.clear()
            self._real_folders[folder] = path
        return path

    def _resolved(self, name: str) -> str:
        """A path with its links resolved, which lies below the root."""
        path = os.path.realpath(os.path.join(self.root, name))
        root = os.path.realpath(self.root)
        if path != root and not path.startswith(os.path.join(root, "")):
            raise UserError(
                f"{self.describe(name)} is a link that leads out of {printable(self.root)}; copy "
                "the file instead."
            )
        return path

    def _unreadable(self, name: str, error: OSError) -> UserError:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return UserError(f"{self.describe(name)} does not exist; put it there or unlist it.")
        return UserError(
            f"{self.describe(name)} cannot be read ({error.strerror}); mend or remove it."
        )


class ZipArchive:
    """The members of a zip archive, unpacked in memory one at a time and never to disk.

    An archive is refused as a whole, whichever member is asked for, if a member is encrypted or a
    link, has an absolute name or one with ``..``, comes twice, is larger than ``MAX_FILE_BYTES``
    or is packed otherwise than by deflate.

    Args:
        path: the archive; it need not exist yet, and is opened when first needed.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = os.path.abspath(path)
        self._archive: zipfile.ZipFile | None = None

    def __repr__(self) -> str:
        return f"ZipArchive({self.path!r})"

    def __getstate__(self) -> dict[str, Any]:
        # An open file cannot be pickled; the other process opens its own.
        return {"path": self.path, "_archive": None}

    def walk(self) -> Iterator[str]:
        """See ``Source.walk``.

        Raises:
            UserError: no such archive, a damaged one, or one that is refused.
        """
        for name in sorted(self._opened().namelist()):
            if not name.endswith("/") and not _is_passed_over(name):
                yield name

    def stat(self, name: str) -> tuple[int, int]:
        """See ``Source.stat``: the member's unpacked size and the time of the whole archive.

        The times of members are local, even, and what whoever packed them says.
        """
        try:
            changed = os.stat(self.path).st_mtime_ns
        except OSError as error:
            raise self._unreadable(error) from None
        return self._member(name).file_size, changed

    def read(self, name: str) -> bytes:
        """See ``Source.read``; the member's checksum is verified."""
        archive, member = self._opened(), self._member(name)
        try:
            with archive.open(member) as file:
                # With a number, zipfile unpacks no more than that, whatever the member holds.
                data = file.read(member.file_size + 1)
        except OSError as error:
            raise self._unreadable(error) from None
        except _BROKEN_ZIP as error:
            raise self._damaged(self.describe(name), error) from None
        if len(data) != member.file_size:
            raise self._damaged(self.describe(name), "it is truncated")
        return data

    def describe(self, name: str) -> str:
        """See ``Source.describe``: ``archive.zip: member``."""
        return printable(f"{self.path}: {name}")

    def _opened(self) -> zipfile.ZipFile:
        if self._archive is None:
            if os.path.exists(self.path) and not os.path.isfile(self.path):
                raise UserError(f"{printable(self.path)} is not a file; name a zip file.")
            try:
                archive = zipfile.ZipFile(self.path)
            except OSError as error:
                raise self._unreadable(error) from None
            except _BROKEN_ZIP as error:
                raise self._damaged(printable(self.path), error) from None
            self._check(archive)
            self._archive = archive
        return self._archive

    def _check(self, archive: zipfile.ZipFile) -> None:
        names: set[str] = set()
        for member in archive.infolist():
            name, shown = member.filename, self.describe(member.filename)
            if not _is_plain(name.removesuffix("/")):
                raise _not_plain(shown)
            if name in names:
                raise UserError(f"{shown} is in the archive twice; pack it again.")
            names.add(name)
            if member.flag_bits & 1:
                raise UserError(f"{shown} is encrypted; pack it without a password.")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise UserError(f"{shown} is a link; pack the file instead.")
            if member.compress_type not in _METHODS:
                raise UserError(f"{shown} is packed by an unusual method; pack it with deflate.")
            if member.file_size > MAX_FILE_BYTES:
                raise _too_large(shown, member.file_size)

    def _member(self, name: str) -> zipfile.ZipInfo:
        try:
            return self._opened().getinfo(name)
        except KeyError:
            raise UserError(f"{self.describe(name)} is not in the archive.") from None

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(
            f"{printable(self.path)} cannot be read ({error.strerror or error}); name a zip file "
            "that exists and that you may read."
        )

    def _damaged(self, what: str, error: Exception | str) -> UserError:
        return UserError(f"{what} is damaged ({error}); pack or download the archive again.")


def printable(text: str) -> str:
    """The text itself if it can be printed on one line, else with escapes and in quotes."""
    return text if text.isprintable() else repr(text)


def _read(path: str, most: int) -> bytes:
    """The first bytes of a file; ``open`` would ask the system twice as often."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        data = os.read(descriptor, most)
        # A file system may give less than there is.
        while len(data) < most - 1 and (more := os.read(descriptor, most - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def _is_plain(name: str) -> bool:
    """Whether a name is relative and stays where it begins."""
    parts = name.split("/")
    return (
        "" not in parts
        and "." not in parts
        and ".." not in parts
        and "\0" not in name
        and not os.path.splitdrive(name)[0]
        and _is_utf8(name)
    )


def _is_utf8(name: str) -> bool:
    """Python keeps the bytes of a name that are not UTF-8 as characters that do not encode."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_passed_over(name: str) -> bool:
    return any(part.startswith(".") or part == _RESOURCE_FORKS for part in name.split("/"))


def _not_plain(shown: str) -> UserError:
    return UserError(
        f"{shown} is no name of a file here; use a relative one in UTF-8, such as "
        "train/cat/1.png, without '.' and '..'."
    )


def _not_utf8(shown: str) -> UserError:
    return UserError(f"{shown} has a name that is not UTF-8; rename it.")


def _too_large(shown: str, size: int) -> UserError:
    return UserError(
        f"{shown} has {size} bytes, but an image may have {MAX_FILE_BYTES}; remove it or make it "
        "smaller."
    )
