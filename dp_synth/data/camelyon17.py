"""Camelyon17-WILDS: 96x96 patches of lymph nodes from five hospitals, normal or with tumor.

The layout is WILDS v1.0: ``metadata.csv`` lists every patch, ``patches/`` holds a folder of PNG
files per slide (Koh et al. 2021, arXiv 2012.07421; https://wilds.stanford.edu/datasets/#camelyon17).
"""

from __future__ import annotations

import csv
import io
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dp_synth.checks import count, one_of
from dp_synth.data import cache as pixel_cache
from dp_synth.data.images import Images
from dp_synth.data.listing import Listing
from dp_synth.data.publication import DEFAULT_CACHE
from dp_synth.data.sources import Folder
from dp_synth.data.splitting import at_most
from dp_synth.data.survey import Survey
from dp_synth.errors import UserError

CLASSES = ("normal", "tumor")
SPLITS = ("train", "id_val", "val", "test")
UNITS = ("patient", "slide", "center")

# Of the training split. Images: Koh et al. 2021, appendix on Camelyon17-wilds. Units: CAMELYON17
# annotates 10 slides of each hospital (GigaDB 100439, lesion_annotations.zip), but several patients
# have two or three of them: the three training hospitals' 30 slides are of 7 + 10 + 9 patients.
PUBLISHED_NUM_IMAGES = 302_436
PUBLISHED_NUM_UNITS = {"patient": 26, "slide": 30, "center": 3}

_FOLDER = "camelyon17_v1.0"
_METADATA = "metadata.csv"
_LAYOUT = "WILDS v1.0"
# After an index that has no name.
_COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split")
_PLACE = _COLUMNS[:4]  # what a patch is named after
_WHOLE_NUMBER = re.compile("[0-9]{1,9}")
# Hospitals that are kept from training, whatever the column `split` says of their patches.
_VAL_CENTER = 1
_TEST_CENTER = 2

_Columns = Mapping[str, npt.NDArray[np.int64]]


def load(
    *,
    root: Path | str | None = None,
    split: str = "train",
    resolution: int = 32,
    unit: str | None = None,
    max_images_per_unit: int | None = None,
    download: bool = False,
    on_error: pixel_cache.OnError = "raise",
    cache: Path | str = DEFAULT_CACHE,
) -> Images:
    """Return one split of Camelyon17-WILDS, decoded once and then read from the cache.

    The splits are WILDS' own. Of the hospitals 0, 3 and 4, nine tenths of the patches are ``train``
    and one tenth ``id_val``; hospital 1 is ``val``, hospital 2 is ``test``. What is measured on
    ``id_val`` is measured on the patients and slides of ``train``, on other patches of them; only
    ``val`` and ``test`` are of people and hospitals that training did not see.

    Args:
        root: the folder that holds ``camelyon17_v1.0/``, or that folder itself; ``None`` looks into
            the folder ``data`` of the cache.
        split: ``"train"``, ``"id_val"``, ``"val"`` or ``"test"``.
        resolution: side of the images, to which the patches' 96 pixels are resized.
        unit: the unit of privacy: ``"patient"``, ``"slide"`` or ``"center"``; ``None``: the image,
            and patients are not protected.
        max_images_per_unit: keep no more than so many training images of a unit.
        download: fetch the data with the ``wilds`` package if they are not there.
        on_error: ``"raise"`` or ``"skip"``, for patches that are not there or cannot be read; see
            ``cache.load``.
        cache: the program's cache, which decoded images are kept in.

    Returns:
        Images with pixels ``[N, resolution, resolution, 3]``, in the order of ``metadata.csv``.

    Raises:
        UserError: an unknown split or unit, no such folder, a ``metadata.csv`` that is not as WILDS
            writes it, a split without a patch, a patch that is missing or cannot be read.
    """
    one_of("split", split, SPLITS)
    count("dataset.resolution", resolution)
    _check_unit(unit, max_images_per_unit)
    home = _home(root, cache)
    folder = _find(home)
    if folder is None:
        if not download:
            raise _not_found(home)
        folder = _downloaded(home)
    most = max_images_per_unit if split == "train" else None
    return pixel_cache.load(
        _list(folder, split, unit, most),
        resolution=resolution,
        channels=3,
        on_error=on_error,
        directory=Path(cache).expanduser() / "images",
    )


