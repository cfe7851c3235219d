"""Writes a shard while the next one is drawn."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.formats import Format
from dp_synth.sampling.shards import Claim


class Writer:
    """A thread that writes one shard at a time; what it could not write, the next call raises.

    Args:
        form: how shards are written.
        directory: where to.
        num_shards: of the data set.
    """

    def __init__(self, form: Format, directory: Path, num_shards: int) -> None:
        self.form = form
        self.directory = directory
        self.num_shards = num_shards
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the last shard come to its end, also after an error."""
        self._thread.shutdown()

    def write(self, claim: Claim, images: Images) -> None:
        """Begin to write a shard, once the one before it is written.

        Raises:
            UserError: that one could not be.
        """
        try:
            self.wait()
        except BaseException:
            claim.release()
            raise
        self._pending = self._thread.submit(self._write, claim, images)

    def wait(self) -> None:
        """Wait for the shard that is being written.

        Raises:
            UserError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, claim: Claim, images: Images) -> None:
        shard = claim.shard
        try:
            claim.finish(
                self.form.write_shard(
                    self.directory, images, shard.first, shard.number, self.num_shards
                )
            )
        except OSError as error:
            raise UserError(
                f"{error.filename or self.directory} cannot be written "
                f"({error.strerror or error}); run the same command again once it can, which "
                "continues from what is done."
            ) from error
        finally:
            claim.release()
