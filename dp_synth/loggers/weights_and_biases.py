"""``logger=wandb``: a run as one run of Weights & Biases, which watches nothing by itself."""

import netrc
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dp_synth.environment import environment
from dp_synth.errors import UserError
from dp_synth.loggers.packages import need
from dp_synth.loggers.record import Record

# W&B's names (https://docs.wandb.ai/ref/python/sdk/classes/Settings); of 0.20 and later.
_WATCHES_NOTHING: dict[str, Any] = {
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "x_disable_stats": True,  # processor, memory and GPU over time
    "x_disable_meta": True,  # host, user, program, command line
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "host": "",
    # Neither `wandb.run` nor `wandb.log` reaches this run, and no other run of this process is ours.
    "reinit": "create_new",
    "symlink": False,
    "silent": True,
    "init_timeout": 30.0,
}
_SCATTER = "eps_against_utility"
_UTILITY = "utility/accuracy"


class WeightsAndBiases:
    """Writes a run to W&B: online where there is an API key, else to files that can be uploaded.

    ``$WANDB_MODE`` (online, offline, disabled) wins over that. Files go to ``logs/wandb/``. Each
    run brings one point of a scatter of eps against accuracy, which W&B draws for all runs of a
    project, or of a sweep's group, in one chart.

    Console, code, git, command line, host and system metrics are not captured. W&B gives a row the
    time at which it is logged: all are logged here, after training, at one moment.

    Args:
        project: W&B's project.
        entity: user or team; W&B's default where None.
        group: the sweep's directory, else the data set's name, where None.
        tags: beside the data set's name and whether the run is private.

    Raises:
        UserError: W&B is not installed.
    """

    def __init__(
        self,
        project: str = "dp_synth",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        need("wandb")
        self.project = project
        self.entity = entity
        self.group = group
        self.tags = tuple(tags)

    def __call__(self, record: Record) -> None:
        """Write a run and say where it is.

        A run that was written before is replaced if it is offline, and goes on under its id if it
        is online: rows that are there are not written again.

        Raises:
            UserError: W&B refuses; the run itself is finished.
        """
        folder = str(record.directory / "wandb")
        with environment(
            WANDB_ERROR_REPORTING="false",  # to its makers, with local variables
            WANDB_DATA_DIR=folder,
            WANDB_CACHE_DIR=folder,
        ):
            run = self._begin(record)
            try:
                if not run.resumed:
                    _log_rows(run, record)
                _log_results(run, record)
            finally:
                run.finish()
        if run.offline:
            print(f"W&B        `wandb sync {Path(run.dir).parent}` uploads it", file=sys.stderr)
        elif run.url:
            print(f"W&B        {run.url}", file=sys.stderr)

    def _begin(self, record: Record) -> Any:
        """The W&B run, or one that stays offline where W&B cannot be reached."""
        import wandb

        mode = os.environ.get("WANDB_MODE") or _mode()
        try:
            return self._init(record, mode)
        except wandb.errors.CommError as error:
            if mode != "online":
                raise
            print(f"W&B cannot be reached ({_first_line(error)}).", file=sys.stderr)
            wandb.teardown()  # else the id is taken by the attempt
            return self._init(record, "offline")
        except (wandb.errors.Error, ValueError) as error:
            raise UserError(
                f"logger=wandb: {_first_line(error)}; the run itself is finished, and WANDB_MODE="
                "offline in the environment would log it without an account."
            ) from error

    def _init(self, record: Record, mode: Any) -> Any:
        import wandb

        for earlier in (record.directory / "wandb").glob("offline-run-*"):
            shutil.rmtree(earlier)
        return wandb.init(
            project=self.project,
            entity=self.entity,
            id=_run_id(record.directory),
            resume="allow" if mode == "online" else None,
            name=record.name,
            group=self.group or record.group,
            job_type="train",
            tags=[record.dataset, "private" if record.private else "not private", *self.tags],
            notes=record.notes,
            config=record.config | {"privacy_statement": record.statement},
            dir=str(record.directory),
            mode=mode,
            settings=wandb.Settings(**_WATCHES_NOTHING),
        )


def _log_rows(run: Any, record: Record) -> None:
    run.define_metric("public/step", hidden=True)
    run.define_metric("public/*", step_metric="public/step")
    run.define_metric("*", step_metric="step")
    for step, values in record.public_rows:
        run.log({"public/step": step, **values})
    for step, values in record.rows:
        run.log({"step": step, **values})


def _log_results(run: Any, record: Record) -> None:
    """Metrics and grids as one more row, so that W&B has a panel for each; and as the summary."""
    import wandb

    results: dict[str, Any] = dict(record.summary)
    results |= {name: wandb.Image(image) for name, image in record.images.items()}
    if {"eps", _UTILITY} <= results.keys():
        point = wandb.Table(columns=["eps", _UTILITY], data=[[results["eps"], results[_UTILITY]]])
        results[_SCATTER] = wandb.plot.scatter(point, "eps", _UTILITY, title="Accuracy over eps")
    run.log({"step": record.summary["steps"], **results})
    run.summary.update(record.summary)


def _run_id(directory: Path) -> str:
    """The id under which W&B knows this run, also when it is written again."""
    file = directory / "wandb-id"
    if not file.is_file():
        file.write_text(secrets.token_hex(4))
    return file.read_text()


def _mode() -> str:
    """``online`` where W&B will find an API key of its own accord, else ``offline``."""
    import wandb

    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    server = wandb.setup().settings.base_url
    hosts = [urlsplit(server).netloc]
    if server == wandb.Settings().base_url:
        hosts.append("api.wandb.ai")  # the older name of the same server
    return "online" if any(map(os.environ.get, keys)) or _in_netrc(hosts) else "offline"


def _in_netrc(hosts: Sequence[str]) -> bool:
    """Whether ``wandb login`` has left a key for one of these hosts."""
    places = [os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc"]
    files = [Path(place).expanduser() for place in places if place]
    try:
        found = netrc.netrc(next(file for file in files if file.is_file()))
    except (StopIteration, OSError, netrc.NetrcParseError):
        return False
    return any(found.authenticators(host) for host in hosts)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
