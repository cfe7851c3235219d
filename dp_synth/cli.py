"""Turns a function of a config into a command: Hydra around it, one clear sentence when it fails."""

import difflib
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dp_synth.environment import environment
from dp_synth.errors import UserError
from dp_synth.runs import default_run_dir

Task = Callable[[DictConfig], Any]


def conf_dir() -> Path:
    """The directory of the YAML files: inside the package when installed, beside it in a clone."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def command(config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Make a task a command of ``conf/<config_name>.yaml``.

    The command exits with 0 after success, 2 after a user's mistake (one sentence on stderr, no
    traceback, no empty directory left behind), 130 after Ctrl-C. ``HYDRA_FULL_ERROR=1`` shows the
    traceback of a user's mistake too.
    """

    def decorate(task: Task) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> None:
            _prepare_process()
            mistakes: list[UserError] = []

            # Hydra prints a preamble of its own for whatever a job raises, so a user's mistake is
            # carried past it.
            @functools.wraps(task)
            def job(cfg: DictConfig) -> Any:
                try:
                    return task(cfg)
                except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
                    _remove_if_empty(Path(HydraConfig.get().runtime.output_dir))
                    mistakes.append(_as_user_error(error, config_name))
                    return None

            app = hydra.main(
                version_base="1.3", config_path=str(conf_dir()), config_name=config_name
            )(job)
            try:
                # Hydra ends the process by itself (exit code 1) unless it lets exceptions through.
                with environment(HYDRA_FULL_ERROR="1"):
                    app()
            except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
                mistakes.append(_as_user_error(error, config_name))
            except KeyboardInterrupt:
                sys.exit(130)
            if mistakes:
                _fail(config_name, mistakes)

        return main

    return decorate


def _prepare_process() -> None:
    OmegaConf.register_new_resolver("run_dir", default_run_dir, replace=True, use_cache=True)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning|torch|opacus|diffusers")
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning as a sentence, without the place in the code."""
    print(f"Warning: {message}", file=sys.stderr)


def _remove_if_empty(directory: Path) -> None:
    """Hydra makes the output directory before the job looks at its config."""
    if directory.is_dir() and directory != Path.cwd() and not any(directory.iterdir()):
        directory.rmdir()


def _fail(config_name: str, mistakes: list[UserError]) -> NoReturn:
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise mistakes[0]
    for mistake in mistakes:
        print(f"dp_synth.{config_name}: {mistake}", file=sys.stderr)
    sys.exit(2)


def _as_user_error(error: BaseException, config_name: str) -> UserError:
    """The user's mistake behind an exception, as one sentence."""
    for cause in _causes(error):
        if isinstance(cause, UserError):
            return cause
    result = UserError(_sentence(error, config_name))
    result.__cause__ = error
    return result


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _sentence(error: BaseException, config_name: str) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = ", ".join(error.options or [])
        return f"{group}={option} is not an option; these are: {options}."
    if isinstance(error, OverrideParseException):
        return f"The argument {error.override!r} is not of the form key=value."
    if key := _missing_key(error):
        return f"{key} is required: give {key}=..."
    if isinstance(error, OSError):
        return f"{error.filename or 'A file'}: {error.strerror or error}."
    if argument := _unknown_argument(error):
        return f"{argument} is not a key of the configuration; --help lists the keys."
    unknown = next(filter(None, (getattr(e, "full_key", None) for e in _causes(error))), None)
    if str(error).startswith("Could not override") and unknown:
        return f"{unknown} is not a key of the configuration; {_suggestion(unknown, config_name)}"
    return " ".join(str(error).split())


def _missing_key(error: BaseException) -> str | None:
    """The key that a config wants the user to give, also where another one quotes it."""
    quoted = re.search(r"Missing mandatory value: ([\w.]+)", str(error))
    if quoted and "interpolation" in str(error):
        return quoted[1]
    return error.full_key if isinstance(error, MissingMandatoryValue) else None


def _unknown_argument(error: BaseException) -> str | None:
    """The key, added with ``+``, that the callable of its group does not take; None otherwise."""
    argument = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    group = re.search(r"full_key: (\S+)", str(error))
    return f"{group[1]}.{argument[1]}" if argument and group else None


def _suggestion(unknown: str, config_name: str) -> str:
    known = list(_keys(_default_config(config_name)))
    close = difflib.get_close_matches(unknown, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "--help lists the keys."


def _default_config(config_name: str) -> DictConfig:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose(config_name)


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, cfg):
        yield f"{prefix}{key}"
        child = cfg._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _keys(child, f"{prefix}{key}.")
