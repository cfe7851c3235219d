"""What a report says about one run: plain values and sentences, ready for the template."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup
from omegaconf import DictConfig, OmegaConf

from dp_synth.errors import UserError
from dp_synth.formats.reading import summary_of
from dp_synth.privacy.accounting import Mechanism
from dp_synth.privacy.wording import EXAMPLE, is_void
from dp_synth.reporting import statement as wording
from dp_synth.reporting.closeness import Space, read_closeness
from dp_synth.reporting.copying import Copying, read_copying
from dp_synth.reporting.grids import Grid, natural_order, run_grids
from dp_synth.reporting.numbers import Numbers, without_private
from dp_synth.reporting.statement import Banner
from dp_synth.reporting.transfer import Transfer, read_transfer
from dp_synth.reporting.usefulness import Usefulness, read_usefulness
from dp_synth.runs import Run

Json = TypeVar("Json")

_FLAGGED = Banner(
    "Copies of training images suspected",
    "A test for memorisation struck: see below. Look at the nearest pairs in local/, which stay "
    "in the building, before anything is released.",
)


@dataclass(frozen=True)
class Content:
    """Everything that the page shows of one run. ``None`` and empty values are missing parts."""

    name: str
    dataset: str
    public: str | None
    stated: bool
    private: bool
    void: bool
    eps: float | None
    delta: float | None
    unit: str
    num_examples: int | None
    num_samples: int
    classes: list[str]
    has_model: bool
    banners: list[Banner]
    numbers: Numbers
    withheld: bool
    usefulness: Usefulness
    closeness: list[Space]
    transfer: Transfer | None
    copying: Copying | None
    grids: list[Grid]
    curve: Markup | None
    statement: list[tuple[str, Any]]
    queries: list[list[tuple[str, Any]]]
    mechanisms: list[Mechanism]
    not_covered: list[str]
    looks: list[tuple[str, list[str]]]
    versions: list[tuple[str, str]]

    @property
    def grey(self) -> bool:
        """Whether the released images are grey."""
        return self.grids[-1].src is not None and not self.grids[-1].colour

    @property
    def by_image(self) -> bool:
        """Whether the single image is protected, rather than all images of somebody."""
        return self.unit == EXAMPLE

    @property
    def one(self) -> str:
        """What is protected, in a word."""
        return "image" if self.by_image else self.unit


def read_content(run: Run, *, released: bool = False, private_metrics: bool = True) -> Content:
    """Gather the content of one run. Missing files leave their part empty; nothing is computed
    from private images, and none is opened.

    Args:
        run: begun, at least.
        released: whether the page leaves the building: it then shows no image but of ``samples/``.
        private_metrics: whether metrics that looked at private images are shown.

    Raises:
        UserError: a file of the run is damaged.
    """
    cfg = run.config()
    statement = read_statement(run)
    metrics = read_undamaged(run.metrics, run.metrics_path)
    meta = read_undamaged(run.metrics_meta, run.metrics_meta_path)
    shown, meta = (metrics, meta) if private_metrics else without_private(metrics, meta)
    numbers = Numbers(shown, meta)
    num_samples, classes = summary_of(run.samples_dir)
    copying = read_copying(numbers)
    eps = statement.get("eps")
    return Content(
        name=run.path.resolve().name,
        dataset=str(OmegaConf.select(cfg, "dataset.name") or "unnamed data"),
        public=public_name(cfg),
        stated=bool(statement),
        private=eps is not None,
        void=is_void(statement),
        eps=eps,
        delta=statement.get("delta"),
        unit=str(statement.get("unit") or EXAMPLE),
        num_examples=statement.get("num_examples"),
        num_samples=num_samples,
        classes=sorted(classes, key=natural_order),
        has_model=run.has_model(),
        banners=[
            *wording.banners(statement),
            *([_FLAGGED] if copying is not None and copying.flagged else []),
        ],
        numbers=numbers,
        withheld=len(shown) < len(metrics),
        usefulness=read_usefulness(numbers, num_samples),
        closeness=read_closeness(numbers),
        transfer=read_transfer(numbers),
        copying=copying,
        grids=run_grids(run, private=eps is not None)[-1 if released else 0 :],
        curve=wording.curve(statement),
        statement=wording.rows(statement),
        queries=wording.queries(statement),
        mechanisms=wording.mechanisms(statement.get("queries", [])),
        not_covered=[str(sentence) for sentence in statement.get("not_covered", [])],
        looks=wording.looks(statement),
        versions=[(name, str(v)) for name, v in statement.get("versions", {}).items()],
    )


def read_statement(run: Run) -> dict[str, Any]:
    """The statement of a run; empty where there is none. Raises UserError where it is damaged."""
    return read_undamaged(run.statement, run.privacy_path) if run.privacy_path.is_file() else {}


def read_undamaged(read: Callable[[], Json], path: Path) -> Json:
    """What ``read`` reads of a JSON file of a run. Raises UserError where the file is damaged."""
    try:
        return read()
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is not JSON; the file is damaged.") from None


def public_name(cfg: DictConfig) -> str | None:
    """The published model, or the module of a loader, as in ``dp_synth.data.font_digits.load``."""
    if (path := OmegaConf.select(cfg, "public.path")) is not None:
        return Path(str(path)).name
    target = OmegaConf.select(cfg, "public.load._target_")
    module = str(target or "").rpartition(".")[0]
    return module.rpartition(".")[2].replace("_", " ") or None
