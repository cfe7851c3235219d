"""What the runs of a sweep cost together: the best of k runs has looked k times."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from dp_synth.books import ledger_of
from dp_synth.privacy.ledger import Held, Ledger
from dp_synth.privacy.ledger.budget import compose, counted_queries
from dp_synth.privacy.private_search import QUERY
from dp_synth.privacy.wording import eps_at_delta
from dp_synth.summary import shown


class SweepCost(Callback):
    """Prints a line for each data set after a sweep; Hydra calls it.

    The runs are found in the ledger, by the sweep's directory: wherever they were made, and also
    those that failed after they had read private images.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print what is in the ledger of the runs below the sweep's directory."""
        ledger = ledger_of(config)
        for line in sweep_costs(ledger, Path(config.hydra.sweep.dir)):
            print(line)


def sweep_costs(ledger: Ledger, directory: Path) -> list[str]:
    """A line for each data set that runs below a directory have queried.

    A private search, which has said its cost itself, is none of them.

    Raises:
        UserError: the ledger cannot be read.
    """
    directory = directory.resolve()
    found = [
        one
        for one in ledger.queries()
        if Path(one.query.run).is_relative_to(directory) and one.query.query != QUERY
    ]
    names = dict.fromkeys(one.query.dataset for one in found)
    lines = [_line(name, [one for one in found if one.query.dataset == name]) for name in names]
    return [f"{line} ({shown(ledger.path)})" for line in lines if line]


def _line(dataset: str, held: list[Held]) -> str:
    queries = counted_queries(held)
    if not queries:
        return ""
    runs = len({(query.run, query.started) for query in queries})
    together = compose(queries)
    cost = "no eps" if together.delta is None else eps_at_delta(together.prv.eps, together.delta)
    looks = f", and {together.looks} looks that have no eps" if together.looks else ""
    return f"{runs} run{'s' if runs > 1 else ''} on {dataset}: {cost} together{looks}"
