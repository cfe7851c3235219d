"""The calling convention of formats."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dp_synth.data.images import Images


class Format(Protocol):
    """Writes a data set shard by shard and reads it again.

    What is written are the same bytes whoever writes, whenever: no file holds a time or a name of a
    machine. A folder that is being written has no other readers, so that a shard which was begun
    and not finished is simply written again.
    """

    def check(self, classes: Sequence[str], channels: int) -> None:
        """Raise UserError where data sets of such classes and images cannot be written here."""

    def write_shard(
        self, directory: Path, images: Images, first: int, shard: int, num_shards: int
    ) -> dict[str, str]:
        """Write images number ``first``, ``first + 1``, ...; return each file's SHA-256 by its name.

        Args:
            directory: holds the data set.
            images: of the shard.
            first: number of its first image in the data set.
            shard: its number, from 0.
            num_shards: of the data set.
        """

    def assemble(
        self, directory: Path, counts: Sequence[int], classes: Sequence[str]
    ) -> dict[str, str]:
        """Make a data set of its shards; return the SHA-256 of the further files by their names.

        Args:
            directory: holds all the shards; what an earlier call did, before it was killed, stays.
            counts: images of each shard.
            classes: class names in label order.
        """

    def is_in(self, directory: Path) -> bool:
        """Whether a data set of this format lies in a directory."""

    def summary(self, directory: Path) -> tuple[int, tuple[str, ...]]:
        """The number of images of a data set, and its classes."""

    def read(self, directory: Path, most: int | None = None) -> Images:
        """Read a data set, or its first ``most`` images by number.

        Raises:
            UserError: it is damaged.
        """

    def loading(self, folder: str) -> str:
        """The lines of Python by which others load the data set in ``folder``."""

    def card_header(self) -> dict[str, Any]:
        """What the header of a data-set card needs for Hugging Face to find the images."""
