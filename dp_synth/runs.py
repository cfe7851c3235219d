"""The run directory: its names, readers and writers. Nothing else touches its paths."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, UNet2DModel
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from dp_synth.data.folder import write_image_folder
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.files import write_atomically
from dp_synth.privacy.statement import further_queries, with_query
from dp_synth.process import Process
from dp_synth.versions import versions

# What a stored config may have called; it may come from elsewhere with its run.
_CALLABLE = ("dp_synth.", "diffusers.")


def default_run_dir(run: str | None, dataset: str, eps: float | None) -> str:
    """``runs/<date>-<time>-<dataset>-eps<eps>``, or the run to be resumed."""
    if run is not None:
        return str(run)
    label = (
        "no-privacy" if eps is None else f"eps{eps:g}" if isinstance(eps, float | int) else "eps"
    )
    return f"runs/{datetime.now():%Y%m%d-%H%M%S}-{dataset}-{label}"


class Run:
    """One run directory.

    Args:
        path: the directory; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.privacy_path = self.path / "privacy.json"
        self.privacy_page_path = self.path / "privacy.html"  # the same in plain words
        self.metrics_path = self.path / "metrics.json"
        self.metrics_meta_path = self.path / "metrics_meta.json"
        self.model_dir = self.path / "model"
        self.checkpoints_dir = self.path / "checkpoints"
        self.samples_dir = self.path / "samples"
        self.public_only_dir = self.path / "public" / "samples"
        self.public_examples_dir = self.path / "public" / "examples"
        self.label_shares_path = self.path / "label_shares.json"
        self.audit_path = self.path / "audit.json"  # private; never part of a release
        self.logs_dir = self.path / "logs"
        self.journal_path = self.logs_dir / "journal.jsonl"  # of training without privacy
        self.local_dir = self.path / "local"  # shows private images; never part of a release
        self.report_path = self.path / "report.html"

    @classmethod
    def refuse_taken(cls, path: str | Path) -> None:
        """UserError where a directory already holds a run, or what is left of one."""
        run = cls(path)
        if run.config_path.exists():
            raise UserError(
                f"run_dir={run.path} already holds a run; choose another run_dir, or continue it "
                f"with run={run.path} resume=true."
            )
        remains = [run.checkpoints_dir, run.model_dir, run.privacy_path, run.label_shares_path]
        found = next((path for path in [*remains, run.local_dir] if path.exists()), None)
        if found is not None:
            raise UserError(
                f"run_dir={run.path} holds {found.name} of another run, which a new one could take "
                "for its own; choose another run_dir."
            )

    @classmethod
    def create(cls, path: str | Path, cfg: DictConfig) -> "Run":
        """Begin a run: the directory and its ``config.yaml``.

        Raises:
            UserError: the directory already holds a run, or cannot be written.
        """
        cls.refuse_taken(path)
        run = cls(path)
        run.path.mkdir(parents=True, exist_ok=True)
        resolved = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(resolved, dict)
        # Microseconds: with its path, this names the run in the ledger.
        started = datetime.now(UTC).isoformat(timespec="microseconds")
        content = OmegaConf.to_yaml({**resolved, "started": started, **versions()})
        write_atomically(run.config_path, content)
        return run

    @property
    def started(self) -> str:
        """ISO time at which the run was begun; "unknown" for runs of older versions."""
        return str(OmegaConf.select(self.config(), "started", default="unknown"))

    def discard(self) -> None:
        """Remove a run that was begun and holds nothing but its config."""
        self.config_path.unlink()
        shutil.rmtree(self.checkpoints_dir, ignore_errors=True)
        with suppress(OSError):  # it stood there before, with other things in it
            self.path.rmdir()

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open an existing run.

        Raises:
            UserError: there is no run.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise UserError(f"run={path} is not a directory; name a directory that train wrote.")
        if not run.config_path.is_file():
            raise UserError(
                f"run={path} has no config.yaml, so it is not a run; name a directory that train "
                "wrote."
            )
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training this run: two branches would spend eps twice.

        Raises:
            UserError: another process holds the run.
        """
        self.checkpoints_dir.mkdir(exist_ok=True)
        try:
            with FileLock(self.checkpoints_dir / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise UserError(
                f"run={self.path} is being trained or measured by another process; wait for it or stop it."
            ) from error

    def config(self) -> DictConfig:
        """The resolved config of the run.

        Raises:
            UserError: it is not YAML, or names code that is not this program's to call.
        """
        try:
            cfg = OmegaConf.load(self.config_path)
        except YAMLError as error:
            raise UserError(f"{self.config_path} is not YAML; the file is damaged.") from error
        assert isinstance(cfg, DictConfig)
        for target in _targets(cfg):
            if not target.startswith(_CALLABLE):
                raise UserError(
                    f"{self.config_path} names {target}, which no run of this program calls; use "
                    "runs that you trust."
                )
        return cfg

    def write_statement(self, statement: dict[str, Any]) -> None:
        """Write ``privacy.json``; looks and further queries that an earlier one lists stay listed."""
        if self.privacy_path.is_file():
            before = self.statement()
            looks = before.get("unaccounted_looks", [])
            statement = statement | {"unaccounted_looks": looks}
            # A statement of the plan alone has none of them; one that was read and extended, all.
            for query in further_queries(before)[len(further_queries(statement)) :]:
                statement = with_query(statement, query)
        write_atomically(self.privacy_path, json.dumps(statement, indent=2, allow_nan=False) + "\n")

    def statement(self) -> dict[str, Any]:
        """Read ``privacy.json``.

        Raises:
            UserError: it is missing.
        """
        if not self.privacy_path.is_file():
            raise UserError(f"{self.privacy_path} is missing: the run never began to train.")
        return json.loads(self.privacy_path.read_text())

    def record_look(self, what: str, **details: Any) -> None:
        """Add a look at private images that eps does not cover to ``privacy.json``.

        Every look is an entry of its own: the best of twenty measurements is twenty looks.
        """
        statement = self.statement()
        statement["unaccounted_looks"].append({"what": what, **details})
        write_atomically(self.privacy_path, json.dumps(statement, indent=2) + "\n")

    def record_query(self, query: dict[str, Any]) -> None:
        """Add a query of the private images, with an eps of its own, to ``privacy.json``.

        Args:
            query: as ``query_entry`` makes it.

        Every one is an entry of its own: asked again, it spends again.
        """
        self.write_statement(with_query(self.statement(), query))

    def write_label_shares(self, shares: dict[str, float]) -> None:
        """Write the noised share of each class, by its name."""
        write_atomically(self.label_shares_path, json.dumps(shares, indent=2) + "\n")

    def label_shares(self) -> dict[str, float] | None:
        """Read the noised share of each class; None where the run has not asked for them."""
        path = self.label_shares_path
        return json.loads(path.read_text()) if path.is_file() else None

    def save_model(self, net: UNet2DModel, diffusion: Process, classes: tuple[str, ...]) -> None:
        """Write ``model/`` so that both a network and a pipeline of diffusers open it.

        ``UNet2DModel.from_pretrained`` wants the weights in the directory itself,
        ``DDPMPipeline.from_pretrained`` in ``unet/``: they are one file with two names where the
        file system can do that.
        """
        if self.has_model():
            raise RuntimeError(f"{self.model_dir} exists; a model is never replaced")
        staging = self.path / ".model.partial"
        shutil.rmtree(staging, ignore_errors=True)
        DDPMPipeline(net, diffusion.pipeline_scheduler()).save_pretrained(staging)
        for file in (staging / "unet").iterdir():
            try:
                os.link(file, staging / file.name)
            except OSError:
                shutil.copy2(file, staging / file.name)
        (staging / "classes.json").write_text(json.dumps(list(classes)))
        staging.rename(self.model_dir)

    def has_model(self) -> bool:
        """Whether training came to its end."""
        return self.model_dir.is_dir()

    def load_model(self) -> tuple[UNet2DModel, tuple[str, ...]]:
        """The released network and its class names.

        Raises:
            UserError: the run has no model (it did not finish), or it is damaged.
        """
        if not self.has_model():
            raise UserError(
                f"run={self.path} has no model/: training did not finish; continue it with "
                f"run={self.path} resume=true."
            )
        try:
            classes = json.loads((self.model_dir / "classes.json").read_text())
            return UNet2DModel.from_pretrained(
                self.model_dir, low_cpu_mem_usage=False, use_safetensors=True
            ), tuple(classes)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self.model_dir} cannot be read as a model of this program: it is damaged or "
                "was written by something else."
            ) from error

    def next_samples_dir(self) -> Path:
        """``samples/``, else the first free one of ``samples-2/``, ``samples-3/``, ..."""
        if not self.samples_dir.exists():
            return self.samples_dir
        number = 2
        while (candidate := self.path / f"samples-{number}").exists():
            number += 1
        return candidate

    def write_metrics(self, metrics: dict[str, float], meta: dict[str, dict[str, Any]]) -> None:
        """Write ``metrics.json`` and ``metrics_meta.json``."""
        write_atomically(self.metrics_path, json.dumps(metrics, indent=2, sort_keys=True) + "\n")
        write_atomically(self.metrics_meta_path, json.dumps(meta, indent=2, sort_keys=True) + "\n")

    def metrics(self) -> dict[str, float]:
        """Read ``metrics.json``; empty if the run was not evaluated."""
        return json.loads(self.metrics_path.read_text()) if self.metrics_path.is_file() else {}

    def metrics_meta(self) -> dict[str, dict[str, Any]]:
        """Read ``metrics_meta.json``; empty if the run was not evaluated."""
        path = self.metrics_meta_path
        return json.loads(path.read_text()) if path.is_file() else {}


def _targets(node: Any) -> Iterator[str]:
    """Whatever a config would have Hydra call."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield str(node["_target_"])
        for key in node:
            yield from _targets(node[key])


def write_samples(images: Images, directory: Path, card: str) -> None:
    """Write a synthetic data set and its card, whole or not at all.

    Raises:
        UserError: the directory exists.
    """
    if directory.exists():
        raise UserError(f"out={directory} exists; a data set is never overwritten, choose another.")
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    write_image_folder(images, staging)
    (staging / "README.md").write_text(card)
    staging.rename(directory)
