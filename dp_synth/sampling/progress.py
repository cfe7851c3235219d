"""One bar over all images of a data set, whoever draws them."""

import sys
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm

from dp_synth.sampling.shards import Shard, ShardQueue

_REFRESH_SECONDS = 0.2 if sys.stderr.isatty() else 10.0


class SharedBar:
    """A progress bar that begins at what is done and follows other processes, shard by shard.

    The rate, and so the time left, is of all processes since this one began.

    Args:
        queue: of the data set's shards.
        what: the caption; None: no bar.
    """

    def __init__(self, queue: ShardQueue, what: str | None) -> None:
        self.queue = queue
        self._mine: dict[int, int] = {}  # images drawn of the shards that this process took
        self._bar = tqdm(
            total=sum(shard.count for shard in queue.shards),
            initial=self._images(),
            desc=what,
            unit="image",
            smoothing=0,  # others' images come a shard at a time
            mininterval=_REFRESH_SECONDS,
            disable=what is None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the bar."""
        self._bar.close()

    def drawn(self, shard: Shard, images: int) -> None:
        """Count further images of a shard that this process draws."""
        self._mine[shard.number] = self._mine.get(shard.number, 0) + images
        self.follow()

    def follow(self) -> None:
        """Show what is done by now."""
        self._bar.update(self._images() - self._bar.n)

    def _images(self) -> int:
        done = self.queue.done()
        self._mine = {number: n for number, n in self._mine.items() if number not in done}
        return sum(self.queue.shards[k].count for k in done) + sum(self._mine.values())
