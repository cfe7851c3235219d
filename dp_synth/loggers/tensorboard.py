"""``logger=tensorboard``: a run as one event file that TensorBoard opens."""

import json
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from dp_synth.loggers.packages import need
from dp_synth.loggers.record import Record, flat


class TensorBoard:
    """Writes ``logs/tensorboard/``; ``tensorboard --logdir`` takes a run or the folder of a sweep.

    Its HPARAMS tab compares the runs of a sweep: every scalar of the config against eps and every
    metric.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        need("tensorboard")

    def __call__(self, record: Record) -> None:
        """Write a run; what is there is replaced.

        An event carries the time at which it was written: all are written here, after training.
        """
        # Imported here: they need the package, which other loggers do without.
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        directory = record.directory / "tensorboard"
        shutil.rmtree(directory, ignore_errors=True)
        last_step = int(record.summary["steps"])
        scalars = {k: v for k, v in flat(record.config).items() if isinstance(v, int | float | str)}
        with SummaryWriter(directory) as writer:
            for summary in hparams(scalars, record.summary):
                writer.file_writer.add_summary(summary)
            writer.add_text("config", _block(record.config))
            writer.add_text("privacy_statement", _block(record.statement))
            writer.add_text("notes", record.notes)
            for step, values in [*record.public_rows, *record.rows]:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
            for name, value in record.summary.items():
                if name != "eps":  # the last row of the curve
                    writer.add_scalar(name, value, last_step)
            for name, image in record.images.items():
                writer.add_image(name, np.asarray(image), last_step, dataformats="HWC")


def _block(values: Mapping[str, Any]) -> str:
    """JSON that Markdown shows as it is."""
    return "\n".join(f"    {line}" for line in json.dumps(values, indent=2).splitlines())
