"""Anybody's own labelled images: class folders, a CSV of paths and labels, or a zip of either."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dp_synth.data import cache as pixel_cache
from dp_synth.data.catalogue import read_catalogue
from dp_synth.data.images import Images
from dp_synth.data.survey import Survey
from dp_synth.errors import UserError
from dp_synth.files import cache_folder


def load(
    *,
    root: Path | str | None,
    split: str,
    resolution: int,
    channels: Literal[1, 3],
    unit: str | None = None,
    max_images_per_unit: int | None = None,
    test_fraction: float = 0.2,
    on_error: pixel_cache.OnError = "raise",
    cache: Path | str | None = None,
) -> Images:
    """Return one split of the images below ``root``, decoded once and then kept in a cache.

    ``root`` is a folder of class folders; a folder with one CSV at its top, or that CSV
    (``path,label`` and any further columns, see ``table.read_table``); or a zip of either.

    Subfolders ``train`` and ``test`` are the splits (each with class folders or a CSV, or both
    listed by one CSV above them); else a CSV's column ``split``; else the hash of each image's path
    relative to ``root``, or of its unit's name, decides on its own, so that adding or removing
    files moves no other image.

    Classes are those of both splits, sorted by name with numbers by value (``9`` before ``10``);
    labels of a CSV are names, also where they are numbers. Each must have an image in the training
    split; one is enough.

    Args:
        root: see above.
        split: ``"train"`` or ``"test"``.
        resolution: pixels of a side, see ``decoding.decode``.
        channels: 1 (grey) or 3 (colour).
        unit: the CSV's column that names what is protected as one, such as a patient; None where
            that is the image. A unit has all of its images in one split.
        max_images_per_unit: of each unit of the training split, take so many images at most, those
            whose paths have the smallest hashes; the others are never opened. None takes all.
        test_fraction: 0 to 1, of all images or units, where hashes decide; the share that is found
            varies as a random split's would.
        on_error: ``"raise"``, or ``"skip"`` files that are there and cannot be decoded.
        cache: see ``files.cache_folder``; decoded images are kept in it.

    Returns:
        Images with pixels ``[N, resolution, resolution, channels]``, in the order of their paths.

    Raises:
        UserError: what cannot be read, naming the file and, of a CSV, the line; a unit in both
            splits; a class without a training image or that cannot be a folder's name.
    """
    if root is None:
        raise UserError(
            "dataset.root=... is needed: a folder of class folders, a CSV, or a zip of either."
        )
    catalogue = read_catalogue(root, unit, max_images_per_unit, test_fraction)
    return pixel_cache.load(
        catalogue.listing(split),
        resolution=resolution,
        channels=channels,
        on_error=on_error,
        directory=cache_folder(cache) / "images",
    )


def survey(
    *,
    root: Path | str | None,
    unit: str | None = None,
    max_images_per_unit: int | None = None,
    test_fraction: float = 0.2,
) -> Survey | None:
    """Return what the names below ``root`` tell of the training split; no image is opened.

    Without a ``root`` nothing tells anything: None.

    What else could be the unit are the CSV's columns that have a value for every training image,
    and more than one but fewer values than there are images.

    Args:
        root: as the others, see ``load``.
        unit: see ``load``.
        max_images_per_unit: see ``load``.
        test_fraction: see ``load``.

    Raises:
        UserError: as ``load``, but for what takes opening an image to see.
    """
    if root is None:
        return None
    catalogue = read_catalogue(root, unit, max_images_per_unit, test_fraction)
    train = catalogue.rows["train"]
    values = {
        column: {of_all[row] for row in train}
        for column, of_all in catalogue.columns.items()
        if column not in (unit, "split")
    }
    return Survey(
        num_examples=catalogue.listing("train").num_examples,
        classes=catalogue.classes,
        layout=catalogue.layout.words,
        num_files=len(catalogue.names),
        units={
            column: len(found)
            for column, found in values.items()
            if "" not in found and 1 < len(found) < len(train)
        },
    )
