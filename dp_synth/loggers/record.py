"""What a logger is told of a run: a list of names, and nothing that is not on it.

Read after the run, behind the gate of its private phase (``dp_synth.privacy.silence``).
"""

import base64
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from dp_synth.loggers.journal import Row, read_journal
from dp_synth.pretraining import pretraining_journal
from dp_synth.reporting.grids import read_grid
from dp_synth.runs import Run

_CONFIG = (
    *("seed", "objective", "privacy", "model", "public", "sampler", "evaluator", "trainer"),
    *("dataset.name", "dataset.num_examples", "dataset.num_classes", "dataset.image_shape"),
    *("dataset.delta", "dataset.flip", "dataset.unit", "dataset.max_images_per_unit"),
)
# Places on a disk, at any depth of these groups.
_PLACES = ("root", "path")
_STATED = ("eps", "delta", "noise_multiplier", "sample_rate")
_METRICS = ("utility/", "fidelity/", "tuning/", "memorization/", "public/")
_EPS_POINTS = 20
_SMALLEST_GRID = 512  # pixels of the shorter side; below, pixels are shown as blocks


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run, as a logger is told of it.

    Attributes:
        directory: the run's ``logs/``, which is there: where a logger's files go.
        name: the run's directory; in a sweep, the sweep's before it.
        group: the sweep's directory, else the data set's name.
        dataset: the data set's name.
        private: whether training promised anything.
        config: nested, plain values. Of the data set only what is public by declaration; no path.
        statement: ``privacy.json``.
        rows: (step, values) of the fine-tuning: ``eps`` in a private run, else ``loss``.
        public_rows: (step, values) of public pre-training: ``public/loss``.
        summary: ``eps``, ``delta``, ``noise_multiplier``, ``sample_rate`` and ``steps`` as far as
            there are such, and the metrics, by their names in ``metrics.json``.
        looked: names of the metrics that read private images and are not covered by eps.
        images: grids by name, RGB: ``samples``, ``public/samples``, ``public/examples``.
    """

    directory: Path
    name: str
    group: str
    dataset: str
    private: bool
    config: dict[str, Any]
    statement: dict[str, Any]
    rows: list[Row]
    public_rows: list[Row] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    looked: list[str] = field(default_factory=list)
    images: dict[str, Image.Image] = field(default_factory=dict)

    @property
    def notes(self) -> str:
        """The guarantee in words, and which metrics it does not cover."""
        guarantee = f"Guarantee: {self.statement['guarantee']}."
        if not (self.private and self.looked):
            return guarantee
        return (
            f"{guarantee}\n\nNot covered by it, since they looked at private images without noise: "
            f"{', '.join(self.looked)}."
        )


def read_record(run: Run) -> Record:
    """Gather what loggers may know of a finished run; no private image is opened.

    Args:
        run: a run whose fine-tuning has come to its end.
    """
    cfg, statement = run.config(), run.statement()
    sweep = _sweep(run)
    directory, dataset = run.path.resolve().name, str(cfg.dataset.name)
    return Record(
        directory=run.logs_dir,
        name=f"{sweep}/{directory}" if sweep else directory,
        group=sweep or dataset,
        dataset=dataset,
        private=statement["private"],
        config=_config(cfg),
        statement=statement,
        rows=_eps_curve(cfg, statement) if statement["private"] else read_journal(run.journal_path),
        public_rows=[
            (step, {f"public/{name}": value for name, value in values.items()})
            for step, values in read_journal(pretraining_journal(cfg))
        ],
        summary=_summary(run, statement),
        looked=[
            name
            for name, meta in run.metrics_meta().items()
            if meta["private"] and not name.endswith((".ci_low", ".ci_high"))
        ],
        images=_images(run),
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values with dotted names: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return result


def _sweep(run: Run) -> str | None:
    """The name of the sweep that a run is a job of: Hydra notes it in the jobs' parent."""
    parent = run.path.resolve().parent
    return parent.name if (parent / "multirun.yaml").is_file() else None


def _config(cfg: DictConfig) -> dict[str, Any]:
    selected = OmegaConf.create()
    for key in _CONFIG:
        value = OmegaConf.select(cfg, key)
        if value is not None:
            OmegaConf.update(selected, key, value)
    plain = OmegaConf.to_container(selected)
    assert isinstance(plain, dict)
    return _without_places({str(key): value for key, value in plain.items()})


def _without_places(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_places(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _PLACES and not (isinstance(value, str) and _is_place(value))
    }


def _is_place(value: str) -> bool:
    return value.startswith("~") or Path(value).is_absolute()


def _eps_curve(cfg: DictConfig, statement: Mapping[str, Any]) -> list[Row]:
    """eps over steps, from the plan alone."""
    # The plan warns of a large delta when it is made, before the run: no need to say it again.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = instantiate(cfg.privacy, noise_multiplier=statement["noise_multiplier"])
    return [(step, {"eps": eps}) for step, eps in plan.epsilon_curve(_EPS_POINTS) if step > 0]


def _summary(run: Run, statement: Mapping[str, Any]) -> dict[str, float]:
    stated = {name: statement[name] for name in _STATED if statement.get(name) is not None}
    metrics = {n: value for n, value in run.metrics().items() if n.startswith(_METRICS)}
    return stated | {"steps": statement["steps_taken"]} | metrics


def _images(run: Run) -> dict[str, Image.Image]:
    """Grids of the synthetic and the public images that the run directory holds."""
    folders = {
        "samples": run.samples_dir,
        "public/samples": run.public_only_dir,
        "public/examples": run.public_examples_dir,
    }
    grids = {name: read_grid(root, name, "", "").src for name, root in folders.items()}
    return {name: _picture(src) for name, src in grids.items() if src is not None}


def _picture(src: str) -> Image.Image:
    """The image of a ``data:`` URI on white, in whole blocks of pixels if it is small."""
    grid = Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).convert("RGBA")
    picture = Image.new("RGB", grid.size, "white")
    picture.paste(grid, mask=grid.getchannel("A"))
    return picture.resize(
        [side * -(-_SMALLEST_GRID // min(grid.size)) for side in grid.size],
        Image.Resampling.NEAREST,
    )
