"""Camelyon17-WILDS: 96x96 patches of lymph nodes from five hospitals, normal or with tumor.

The layout is WILDS v1.0: ``metadata.csv`` lists every patch, ``patches/`` holds a folder of PNG
files per slide (Koh et al. 2021, arXiv 2012.07421; https://wilds.stanford.edu/datasets/#camelyon17).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dp_synth.checks import count, one_of
from dp_synth.data import cache as pixel_cache
from dp_synth.data.camelyon17_metadata import (
    METADATA,
    SPLITS,
    patch_names,
    read_metadata,
    rows_of_split,
)
from dp_synth.data.images import Images
from dp_synth.data.listing import Listing
from dp_synth.data.publication import download_folder
from dp_synth.data.sources import Folder
from dp_synth.data.splitting import at_most, check_limit
from dp_synth.data.survey import Survey
from dp_synth.errors import UserError
from dp_synth.files import cache_folder

CLASSES = ("normal", "tumor")
UNITS = ("patient", "slide", "center")

# Of the training split. Images: Koh et al. 2021, appendix on Camelyon17-wilds. Units: CAMELYON17
# annotates 10 slides of each hospital (GigaDB 100439, lesion_annotations.zip), but several patients
# have two or three of them: the three training hospitals' 30 slides are of 7 + 10 + 9 patients.
PUBLISHED_NUM_IMAGES = 302_436
PUBLISHED_NUM_UNITS = {"patient": 26, "slide": 30, "center": 3}

_FOLDER = "camelyon17_v1.0"
_LAYOUT = "WILDS v1.0"


def load(
    *,
    root: Path | str | None = None,
    split: str = "train",
    resolution: int = 32,
    unit: str | None = None,
    max_images_per_unit: int | None = None,
    download: bool = False,
    on_error: pixel_cache.OnError = "raise",
    cache: Path | str | None = None,
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
        cache: see ``files.cache_folder``; decoded images are kept in it.

    Returns:
        Images with pixels ``[N, resolution, resolution, 3]``, in the order of ``metadata.csv``.

    Raises:
        UserError: an unknown split or unit, no such folder, a ``metadata.csv`` that is not as WILDS
            writes it, a split without a patch, a patch that is missing or cannot be read.
    """
    one_of("split", split, SPLITS)
    count("dataset.resolution", resolution)
    _check_unit(unit, max_images_per_unit)
    home = download_folder(root, cache)
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
        directory=cache_folder(cache) / "images",
    )


def survey(
    *,
    root: Path | str | None = None,
    unit: str | None = None,
    max_images_per_unit: int | None = None,
    download: bool = False,
    cache: Path | str | None = None,
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
    home = download_folder(root, cache)
    folder = _find(home)
    if folder is None:
        if root is not None and not download:
            raise _not_found(home)
        num_images, num_files, units = PUBLISHED_NUM_IMAGES, None, PUBLISHED_NUM_UNITS
    else:
        columns = read_metadata(folder)
        train = rows_of_split(columns, "train", folder)
        num_images, num_files = len(train["split"]), len(columns["split"])
        units = {name: len(np.unique(train[name])) for name in UNITS}
    return Survey(
        num_examples=num_images if unit is None else units[unit],
        classes=CLASSES,
        layout=_LAYOUT,
        num_files=num_files,
        units={name: number for name, number in units.items() if name != unit},
    )


def _check_unit(unit: str | None, max_images_per_unit: int | None) -> None:
    if unit is not None:
        one_of("dataset.unit", unit, UNITS)
    check_limit(unit, max_images_per_unit)


def _find(home: Path) -> Folder | None:
    """The folder that ``metadata.csv`` is in: below ``home``, or ``home`` itself."""
    for path in (home / _FOLDER, home):
        # Unlike Path.is_file, this is False also where the user may not look.
        if os.path.isfile(path / METADATA):
            return Folder(path)
    return None


def _not_found(home: Path) -> UserError:
    return UserError(
        f"{home / _FOLDER / METADATA} is not there; dataset.root must be the folder that holds "
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
    patches = rows_of_split(read_metadata(folder), split, folder)
    names = patch_names(patches)
    labels, units = patches["tumor"], None if unit is None else patches[unit]
    if units is not None and most is not None:
        rows = at_most(most, range(len(names)), units.astype(str).tolist(), names)
        names, labels, units = [names[row] for row in rows], labels[rows], units[rows]
    return Listing(folder, names, labels, CLASSES, units)
