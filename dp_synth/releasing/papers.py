"""What a release says of itself: statement, metrics, pages and cards, cut to what may be said."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_synth.books import Books
from dp_synth.cards import model_card, read_facts, release_card, rewrite_sample_card
from dp_synth.cards.samples import CARD
from dp_synth.formats import checksums
from dp_synth.report import report_runs
from dp_synth.reporting.content import read_undamaged
from dp_synth.reporting.numbers import Numbers, without_private
from dp_synth.reporting.officer import privacy_page
from dp_synth.runs import Run

_LOOK = "Metrics that were computed from private images, without noise, were released."

# Of a look, its words leave, and not what else an evaluator may note.
_SAID_OF_A_LOOK = ("what", "metrics", "metric", "splits", "evaluator", "sampler", "samples")


@dataclass(frozen=True)
class Terms:
    """How a run is released.

    Attributes:
        license: identifier of the licence; None: not chosen.
        private_metrics: whether metrics leave that looked at private images.
    """

    license: str | None = None
    private_metrics: bool = False


def released_metrics(run: Run, terms: Terms) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics that leave, and what each is."""
    metrics, meta = _metrics(run)
    return (metrics, meta) if terms.private_metrics else without_private(metrics, meta)


def _metrics(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        read_undamaged(run.metrics, run.metrics_path),
        read_undamaged(run.metrics_meta, run.metrics_meta_path),
    )


def record_private_metrics(run: Run) -> None:
    """Enter into ledger and statement that metrics leave for which no eps pays; if there are any."""
    metrics, meta = _metrics(run)
    without, _ = without_private(metrics, meta)
    if private := sorted(metrics.keys() - without.keys()):
        Books(run).record_look(_LOOK, metrics=private)


def released_statement(run: Run) -> dict[str, Any]:
    """The statement as it leaves."""
    statement = run.statement()
    looks = [
        {key: value for key, value in look.items() if key in _SAID_OF_A_LOOK}
        for look in statement["unaccounted_looks"]
    ]
    return statement | {"unaccounted_looks": looks}


def write_papers(run: Run, samples: list[str], folder: Path, terms: Terms) -> None:
    """Write what a release says of itself.

    Args:
        run: finished; what is released of its metrics is on record.
        samples: names of the sets of samples, which lie in ``folder`` with ``model/``.
        folder: the release.
        terms: how it is released.
    """
    metrics, meta = released_metrics(run, terms)
    if metrics:
        Run(folder).write_metrics(metrics, meta)
    Run(folder).write_statement(released_statement(run))
    Run(folder).privacy_page_path.write_text(privacy_page(run))
    report_runs(
        [run], Run(folder).report_path, released=True, private_metrics=terms.private_metrics
    )
    (folder / "model" / CARD).write_text(model_card(run, terms.license))
    for name in samples:
        # The metrics of a run are those of samples/, which was drawn with it.
        of_these = Numbers(metrics, meta) if folder / name == Run(folder).samples_dir else None
        rewrite_sample_card(run, folder / name, terms.license, of_these)
    facts = {name: read_facts(folder / name / CARD) for name in samples}
    (folder / CARD).write_text(release_card(run, facts, bool(metrics), terms.license))
    checksums.write(folder)
