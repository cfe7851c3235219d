"""Tables of image files: a CSV whose columns are the path, the label and whatever else is known."""

from __future__ import annotations

import csv
import io
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dp_synth.data.sources import Source, printable
from dp_synth.errors import UserError

REQUIRED = ("path", "label")


@dataclass(frozen=True, eq=False)
class Table:
    """Labelled names of N image files.

    Attributes:
        what: how messages call the table: the CSV's full path.
        names: distinct names in a source.
        labels: the class's name of each.
        columns: by header, N further values each; ``{}`` where there was no CSV.
        lines: the line of the CSV that each stands in, from 1; empty where there was no CSV.
    """

    what: str
    names: Sequence[str]
    labels: Sequence[str]
    columns: Mapping[str, Sequence[str]]
    lines: Sequence[int] = ()

    def where(self, row: int) -> str:
        """How messages call a row: the CSV and the line."""
        return f"{self.what} line {self.lines[row]}"

    def filled(self, column: str) -> Sequence[str]:
        """The values of a further column, none of them empty.

        Raises:
            UserError: an empty value.
        """
        values = self.columns[column]
        for row, value in enumerate(values):
            if not value:
                raise UserError(f"{self.where(row)} has no {column}; fill it in.")
        return values


def read_table(source: Source, name: str) -> Table:
    """Read a CSV whose header names ``path``, ``label`` and any further columns.

    Comma-separated, UTF-8 with or without a byte order mark, quoted and with line ends as Python's
    csv module takes them (RFC 4180 and a little more). Paths are relative to the CSV's folder, with
    ``/`` between folders; ``./a`` and ``a`` are one path. Blanks around all other values are
    dropped, so that no unit falls apart into two. Empty lines are passed over. Whether the files
    are there is not looked at.

    Args:
        source: where the CSV lies, and the files that it lists.
        name: of the CSV in the source.

    Raises:
        UserError: naming the file, and the line where there is one: not UTF-8, a missing or doubled
            column, a row of another length than the header's, an empty, absolute or doubled path,
            one with ``..``, an empty label, a zero byte, a field beyond 131,072 characters; no row.
    """
    what = source.describe(name)
    data = source.read(name)
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    try:
        return _read(what, name.rpartition("/")[0], _numbered(reader, what))
    except csv.Error as error:
        raise UserError(f"{what} line {reader.line_num} is no row of a CSV: {error}.") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{what} line {_undecodable_line(data)} is not UTF-8; save it as CSV in UTF-8."
        ) from None


def _numbered(reader: Any, what: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv.reader that are not empty, each with the line that it begins in."""
    line = 1
    for cells in reader:
        if any("\0" in cell for cell in cells):
            raise UserError(f"{what} line {line} has a zero byte; save it as CSV in UTF-8.")
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _read(what: str, folder: str, rows: Iterator[tuple[int, list[str]]]) -> Table:
    header = _header(what, next(rows, (1, []))[1])
    path_place, label_place = (header.index(column) for column in REQUIRED)
    further = {column: i for i, column in enumerate(header) if column not in REQUIRED}
    names: dict[str, None] = {}  # in order, and quick to find a double in
    labels: list[str] = []
    columns: dict[str, list[str]] = {column: [] for column in further}
    lines = array("Q")
    same: dict[str, str] = {}  # one object per distinct value, however many rows have it
    for line, cells in rows:
        if len(cells) != len(header):
            raise UserError(
                f"{what} line {line} has {len(cells)} fields, but the header has {len(header)}; "
                "quote values that hold commas."
            )
        path = _clean_path(cells[path_place], f"{what} line {line}")
        name = f"{folder}/{path}" if folder else path
        if name in names:
            raise UserError(f"{what} line {line} lists {printable(path)} a second time; remove it.")
        label = cells[label_place].strip()
        if not label:
            raise UserError(f"{what} line {line} has no label; fill it in or remove the line.")
        names[name] = None
        labels.append(same.setdefault(label, label))
        for column, i in further.items():
            value = cells[i].strip()
            columns[column].append(same.setdefault(value, value))
        lines.append(line)
    if not names:
        raise UserError(f"{what} lists no images; add a line for each.")
    return Table(what, list(names), labels, columns, lines)


def _header(what: str, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    for column in REQUIRED:
        if column not in header:
            raise UserError(
                f"{what} has no column {column}: its first line must be path,label and the names "
                "of further columns, separated by commas."
            )
    for column in header:
        if header.count(column) > 1:
            raise UserError(f"{what} has two columns named {column!r}; rename one.")
    return header


def _clean_path(path: str, where: str) -> str:
    """The path in the one spelling that names have: no ``.``, no doubled ``/``."""
    parts = path.split("/")
    if path.startswith("/") or ".." in parts:
        raise UserError(
            f"{where} lists {printable(path)}, which is absolute or has '..'; give a path relative "
            "to the CSV's folder."
        )
    clean = "/".join(part for part in parts if part not in ("", "."))
    if not clean:
        raise UserError(f"{where} has no path; fill it in or remove the line.")
    return clean


def _undecodable_line(data: bytes) -> int:
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Counted from the bytes: the reader's own count stands where the last block ended.
        return data.count(b"\n", 0, error.start) + 1
    return 1
