"""Why nothing of a run may leave: each reason is one sentence."""

from pathlib import Path
from typing import Any

from dp_synth.books import ledger_of
from dp_synth.building import is_on
from dp_synth.errors import UserError
from dp_synth.privacy.audit.record import read_record
from dp_synth.privacy.wording import is_void
from dp_synth.reporting.content import read_undamaged
from dp_synth.runs import Run
from dp_synth.verifying import refuse_wrong, verify_run


def refuse_place(run: Run, out: Path) -> None:
    """UserError where a release cannot be written: it is new, and no part of the run."""
    inner, outer = out.resolve(), run.path.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(
            f"out={out} and run={run.path} lie in one another; a release stands apart from what "
            "must stay, so choose another folder."
        )
    if out.exists() or out.is_symlink():
        raise UserError(f"out={out} exists; a release is never overwritten, choose another.")
    if not out.parent.is_dir():
        raise UserError(f"out={out} lies in no existing folder; make {out.parent} first.")


def refuse_unreleasable(run: Run) -> None:
    """UserError where the run has no guarantee to be released under, or is damaged."""
    statement = read_undamaged(run.statement, run.privacy_path)
    for wrong in (_no_privacy, _audited, _void, _unfinished):
        if reason := wrong(run, statement):
            raise UserError(f"run={run.path} {reason}")
    refuse_wrong(run, verify_run(run, ledger_of(run.config())))
    run.load_model()


def _no_privacy(run: Run, statement: dict[str, Any]) -> str | None:
    if statement.get("eps") is not None:
        return None
    return (
        "was trained without privacy, and nothing bounds what its model and samples show of the "
        "training images; train with privacy=eps10, say, and release that run."
    )


def _audited(run: Run, statement: dict[str, Any]) -> str | None:
    cfg = run.config()
    record = read_undamaged(lambda: read_record(run.audit_path), run.audit_path)
    planted = any("canaries" in attack for attack in record["attacks"].values())
    if not (statement.get("audit") or planted or ("audit" in cfg and is_on(cfg.audit))):
        return None
    return (
        "is an audit run: canaries, made to be found again, were among its training images; "
        "release a run that was trained with audit=none."
    )


def _void(run: Run, statement: dict[str, Any]) -> str | None:
    if not is_void(statement):
        return None
    if statement.get("search"):
        return (
            "is not the run that its private search chose, and the guarantee holds only while no "
            "other leaves; release best/ of the search."
        )
    return (
        "was made with privacy.unsafe_repeatable_randomness, so that its noise can be undone; train "
        "without it and release that run."
    )


def _unfinished(run: Run, statement: dict[str, Any]) -> str | None:
    if statement.get("status") == "finished" and run.has_model():
        return None
    return (
        f"is not finished; continue it with python -m dp_synth.train run={run.path} resume=true, "
        "then release it."
    )
