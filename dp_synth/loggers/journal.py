"""The journal of a public phase: one line of JSON for each row, written at once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

Row = tuple[int, dict[str, float]]
"""A step and what was logged at it, by name."""


class Journal(Logger):
    """A Lightning logger that appends rows to a file; for phases whose images are public.

    Args:
        path: the file; made, with its folder, by the first row. A resumed phase continues it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        """Nothing that Lightning needs to know."""
        return ""

    @property
    def version(self) -> str:
        """Nothing that Lightning needs to know."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's ``config.yaml`` has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def read_journal(path: Path) -> list[Row]:
    """The rows of a journal by increasing step; none where there is no journal.

    Of steps that were taken twice, since a crash undid them, the last row counts. A line that the
    crash cut short is passed over.
    """
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        rows[values.pop("step")] = values
    return sorted(rows.items())
