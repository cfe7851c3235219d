"""``run=DIR resume=true``: the run's own config, whatever else was typed must agree with it."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dp_synth.errors import UserError
from dp_synth.runs import Run

# What may change between two sittings of one run: where it computes and logs, not what.
_FREE = {"run", "resume", "run_dir", "trainer", "logger", "objective", "ledger.max_eps"}


def run_to_resume(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config with which the run ``cfg.run`` continues.

    Args:
        cfg: the config as composed from the command line.
        overrides: the command line's ``key=value`` arguments.

    Raises:
        UserError: no run is named, it does not exist, or an override contradicts its config.
    """
    if cfg.run is None:
        raise UserError("resume=true needs run=DIR, the directory of the run to be continued.")
    stored = Run.open(cfg.run).config()
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0].split("@", 1)[0].replace("/", ".")
        if key in _FREE or key.split(".")[0] in _FREE:
            if OmegaConf.select(cfg, key) is not None:
                OmegaConf.update(stored, key, OmegaConf.select(cfg, key), merge=False)
            continue
        began_with, asked = OmegaConf.select(stored, key), OmegaConf.select(cfg, key)
        if not _agree(began_with, asked):
            raise UserError(
                f"{override} is not what run={cfg.run} began with; a run is continued under the "
                f"plan that it began with, so leave {key} out."
            )
    stored.run, stored.resume, stored.run_dir = cfg.run, True, cfg.run
    return stored


def _agree(began_with: Any, asked: Any) -> bool:
    """Whether a run began with a value; a group may leave open what ``declare`` then filled in."""
    if isinstance(began_with, DictConfig) and isinstance(asked, DictConfig):
        return all(
            OmegaConf.is_missing(asked, key)
            or asked[key] is None
            or _agree(began_with.get(key), asked[key])
            for key in asked
        )
    return bool(began_with == asked)
