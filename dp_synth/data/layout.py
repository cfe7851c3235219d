"""What lies in a root: class folders or a CSV, split into ``train/`` and ``test/`` or not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dp_synth.data.decoding import SUFFIXES, is_image_name
from dp_synth.data.sources import Folder, Source, ZipArchive, printable
from dp_synth.data.table import Table, read_table
from dp_synth.errors import UserError

SPLITS = ("train", "test")
_WHAT_WORKS = "a folder of class folders, a folder with a CSV, a .csv file or a .zip of either"


@dataclass(frozen=True, eq=False)
class Layout:
    """Labelled names, as a root lists them.

    Attributes:
        source: the folder or archive that the names lie in.
        top: "" or the archive's only folder, ending in "/": what a user takes names relative to.
        what: how messages call the root.
        words: the layout in words.
        tables: by split; under None what no folder splits.
    """

    source: Source
    top: str
    what: str
    words: str
    tables: dict[str | None, Table]

    def relative(self, names: Sequence[str]) -> Sequence[str]:
        """Names as the user writes them: a zip's are those of the folder that was packed."""
        return [name[len(self.top) :] for name in names] if self.top else names


def find_layout(root: Path | str) -> Layout:
    """Look at what lies in ``root``; opens no file but CSVs and the directory of a zip.

    A folder with one CSV at its top is listed by that; else its subfolders ``train`` and ``test``,
    if it has both, are the splits, each with class folders or a CSV of its own; else its subfolders
    are the classes. What lies beside ``train`` and ``test``, hidden files and, among class folders,
    files without an image's suffix are passed over. A zip that holds one folder of folders, or one
    with a CSV, stands for that folder.

    Raises:
        UserError: no such root, or one of another kind; two CSVs; ``train`` without ``test`` or the
            other way round; no class folders, one without images; a file that a CSV lists and that
            is not there; what ``Source.walk`` and ``read_table`` refuse.
    """
    path = os.path.expanduser(str(root))
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        folder = Folder(path)
        return _look_into(folder, list(folder.walk()), top="", words="")
    if os.path.isfile(path) and suffix == ".csv":
        folder, name = Folder(os.path.dirname(path)), os.path.basename(path)
        table = _listed_by(folder, name, files=())
        return Layout(folder, "", table.what, "CSV", {None: table})
    if os.path.isfile(path) and suffix == ".zip":
        archive = ZipArchive(path)
        files = list(archive.walk())
        return _look_into(archive, files, _only_folder(files), words="zip of ")
    problem = "is of another kind" if os.path.exists(path) else "does not exist"
    raise UserError(f"root={printable(path)} {problem}; name {_WHAT_WORKS}.")


def _look_into(source: Source, files: list[str], top: str, words: str) -> Layout:
    what = _shown(source, top)
    table = _table_in(source, files, top)
    if table is not None:
        return Layout(source, top, what, f"{words}folder with a CSV", {None: table})
    if _is_split(source, files, top):
        tables: dict[str | None, Table] = {}
        for split in SPLITS:
            folder = f"{top}{split}/"
            below = [name for name in files if name.startswith(folder)]
            listed = _table_in(source, below, folder)
            tables[split] = class_folders(source, below, folder) if listed is None else listed
        return Layout(source, top, what, f"{words}train/ and test/", tables)
    table = class_folders(source, files, top)
    return Layout(source, top, what, f"{words}class folders", {None: table})


def _only_folder(files: Sequence[str]) -> str:
    """The folder of an archive that stands for all of it, ending in "/"; else "".

    A folder whose files are images is not it, but a class.
    """
    top = files[0].partition("/")[0] + "/" if files else ""
    if not all(name.startswith(top) for name in files):
        return ""
    inside = [name[len(top) :] for name in files]
    return top if any("/" in name or _is_csv(name) for name in inside) else ""


def _table_in(source: Source, files: Sequence[str], folder: str) -> Table | None:
    """The table of the only CSV at the top of a folder; None where there is none."""
    csvs = [name for name in files if _is_csv(name) and "/" not in name[len(folder) :]]
    if len(csvs) > 1:
        raise UserError(
            f"{_shown(source, folder)} holds {len(csvs)} CSV files at its top; leave the one that "
            "lists all images, with a column split for train and test."
        )
    return _listed_by(source, csvs[0], files) if csvs else None


def _listed_by(source: Source, name: str, files: Sequence[str]) -> Table:
    """A CSV's table, whose files are there; ``files`` are those known to be."""
    table = read_table(source, name)
    known = set(files)
    for row, image in enumerate(table.names):
        if image not in known:
            try:
                source.stat(image)
            except UserError as error:
                raise UserError(f"{table.where(row)}: {error}") from None
    return table


def _is_split(source: Source, files: Sequence[str], top: str) -> bool:
    """Whether ``train`` and ``test`` are splits; one alone with images in it is a class."""
    there = [split for split in SPLITS if any(name.startswith(f"{top}{split}/") for name in files)]
    if len(there) == 1:
        folder = f"{top}{there[0]}/"
        below = [name[len(folder) :] for name in files if name.startswith(folder)]
        if not any(is_image_name(name) and "/" not in name for name in below):
            (other,) = set(SPLITS) - set(there)
            raise UserError(
                f"{_shown(source, folder)} is there and {other}/ is not; add {other}/, or name what "
                f"{there[0]}/ holds as the root."
            )
    return len(there) == len(SPLITS)


def class_folders(source: Source, files: Sequence[str], folder: str) -> Table:
    """The images in the subfolders of a folder, at any depth, labelled by subfolder.

    Args:
        source: what the folder is in.
        files: the source's files below the folder.
        folder: ``""`` for the source itself, else ending in ``/``.

    Raises:
        UserError: a subfolder whose files are no images, or no image at all.
    """
    names, labels = [], []
    empty: set[str] = set()
    same: dict[str, str] = {}
    for name in files:
        label, is_below, _ = name[len(folder) :].partition("/")
        if not is_below:
            continue
        label = same.setdefault(label, label)
        if is_image_name(name):
            names.append(name)
            labels.append(label)
        else:
            empty.add(label)
    empty -= set(labels)
    if empty:
        raise UserError(
            f"{_shown(source, folder + min(empty))} holds files but no image; use one of "
            f"{', '.join(sorted(SUFFIXES))}."
        )
    if not names:
        raise UserError(
            f"{_shown(source, folder)} has no class folders with images; put the images in "
            "<class>/ or list them in a CSV."
        )
    return Table(_shown(source, folder), names, labels, {})


def _is_csv(name: str) -> bool:
    return name.lower().endswith(".csv")


def _shown(source: Source, folder: str) -> str:
    """How messages call a folder; the top of a zip is the zip."""
    return source.describe(folder).rstrip("/: ")
