"""The table ``metadata.csv`` of Camelyon17-WILDS: one row a patch, checked before it is believed.

Its columns and splits are described by Koh et al. 2021 (arXiv 2012.07421).
"""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from dp_synth.data.sources import Folder
from dp_synth.errors import UserError

METADATA = "metadata.csv"
SPLITS = ("train", "id_val", "val", "test")

Columns = Mapping[str, npt.NDArray[np.int64]]

# After an index that has no name.
_COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split")
_PLACE = _COLUMNS[:4]  # what a patch is named after
_WHOLE_NUMBER = re.compile("[0-9]{1,9}")
# Hospitals that are kept from training, whatever the column `split` says of their patches.
_VAL_CENTER = 1
_TEST_CENTER = 2


def read_metadata(folder: Folder) -> Columns:
    """The columns of ``metadata.csv``, int64 ``[rows]`` each, checked row by row.

    Raises:
        UserError: it cannot be read, or a line is not as WILDS writes it.
    """
    shown = folder.describe(METADATA)
    columns, lines = _parse(folder.read(METADATA), shown)
    for fault, wrong in _faults(columns):
        if wrong.any():
            raise UserError(f"{shown} line {lines[int(wrong.argmax())]} {fault}.")
    return columns


def _parse(data: bytes, shown: str) -> tuple[Columns, Sequence[int]]:
    """The columns, and the line that each row stands in."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{shown} is not UTF-8; take the file as WILDS publishes it.") from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    # 456,000 rows: numbers side by side take a tenth of what Python's own objects would.
    numbers, lines = array("q"), array("q")
    try:
        if tuple(next(rows, [])[1:]) != _COLUMNS:
            raise UserError(
                f"{shown} must begin with the line ,{','.join(_COLUMNS)} as WILDS v1.0 has it."
            )
        for row in filter(None, rows):  # empty lines are no rows
            if len(row) != 1 + len(_COLUMNS) or not all(map(_WHOLE_NUMBER.fullmatch, row[1:])):
                raise UserError(
                    f"{shown} line {rows.line_num} must have an index and {len(_COLUMNS)} whole "
                    f"numbers: {', '.join(_COLUMNS)}."
                )
            numbers.extend(map(int, row[1:]))
            lines.append(rows.line_num)
    except csv.Error as error:
        raise UserError(
            f"{shown} line {rows.line_num} is no row of a CSV ({error}); take the file as WILDS "
            "publishes it."
        ) from None
    table = np.array(numbers, dtype=np.int64).reshape(-1, len(_COLUMNS))
    return dict(zip(_COLUMNS, table.T, strict=True)), lines


def _faults(columns: Columns) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """What can be wrong with a row, and bool ``[rows]``: with which ones it is."""
    for name in ("tumor", "split"):
        yield f"has a {name} that is neither 0 nor 1", columns[name] > 1
    patches = np.stack([columns[name] for name in _PLACE], axis=1)
    yield "lists a patch that an earlier line lists too", ~_is_first(patches)
    # Else a patient could be in training and test, and a slide could be two patients'.
    for part, whole in (("slide", "patient"), ("patient", "center")):
        yield (
            f"has another {whole} than an earlier line of the same {part}",
            _contradicts(columns[part], columns[whole]),
        )


def _is_first(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """For each row ``[N, D]``, whether no earlier one is equal to it: bool ``[N]``."""
    first = np.zeros(len(rows), dtype=bool)
    first[np.unique(rows, axis=0, return_index=True)[1]] = True
    return first


def _contradicts(
    keys: npt.NDArray[np.int64], values: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """For each entry ``[N]``, whether its value differs from the first of the same key."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return values != values[first[group]]


def rows_of_split(columns: Columns, split: str, folder: Folder) -> Columns:
    """The rows of a split.

    Raises:
        UserError: there are none.
    """
    center = columns["center"]
    if split == "val":
        chosen = center == _VAL_CENTER
    elif split == "test":
        chosen = center == _TEST_CENTER
    else:
        kept = (center == _VAL_CENTER) | (center == _TEST_CENTER)
        chosen = ~kept & (columns["split"] == (0 if split == "train" else 1))
    if not chosen.any():
        raise UserError(
            f"{folder.describe(METADATA)} lists no patch of the split {split}; take WILDS' own "
            "file, or add some."
        )
    return {name: column[chosen] for name, column in columns.items()}


def patch_names(patches: Columns) -> list[str]:
    """The files of patches, relative to the folder that ``metadata.csv`` is in."""
    places = zip(*(patches[name].tolist() for name in _PLACE), strict=True)
    return [_patch_name(*place) for place in places]


def _patch_name(patient: int, node: int, x: int, y: int) -> str:
    # Patients have three digits, also where a spreadsheet took the zeros from metadata.csv.
    slide = f"patient_{patient:03d}_node_{node}"
    return f"patches/{slide}/patch_{slide}_x_{x}_y_{y}.png"
