"""The logger that a config chooses, and what it is told."""

from hydra.utils import instantiate
from omegaconf import DictConfig

from dp_synth.building import is_on
from dp_synth.loggers.record import read_record
from dp_synth.runs import Run


def log_run(run: Run, logger: DictConfig) -> None:
    """Give a finished run's record to a logger; to do it again replaces what is there.

    Args:
        run: a run whose fine-tuning has come to its end.
        logger: the ``logger`` group; nothing is done for ``none``.

    Raises:
        UserError: the logger cannot take it; the run itself is untouched.
    """
    if is_on(logger):
        run.logs_dir.mkdir(exist_ok=True)
        instantiate(logger)(read_record(run))
