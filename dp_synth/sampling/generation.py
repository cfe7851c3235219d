"""Writes a synthetic data set of any size: by any number of processes, stopped and continued at will."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dp_synth.data.images import Images
from dp_synth.formats import FORMATS
from dp_synth.sampling.drawing import Drawing, Source
from dp_synth.sampling.execution import Execution, measured
from dp_synth.sampling.manifest import Manifest
from dp_synth.sampling.progress import SharedBar
from dp_synth.sampling.sampler import Sampler
from dp_synth.sampling.shards import Claim, ShardQueue
from dp_synth.sampling.staging import Staging
from dp_synth.sampling.writing import Writer

_WAIT_SECONDS = 0.1  # for shards that others are at


def generate(
    out: Path,
    source: Source,
    sampler: Sampler,
    card: Callable[[Execution], str],
    what: str | None = "sampling",
) -> bool:
    """Write a data set into ``out``, whole or not at all; or do a part of it, with others.

    Which files there are and what is in them does not depend on how many processes take part, nor
    on whether they are killed: the shape of each batch, and so its rounding, follows from the
    settings. In memory are two shards at most: one that is drawn and one that is written.

    Args:
        out: a folder that does not exist; its parents are made.
        source: what to draw from.
        sampler: what to draw, in which format and how.
        card: makes the data set's ``README.md``, told how the network was run.
        what: caption of the progress bar; None: nothing is shown.

    Returns:
        Whether this process put the data set into its place; False where another one did.

    Raises:
        UserError: the format cannot hold such images, a data set of other settings was begun in
            this place, what was done of it was removed, or a file cannot be written. What is done
            is kept and can be continued.
    """
    staging, form = Staging(out), FORMATS[sampler.format]
    form.check(source.classes, source.shape[0])
    manifest = Manifest(source, sampler)
    try:
        execution = staging.begin(manifest, lambda: measured(source.net, sampler))
        if execution is None:
            return False
        if what is not None:
            print(f"The network runs in {execution}.")
        queue = ShardQueue(staging.shards, sampler.num_images, manifest.shard_size)
        draw = Drawing(source, sampler, execution)
        with (
            SharedBar(queue, what) as bar,
            Writer(form, staging.images, len(queue.shards)) as writer,
        ):
            _draw_shards(staging, queue, draw, bar, writer)
        return staging.finish(form, queue, source.classes, lambda: card(execution))
    except (FileNotFoundError, FileExistsError):  # the latter of a folder gone as soon as seen
        if not out.exists():
            raise
        return False  # others finished, and cleared the staging folder, in this very moment
    finally:
        staging.clear()


def _draw_shards(
    staging: Staging, queue: ShardQueue, draw: Drawing, bar: SharedBar, writer: Writer
) -> None:
    """Draw and write shards until all are done, or until others have put the data set in place."""
    while staging.under_way() and not queue.all_done():
        claim = queue.claim()
        if claim is None:  # every shard is done or someone's, who may yet die
            writer.wait()
            bar.follow()
            time.sleep(_WAIT_SECONDS)
        elif not staging.under_way():  # cleared since the last look, with the marks of what is done
            claim.release()
        else:
            writer.write(claim, _drawn(claim, draw, bar))
    writer.wait()
    bar.follow()


def _drawn(claim: Claim, draw: Drawing, bar: SharedBar) -> Images:
    try:
        return draw(claim.shard, partial(bar.drawn, claim.shard))
    except BaseException:
        claim.release()
        raise
