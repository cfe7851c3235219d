"""What the names in a data set's folder tell: how many, of what classes, in which layout."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Survey:
    """Facts about a training split that are taken as public; no image was opened for them.

    Attributes:
        num_examples: images, or units where ``dataset.unit`` names what to protect.
        classes: names of the classes.
        layout: what the folder looks like, such as ``class folders`` or ``WILDS v1.0``.
        num_files: image files of all splits; None where there is no folder and the numbers are the
            publisher's.
        units: what could be the unit of privacy instead, and how many of each the split has.
    """

    num_examples: int
    classes: tuple[str, ...]
    layout: str
    num_files: int | None
    units: Mapping[str, int] = field(default_factory=dict)
