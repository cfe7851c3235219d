"""Reads synthetic data sets, whatever their format."""

from pathlib import Path

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.formats import FORMATS, Format, png


def read_samples(directory: Path) -> Images:
    """All images of a data set.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return _format_of(directory).read(directory)


def first_samples(directory: Path, most: int) -> Images:
    """The first images of a data set by number, ``most`` or fewer.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return _format_of(directory).read(directory, most)


def summary_of(directory: Path) -> tuple[int, tuple[str, ...]]:
    """The number of images of a data set and its classes; 0 and none where there is no such folder.

    Raises:
        UserError: it is damaged.
    """
    return _format_of(directory).summary(directory) if directory.is_dir() else (0, ())


def are_class_folders(directory: Path) -> bool:
    """Whether a data set lies in folders for its classes."""
    return _format_of(directory) is png


def _format_of(directory: Path) -> Format:
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder; give one that holds a synthetic data set.")
    # Class folders come last: any folder could be some.
    others = (form for form in FORMATS.values() if form is not png)
    return next((form for form in others if form.is_in(directory)), png)