def survey(
    *,
    root: Path | str | None = None,
    unit: str | None = None,
    max_images_per_unit: int | None = None,
    download: bool = False,
    cache: Path | str = DEFAULT_CACHE,
) -> Survey:
    """Return what ``metadata.csv`` tells about the training split; no image is opened.

    Args:
        root: as for ``load``; where ``None`` finds nothing, the numbers are the publisher's.
        unit: as for ``load``; examples are then its units.
        max_images_per_unit: as for ``load``; only checked.
        download: as for ``load``; nothing is fetched here, and the numbers are the publisher's.
        cache: as for ``load``.

    Raises:
        UserError: an unknown unit, no such folder, or what ``load`` finds wrong in ``metadata.csv``.
    """
    _check_unit(unit, max_images_per_unit)
    home = _home(root, cache)
    folder = _find(home)
    if folder is None:
        if root is not None and not download:
            raise _not_found(home)
        num_images, num_files, units = PUBLISHED_NUM_IMAGES, None, PUBLISHED_NUM_UNITS
    else:
        columns = _read_metadata(folder)
        train = _of_split(columns, "train", folder)
        num_images, num_files = len(train["split"]), len(columns["split"])
        units = {name: len(np.unique(train[name])) for name in UNITS}
    num_examples = num_images if unit is None else units[unit]
    return Survey(num_examples, CLASSES, _LAYOUT, num_files, units)


def _check_unit(unit: str | None, max_images_per_unit: int | None) -> None:
    if unit is not None:
        one_of("dataset.unit", unit, UNITS)
    if max_images_per_unit is not None:
        count("dataset.max_images_per_unit", max_images_per_unit)
        if unit is None:
            raise UserError(
                f"dataset.max_images_per_unit={max_images_per_unit} needs a unit, such as "
                "dataset.unit=patient."
            )


def _home(root: Path | str | None, cache: Path | str) -> Path:
    """The folder that ``wilds`` would be given as its ``root_dir``."""
    return Path(cache).expanduser() / "data" if root is None else Path(root).expanduser()


def _find(home: Path) -> Folder | None:
    """The folder that ``metadata.csv`` is in: below ``home``, or ``home`` itself."""
    for path in (home / _FOLDER, home):
        # Unlike Path.is_file, this is False also where the user may not look.
        if os.path.isfile(path / _METADATA):
            return Folder(path)
    return None


def _not_found(home: Path) -> UserError:
    return UserError(
        f"{home / _FOLDER / _METADATA} is not there; dataset.root must be the folder that holds "
        f"{_FOLDER}/, or dataset.download=true downloads it."
    )


def _downloaded(home: Path) -> Folder:
    try:
        import wilds
    except ImportError as error:
        raise UserError(
            f"dataset.download=true needs the package wilds ({error}); pip install "
            "'dp-synth[wilds]', or download the data yourself and set dataset.root to them."
        ) from None
    try:
        wilds.get_dataset("camelyon17", version="1.0", root_dir=str(home), download=True)
    # It prints why a download failed, and then fails to read what is not there.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"wilds could not download Camelyon17 to {home} ({reason}); get the data from "
            "https://wilds.stanford.edu/downloads and set dataset.root to them."
        ) from None
    folder = _find(home)
    if folder is None:
        raise _not_found(home)
    return folder


def _list(folder: Folder, split: str, unit: str | None, most: int | None) -> Listing:
    """The patches of a split; of each unit at most ``most``."""
    patches = _of_split(_read_metadata(folder), split, folder)
    names = [
        _patch_name(*place)
        for place in zip(*(patches[name].tolist() for name in _PLACE), strict=True)
    ]
    labels, units = patches["tumor"], None if unit is None else patches[unit]
    if units is not None and most is not None:
        rows = at_most(most, range(len(names)), units.astype(str).tolist(), names)
        names, labels, units = [names[row] for row in rows], labels[rows], units[rows]
    return Listing(folder, names, labels, CLASSES, units)


def _patch_name(patient: int, node: int, x: int, y: int) -> str:
    # Patients have three digits, also where a spreadsheet took the zeros from metadata.csv.
    slide = f"patient_{patient:03d}_node_{node}"
    return f"patches/{slide}/patch_{slide}_x_{x}_y_{y}.png"


def _of_split(columns: _Columns, split: str, folder: Folder) -> _Columns:
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
            f"{folder.describe(_METADATA)} lists no patch of the split {split}; take WILDS' own "
            "file, or add some."
        )
    return {name: column[chosen] for name, column in columns.items()}


def _read_metadata(folder: Folder) -> _Columns:
    """The columns of ``metadata.csv``, int64 ``[rows]`` each, checked row by row.

    Raises:
        UserError: it cannot be read, or a line is not as WILDS writes it.
    """
    shown = folder.describe(_METADATA)
    try:
        text = folder.read(_METADATA).decode("utf-8-sig")
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
    columns = dict(zip(_COLUMNS, table.T, strict=True))
    for fault, wrong in _faults(columns):
        if wrong.any():
            raise UserError(f"{shown} line {lines[int(wrong.argmax())]} {fault}.")
    return columns


def _faults(columns: _Columns) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
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
