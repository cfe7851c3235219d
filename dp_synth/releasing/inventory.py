"""What lies in a run directory, sorted: a list of names may leave, and whatever else is there stays."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dp_synth.cards.samples import CARD
from dp_synth.errors import UserError
from dp_synth.formats import checksums
from dp_synth.runs import Run

_MODEL = frozenset(
    {
        "classes.json",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
)
_SAMPLES = re.compile(r"samples(-[1-9]\d*)?")

# What is written anew for the release, from the run's own.
_PAPERS = {
    "privacy.json": "the privacy statement",
    "privacy.html": "the same in plain words",
    "report.html": "what was measured, and how the images look",
    "metrics.json": "the metrics",
    "metrics_meta.json": "what each metric is",
}
_STAYS = {
    "config.yaml": "it holds paths of this machine",
    "checkpoints": "they hold the state of optimizer and accountant",
    "local": "it shows private images",
    "audit.json": "it holds numbers about single private images",
    "logs": "they hold whatever metrics there are, those of private images among them",
    "public": "public images are their owners' to give",
    "label_shares.json": "the samples tell as much as anybody needs",
}
_UNKNOWN = "this program did not write it"


@dataclass(frozen=True)
class Inventory:
    """The parts of a run directory.

    Attributes:
        model: files of ``model/`` that leave as they are, relative to the run.
        samples: the sets of samples that leave, by their folders' names.
        stays: (name relative to the run, why).
    """

    model: list[str]
    samples: list[str]
    stays: list[tuple[str, str]]


def take_inventory(run: Run) -> Inventory:
    """Sort what lies in a run directory; every set of samples is compared with its checksums.

    Raises:
        UserError: a link lies in what would leave; a file of the model is missing; or samples are
            not what was drawn.
    """
    samples, stays = [], []
    for path in sorted(run.path.iterdir()):
        if path.is_symlink() and (path == run.model_dir or _SAMPLES.fullmatch(path.name)):
            _refuse_link(path)
        if _SAMPLES.fullmatch(path.name) and path.is_dir():
            refuse_links(path)
            checksums.verify(path)
            samples.append(path.name)
        elif path != run.model_dir and path.name not in _PAPERS:
            stays.append((path.name, _STAYS.get(path.name, _UNKNOWN)))
    refuse_links(run.model_dir)
    return Inventory(list(_model_files(run)), samples, stays + list(_beside_the_model(run)))


def refuse_links(directory: Path) -> None:
    """UserError where a link lies in a directory: behind it could be anything."""
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            _refuse_link(path)


def _refuse_link(path: Path) -> None:
    raise UserError(f"{path} is a link, behind which could lie anything; remove it or the folder.")


def _model_files(run: Run) -> Iterator[str]:
    for name in sorted(_MODEL):
        path = run.model_dir / name
        if not path.is_file():
            raise UserError(f"{path} is missing, so the model is damaged; restore it.")
        yield str(path.relative_to(run.path))


def _beside_the_model(run: Run) -> Iterator[tuple[str, str]]:
    for path in sorted(run.model_dir.rglob("*")):
        name = str(path.relative_to(run.model_dir))
        if not path.is_dir() and name not in _MODEL and name != CARD:
            yield str(path.relative_to(run.path)), _UNKNOWN
