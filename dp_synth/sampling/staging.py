"""The folder in which a data set is made, beside its place, and what processes agree on in it.

::

    .NAME.partial/manifest.json   what the data set was begun with
    .NAME.partial/shards/         who is at which shard, and which are done
    .NAME.partial/images/         its files so far; renamed to NAME when all shards are done
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from dp_synth.errors import UserError
from dp_synth.formats import Format, checksums
from dp_synth.sampling.execution import Execution
from dp_synth.sampling.manifest import Manifest
from dp_synth.sampling.shards import ShardQueue

CARD = "README.md"


class Staging:
    """The staging folder of a data set.

    Args:
        out: where the data set will be.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.partial")
        self.images = self.path / "images"
        self.shards = self.path / "shards"
        # Begins and ends a data set: one that is late must not begin again what has just ended.
        self._lock = FileLock(self.path / "lock")

    def begin(self, manifest: Manifest, choose: Callable[[], Execution]) -> Execution | None:
        """Begin the data set, or join in; return how its network is run, None if it is done.

        Args:
            manifest: what this process would make.
            choose: how the network is to be run; asked by the first process alone.

        Raises:
            UserError: a data set of other settings was begun here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if self.out.exists():
                return None
            execution = manifest.settle(self.path / "manifest.json", choose)
            self.images.mkdir(exist_ok=True)
            self.shards.mkdir(exist_ok=True)
            return execution

    def under_way(self) -> bool:
        """Whether the data set is still being made.

        Raises:
            UserError: someone has removed it.
        """
        if self.images.is_dir():
            return True
        if self.out.exists():
            return False
        raise UserError(
            f"{self.path} was removed while a data set was made in it; run the same command again."
        )

    def finish(
        self, form: Format, queue: ShardQueue, classes: Sequence[str], card: Callable[[], str]
    ) -> bool:
        """Make a data set of the shards, all of them done, and put it in its place.

        Returns:
            Whether this process did that, and no other.
        """
        with self._lock:
            if not self.under_way():
                return False
            sums: dict[str, str] = {}
            for shard in queue.shards:
                sums |= queue.checksums(shard)
            sums |= form.assemble(self.images, [shard.count for shard in queue.shards], classes)
            (self.images / CARD).write_text(card())
            checksums.write(self.images, sums)
            self.images.rename(self.out)
            return True

    def clear(self) -> None:
        """Remove the folder if the data set is in its place; of several processes, any may."""
        if self.out.exists() and not self.images.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
