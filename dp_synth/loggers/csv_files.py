"""``logger=csv``: the rows of a run as CSV; its metrics are in ``metrics.json`` anyway."""

import csv
import io
from pathlib import Path

from dp_synth.files import write_atomically
from dp_synth.loggers.journal import Row
from dp_synth.loggers.record import Record


class CSVFiles:
    """Writes ``metrics.csv``, and ``public.csv`` where there was public pre-training.

    One line a step: ``step`` and the names that were logged. A cell that has no value is empty.
    """

    def __call__(self, record: Record) -> None:
        """Write a run's rows; what is there is replaced."""
        _write(record.directory / "metrics.csv", record.rows)
        if record.public_rows:
            _write(record.directory / "public.csv", record.public_rows)


def _write(path: Path, rows: list[Row]) -> None:
    names = sorted({name for _, values in rows for name in values})
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": step, **values} for step, values in rows)
    write_atomically(path, text.getvalue())
