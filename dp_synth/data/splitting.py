"""Which split an image belongs to and which images of a unit are taken, by names alone.

Both rules look at one name at a time, so that no image's place depends on what else there is.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence

from dp_synth.checks import count
from dp_synth.errors import UserError

_BITS = 64


def is_test(name: str, test_fraction: float) -> bool:
    """Whether a name falls into the test split: if its hash lies in that fraction of all hashes.

    Args:
        name: of what stays together: an image's relative path, or a unit's name.
        test_fraction: 0 (nothing does) to 1 (everything does).
    """
    return _hash(name) < int(test_fraction * 2**_BITS)


def at_most(
    most: int, rows: Iterable[int], units: Sequence[str], paths: Sequence[str]
) -> list[int]:
    """Of each unit the ``most`` rows whose paths' hashes are smallest, in ascending order.

    Args:
        most: 1 or more.
        rows: the rows to choose from.
        units: the unit's name of every row.
        paths: the path of every row.
    """
    rows_of = defaultdict(list)
    for row in rows:
        rows_of[units[row]].append(row)
    kept: list[int] = []
    for own in rows_of.values():
        kept.extend(heapq.nsmallest(most, own, key=lambda row: _hash(paths[row])))
    return sorted(kept)


def check_limit(unit: str | None, max_images_per_unit: int | None) -> None:
    """UserError unless ``dataset.max_images_per_unit`` is a count and has units to bound."""
    if max_images_per_unit is not None:
        count("dataset.max_images_per_unit", max_images_per_unit)
        if unit is None:
            raise UserError(
                f"dataset.max_images_per_unit={max_images_per_unit} needs dataset.unit, which is "
                "not set."
            )


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=_BITS // 8).digest()
    return int.from_bytes(digest, "big")
