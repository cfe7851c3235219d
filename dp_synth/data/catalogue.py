"""Every image of a root by name, with its class, its split and its unit of privacy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dp_synth.checks import fraction
from dp_synth.data.folder import is_folder_name
from dp_synth.data.layout import SPLITS, Layout, find_layout
from dp_synth.data.listing import Listing
from dp_synth.data.splitting import at_most, check_limit, is_test
from dp_synth.data.table import Table
from dp_synth.errors import UserError

_SPLIT_COLUMN = "split"


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The images of both splits.

    Attributes:
        layout: where they lie.
        names: distinct names in the layout's source.
        labels: the class's name of each.
        classes: the distinct labels of both splits, sorted as people sort: ``9`` before ``10``.
        units: the unit's name of each, or None where each image is its own.
        columns: by header, further values of each; those that all CSVs of the root have.
        rows: by split, which images are in it; those that ``max_images_per_unit`` leaves out are
            in none.
    """

    layout: Layout
    names: Sequence[str]
    labels: Sequence[str]
    classes: tuple[str, ...]
    units: Sequence[str] | None
    columns: Mapping[str, Sequence[str]]
    rows: Mapping[str, Sequence[int]]

    def listing(self, split: str) -> Listing:
        """The images of a split, sorted by name; its units are numbered by their sorted names.

        Raises:
            UserError: an unknown split, or one without images.
        """
        if not self.rows.get(split):
            raise UserError(
                f"split={split!r} has no image in {self.layout.what}; raise dataset.test_fraction, "
                "or give the split by folders train/ and test/."
            )
        rows = sorted(self.rows[split], key=self.names.__getitem__)
        units = None
        if self.units is not None:
            own = [self.units[row] for row in rows]
            units = _numbered(own, sorted(set(own)))
        return Listing(
            source=self.layout.source,
            names=[self.names[row] for row in rows],
            labels=_numbered([self.labels[row] for row in rows], self.classes),
            classes=self.classes,
            units=units,
        )


def read_catalogue(
    root: Path | str, unit: str | None, max_images_per_unit: int | None, test_fraction: float
) -> Catalogue:
    """List a root; see ``image_folder.load`` for the arguments and for what is a mistake."""
    fraction("dataset.test_fraction", test_fraction)
    check_limit(unit, max_images_per_unit)
    layout = find_layout(root)
    tables = list(layout.tables.values())
    names = [name for table in tables for name in table.names]
    labels = [label for table in tables for label in table.labels]
    units = None if unit is None else [u for table in tables for u in _units(table, unit)]
    splits = _splits(layout, units, test_fraction)
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for row, split in enumerate(splits):
        rows[split].append(row)
    if units is not None:
        _check_units_are_whole(tables, splits, units)
        if max_images_per_unit is not None:
            paths = layout.relative(names)
            rows["train"] = at_most(max_images_per_unit, rows["train"], units, paths)
    classes = _classes(layout, labels, in_train={labels[row] for row in rows["train"]})
    return Catalogue(layout, names, labels, classes, units, _columns(tables), rows)


def _units(table: Table, unit: str) -> Sequence[str]:
    if not table.lines:
        raise UserError(
            f"dataset.unit={unit} names a column of a CSV, but {table.what} has class folders; "
            f"list the images in a CSV with the columns path,label,{unit}."
        )
    if unit not in table.columns or unit == _SPLIT_COLUMN:
        raise UserError(
            f"dataset.unit={unit} is no further column of {table.what}; name one beside path, "
            "label and split, or add it."
        )
    return table.filled(unit)


def _splits(layout: Layout, units: Sequence[str] | None, test_fraction: float) -> list[str]:
    """The split of every image: by folders, by column, or by hash."""
    given = [_given_splits(layout, split, table) for split, table in layout.tables.items()]
    splits = [split for of_table in given if of_table is not None for split in of_table]
    if splits:  # by folders both tables have theirs, else there is one table
        return splits
    (table,) = layout.tables.values()
    stay_together = layout.relative(table.names) if units is None else units
    return [SPLITS[is_test(name, test_fraction)] for name in stay_together]


def _given_splits(layout: Layout, folder: str | None, table: Table) -> Sequence[str] | None:
    """The split that someone chose for each image of a table; None where nobody did."""
    if folder is not None:
        if _SPLIT_COLUMN in table.columns:
            raise UserError(
                f"{table.what} has a column split, but its folder is the split; remove the column."
            )
        return [folder] * len(table.names)
    if _SPLIT_COLUMN in table.columns:
        return _known_splits(table, table.columns[_SPLIT_COLUMN])
    folders = [path.partition("/")[0] for path in layout.relative(table.names)]
    return _known_splits(table, folders) if set(SPLITS) <= set(folders) else None


def _known_splits(table: Table, splits: Sequence[str]) -> Sequence[str]:
    for row, split in enumerate(splits):
        if split not in SPLITS:
            raise UserError(
                f"{table.where(row)} is in {split!r}, which is no split as others are; use train "
                "or test."
            )
    return splits


def _check_units_are_whole(
    tables: Sequence[Table], splits: Sequence[str], units: Sequence[str]
) -> None:
    """UserError for a unit with images in both splits: its test images would show what it is."""
    split_of: dict[str, str] = {}
    places = ((table, row) for table in tables for row in range(len(table.names)))
    for (table, row), split, unit in zip(places, splits, units, strict=True):
        if split_of.setdefault(unit, split) != split:
            raise UserError(
                f"{table.where(row)} has {unit!r} in {split}, but other images of this unit are in "
                f"{split_of[unit]}; put all images of a unit into one split."
            )


def _classes(layout: Layout, labels: Sequence[str], in_train: set[str]) -> tuple[str, ...]:
    names = set(labels)
    for name in sorted(names):
        _check_class_name(layout, name)
    for name in sorted(names - in_train):
        raise UserError(
            f"class {name!r} of {layout.what} has no image in the training split; add one, remove "
            "the class, or lower dataset.test_fraction."
        )
    return tuple(sorted(names, key=_as_people_sort))


def _check_class_name(layout: Layout, name: str) -> None:
    """UserError for a class that ``folder.write_image_folder`` could not write samples of."""
    if not is_folder_name(name):
        shown = name if len(name) < 80 else f"{name[:80]}..."
        raise UserError(
            f"class {shown!r} of {layout.what} cannot be a folder's name; rename the class."
        )


def _as_people_sort(name: str) -> tuple[list[int | str], str]:
    """Numbers by value, all else by code point; equal ones, such as 1 and 01, by code point too."""
    parts = re.split("([0-9]+)", name)  # text and numbers by turns
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _columns(tables: Sequence[Table]) -> dict[str, list[str]]:
    shared = [column for column in tables[0].columns if all(column in t.columns for t in tables)]
    return {column: [v for table in tables for v in table.columns[column]] for column in shared}


def _numbered(values: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """The place in ``names`` of each value."""
    number = {name: i for i, name in enumerate(names)}
    return np.fromiter((number[value] for value in values), np.int64, len(values))
