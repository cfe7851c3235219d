"""``python -m dp_synth.ledger``: what was spent on private data, and whether the record holds."""

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dp_synth.checks import one_of
from dp_synth.cli import command
from dp_synth.errors import UserError
from dp_synth.files import write_atomically
from dp_synth.ledger_table import overview, print_overview
from dp_synth.privacy.ledger import Ledger, default_path
from dp_synth.runs import Run
from dp_synth.settling import settle_run
from dp_synth.verifying import print_checks, refuse_wrong, verify_run

_ACTIONS = ("show", "verify", "settle")


def show(cfg: DictConfig) -> None:
    """Print what all runs have spent."""
    content = overview(_ledger(cfg), cfg.ledger.dataset, cfg.ledger.delta)
    _write(cfg, content)
    print_overview(content)


def verify(cfg: DictConfig) -> None:
    """Check the chain; with a run, recompute its record.

    Raises:
        UserError: something is wrong.
    """
    run = None if cfg.run is None else Run.open(cfg.run)
    ledger = _ledger(cfg, run)
    ledger.verify(None if cfg.expect is None else str(cfg.expect))
    if run is None:
        newest = ledger.newest_hash()
        _write(cfg, {"ledger": str(ledger.path), "chain": "intact", "newest_hash": newest})
        print(f"{ledger.path}: the chain is intact; its newest hash is {newest or 'none yet'}.")
        return
    checks = verify_run(run, ledger)
    _write(cfg, {"run": str(run.path), "ledger": str(ledger.path), "checks": checks})
    print_checks(checks)
    refuse_wrong(run, checks)


def settle(cfg: DictConfig) -> None:
    """Lower what a killed run reserved to what left output."""
    if cfg.run is None:
        raise UserError("settle needs run=DIR, the directory of a run that nobody will resume.")
    run = Run.open(cfg.run)
    settled = settle_run(run, _ledger(cfg, run))
    _write(cfg, {"run": str(run.path), "settled": settled})
    for query, steps in settled.items():
        print(f"{query}: settled at {steps} steps.")


def _ledger(cfg: DictConfig, run: Run | None = None) -> Ledger:
    """The ledger that is typed, else the run's, else the user's."""
    own = None if run is None else OmegaConf.select(run.config(), "ledger.path")
    path = cfg.ledger.path or own
    return Ledger(default_path() if path is None else Path(path))


def _write(cfg: DictConfig, content: dict[str, Any]) -> None:
    if cfg.out is None:
        return
    out = Path(cfg.out)
    if not out.parent.is_dir():
        raise UserError(f"out={out} lies in no existing folder; make {out.parent} first.")
    write_atomically(out, json.dumps(content, indent=2) + "\n")


@command("ledger")
def _act(cfg: DictConfig) -> None:
    one_of("action", cfg.action, _ACTIONS)
    {"show": show, "verify": verify, "settle": settle}[cfg.action](cfg)


def main() -> None:
    """Show, verify or settle."""
    sys.argv[1:] = map(_as_hydra_wants_it, sys.argv[1:])
    _act()


def _as_hydra_wants_it(argument: str) -> str:
    """A word without its key gets it; ``dataset``, for Hydra a config group, is a name here."""
    if argument in _ACTIONS:
        return f"action={argument}"
    return f"ledger.{argument}" if argument.startswith("dataset=") else argument


if __name__ == "__main__":
    main()
