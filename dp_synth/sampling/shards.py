"""A data set's images in shards, and who draws which: shared through the file system.

Any number of processes, started by whatever means, take shards from the same directory. A lock says
that someone is at a shard, and falls when its process dies; a mark says that the shard is done.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from dp_synth.files import write_atomically

_BYTES = 64 * 2**20
_MOST_IMAGES = 10_000
# Fewer shards than this leave some of many processes, here or in a loader, without work.
_FEWEST_SHARDS = 16


@dataclass(frozen=True)
class Shard:
    """The images number ``first``, ``first + 1``, ... of a data set, ``count`` of them."""

    number: int
    first: int
    count: int


def default_shard_size(num_images: int, image_bytes: int, batch_size: int) -> int:
    """Images of a shard: whole batches, that are 64 MiB, 10,000 images and a 16th of all at most.

    One batch where that would be none. It is a function of these alone, as the number of processes
    must not decide what files there are.
    """
    most = min(_BYTES // image_bytes, _MOST_IMAGES, -(-num_images // _FEWEST_SHARDS))
    return max(1, most // batch_size) * batch_size


class Claim:
    """A shard that is this process's until it is finished or let go.

    Args:
        shard: the shard.
        lock: held.
        mark: the file that says that it is done.
    """

    def __init__(self, shard: Shard, lock: FileLock, mark: Path) -> None:
        self.shard = shard
        self._lock = lock
        self._mark = mark

    def finish(self, checksums: Mapping[str, str]) -> None:
        """Mark the shard as done, with the SHA-256 of each of its files."""
        write_atomically(self._mark, json.dumps(checksums))
        self.release()

    def release(self) -> None:
        """Let the shard go; one that is not done is there for others to take."""
        self._lock.release()


class ShardQueue:
    """The shards of a data set that is being made.

    Args:
        directory: where locks and marks are; it exists until the data set is done.
        num_images: of the data set.
        shard_size: images of a shard; the last one may have fewer.
    """

    def __init__(self, directory: Path, num_images: int, shard_size: int) -> None:
        self.directory = directory
        self.shards = [
            Shard(number, first, min(shard_size, num_images - first))
            for number, first in enumerate(range(0, num_images, shard_size))
        ]
        self._done: set[int] = set()

    def claim(self) -> Claim | None:
        """The first shard that is neither done nor anyone's; None if there is none now."""
        for shard in self.shards:
            if shard.number not in self._done and (claim := self._try(shard)):
                return claim
        return None

    def done(self) -> set[int]:
        """The numbers of the shards that are done, by whomever."""
        self._done |= {int(mark.stem) for mark in self.directory.glob("*.done")}
        return self._done

    def all_done(self) -> bool:
        """Whether every shard is done."""
        return len(self.done()) == len(self.shards)

    def checksums(self, shard: Shard) -> dict[str, str]:
        """The SHA-256 of each file of a shard that is done, by its name."""
        checksums: dict[str, str] = json.loads(self._mark(shard).read_text())
        return checksums

    def _try(self, shard: Shard) -> Claim | None:
        # The thread that writes a shard ends the claim of the one that drew it.
        lock = FileLock(self.directory / f"{shard.number}.lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except (Timeout, FileNotFoundError):  # someone's; or cleared in this very moment
            return None
        if self._mark(shard).exists():  # since the last look
            self._done.add(shard.number)
            lock.release()
            return None
        return Claim(shard, lock, self._mark(shard))

    def _mark(self, shard: Shard) -> Path:
        return self.directory / f"{shard.number}.done"
