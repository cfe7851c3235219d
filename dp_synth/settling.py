"""Closes the books of a killed run: what it reserved is lowered to what left output."""

from pathlib import Path

from dp_synth.checkpoints import resume_point
from dp_synth.errors import UserError
from dp_synth.privacy.accounting import SubsampledGaussian
from dp_synth.privacy.ledger import Held, Ledger
from dp_synth.runs import Run


def settle_run(run: Run, ledger: Ledger) -> dict[str, int]:
    """Settle training at the run's furthest checkpoint, and everything else as it was reserved.

    Steps behind the furthest checkpoint left no output. The run may still be resumed: it then
    reserves its whole plan again.

    Returns:
        Steps by the name of the query.

    Raises:
        UserError: the run is being trained, or the ledger holds no reservation of it.
    """
    with run.locked():
        # A copy of a run does not settle for the run, which may be training at this moment.
        reserved = [
            one
            for one in held_of_run(run, ledger)
            if one.status == "reserved"
            and (one.query.run == str(run.path.resolve()) or not Path(one.query.run).exists())
        ]
        if not reserved:
            raise UserError(
                f"run={run.path} has nothing to settle: ledger.path={ledger.path} holds no "
                "reservation of it that is still open."
            )
        _, progress = resume_point(run.checkpoints_dir)
        settled = {}
        for one in reserved:
            planned = one.planned.steps if isinstance(one.planned, SubsampledGaussian) else 1
            taken = progress.steps + progress.abandoned
            steps = min(taken, planned) if one.query.query == "dp_sgd" else planned
            ledger.settle(one.query, steps)
            settled[one.query.query] = steps
    return settled


def held_of_run(run: Run, ledger: Ledger) -> list[Held]:
    """What a ledger holds of a run, by the time at which it was begun.

    And by its path, unless it has moved since.
    """
    same_start = [one for one in ledger.queries() if one.query.started == run.started]
    same_place = [one for one in same_start if one.query.run == str(run.path.resolve())]
    return same_place or same_start
