"""What a report says about one run: plain values and sentences, ready for the template."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup
from omegaconf import DictConfig, OmegaConf

from dp_synth.errors import UserError
from dp_synth.privacy.accounting import Mechanism
from dp_synth.privacy.wording import EXAMPLE, is_void
from dp_synth.reporting import statement as wording
from dp_synth.reporting.closeness import Space, read_closeness
from dp_synth.reporting.copying import Copying, read_copying
from dp_synth.reporting.grids import Grid, class_folders, count_images, run_grids
from dp_synth.reporting.numbers import Numbers
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


def read_content(run: Run) -> Content:
    """Gather the content of one run. Missing files leave their part empty; nothing is computed
    from private images, and none is opened.

    Raises:
        UserError: a file of the run is damaged.
    """
    cfg = run.config()
    statement = read_statement(run)
    numbers = Numbers(
        _read(run.metrics, run.metrics_path), _read(run.metrics_meta, run.metrics_meta_path)
    )
    num_samples = count_images(run.samples_dir)
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
        classes=[folder.name for folder in class_folders(run.samples_dir)],
        has_model=run.has_model(),
        banners=[
            *wording.banners(statement),
            *([_FLAGGED] if copying is not None and copying.flagged else []),
        ],
        numbers=numbers,
        usefulness=read_usefulness(numbers, num_samples),
        closeness=read_closeness(numbers),
        transfer=read_transfer(numbers),
        copying=copying,
        grids=run_grids(run, private=eps is not None),
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
    return _read(run.statement, run.privacy_path) if run.privacy_path.is_file() else {}


def _read(read: Callable[[], Json], path: Path) -> Json:
    """Read a JSON file of a run."""
    try:
        return read()
    except ValueError:
        raise UserError(f"{path} is not JSON; the file is damaged.") from None


def public_name(cfg: DictConfig) -> str | None:
    """The published model, or the module of a loader, as in ``dp_synth.data.font_digits.load``."""
    if (path := OmegaConf.select(cfg, "public.path")) is not None:
        return Path(str(path)).name
    target = OmegaConf.select(cfg, "public.load._target_")
    module = str(target or "").rpartition(".")[0]
    return module.rpartition(".")[2].replace("_", " ") or None
