"""``SHA256SUMS``: the checksum of every file of a folder but itself, as ``sha256sum -c`` reads it."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from dp_synth.errors import UserError
from dp_synth.files import write_atomically

NAME = "SHA256SUMS"


def digest(path: Path) -> str:
    """The SHA-256 of a file, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the list of a folder.

    Args:
        directory: the folder.
        known: sums that need not be computed again, by the names of files relative to the folder.
    """
    known = known or {}
    sums = {name: known.get(name) or digest(directory / name) for name in _names(directory)}
    write_atomically(directory / NAME, _list(sums))


def update(directory: Path, name: str) -> None:
    """Put the present checksum of one file, which was meant to change, on the list of a folder."""
    sums = _read(directory) | {name: digest(directory / name)}
    write_atomically(directory / NAME, _list(sums))


def verify(directory: Path) -> None:
    """Compare a folder with its list.

    Raises:
        UserError: there is no list, or a file is missing, changed or not on it.
    """
    listed = _read(directory)
    there = set(_names(directory))
    for name in sorted(there | listed.keys()):
        path = directory / name
        if name not in there:
            raise UserError(f"{path} is missing, but {directory / NAME} lists it; restore it.")
        if name not in listed:
            raise UserError(f"{path} is not listed in {directory / NAME}; remove it.")
        if path.is_symlink() or digest(path) != listed[name]:
            raise UserError(f"{path} is not what {directory / NAME} says; restore it.")


def _list(sums: Mapping[str, str]) -> str:
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def _names(directory: Path) -> Iterator[str]:
    """Whatever is no folder; a link is no folder, wherever it leads."""
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if name != NAME and (path.is_symlink() or not path.is_dir()):
            yield name


def _read(directory: Path) -> dict[str, str]:
    path = directory / NAME
    try:
        lines = path.read_text().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read, so nothing shows that {directory} is what was drawn; draw the "
            "data set again."
        ) from error
    return {
        name: checksum for checksum, _, name in (line.partition("  ") for line in lines if line)
    }
