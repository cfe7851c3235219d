"""``python -m dp_synth.release run=DIR out=DIR2``: gathers what may leave, refuses what may not."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from dp_synth.cards.header import check_license
from dp_synth.checks import flag
from dp_synth.cli import command
from dp_synth.releasing.gathering import copy_parts, staged
from dp_synth.releasing.inventory import Inventory, take_inventory
from dp_synth.releasing.papers import Terms, record_private_metrics, write_papers
from dp_synth.releasing.refusals import refuse_place, refuse_unreleasable
from dp_synth.releasing.telling import print_parts, warnings
from dp_synth.runs import Run


def release_run(run: Run, out: Path, terms: Terms) -> Inventory:
    """Gather what may leave of a run in ``out``: whole, or not at all.

    No private image is opened. What leaves is on a list; whatever else lies in the run stays.

    Args:
        run: finished, with a guarantee that its record confirms.
        out: the new folder.
        terms: with ``private_metrics``, ledger and statement get a look that no eps covers.

    Returns:
        What left, and what stayed.

    Raises:
        UserError: the run may not leave, its samples are not what was drawn, or ``out`` is no
            place for it.
    """
    refuse_place(run, out)
    with run.locked():
        refuse_unreleasable(run)
        inventory = take_inventory(run)
        with staged(out) as folder:
            copy_parts(run, inventory, folder)
            if terms.private_metrics:
                record_private_metrics(run)
            write_papers(run, inventory.samples, folder, terms)
    return inventory


@command("release")
def main(cfg: DictConfig) -> None:
    """Release a finished run."""
    run, out = Run.open(cfg.run), Path(cfg.out)
    flag("release.private_metrics", cfg.release.private_metrics)
    license = None if cfg.release.license is None else check_license(cfg.release.license)
    terms = Terms(license, cfg.release.private_metrics)
    inventory = release_run(run, out, terms)
    print_parts(run, out, inventory)
    for warning in warnings(run, terms):
        print(f"Warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    main()
