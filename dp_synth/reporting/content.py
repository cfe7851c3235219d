"""What a report says about one run: plain values and sentences, ready for the template."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from omegaconf import DictConfig, OmegaConf

from dp_synth.errors import UserError
from dp_synth.privacy.accounting import ACCOUNTANTS
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.wording import is_void
from dp_synth.reporting import charts
from dp_synth.reporting.grids import Grid, class_folders, count_images, run_grids
from dp_synth.reporting.usefulness import Usefulness, read_usefulness
from dp_synth.runs import Run

_CURVE_POINTS = 20

_LABELS = {
    "adjacency": "Neighbouring data sets",
    "unit": "Protected unit",
    "num_examples": "Protected units in the training split, N",
    "accountant": "Accountant",
    "eps_rdp": "eps by Renyi accounting (cross-check)",
    "noise_multiplier": "Noise multiplier",
    "max_grad_norm": "Clipping norm",
    "clipping": "Clipping rule",
    "sampling": "Batches",
    "sample_rate": "Sampling rate, q",
    "batch_size": "Expected batch size",
    "steps": "Steps accounted for",
    "steps_planned": "Steps planned",
    "multiplicity": "Augmentation multiplicity",
    "engine": "Clipping engine",
    "world_size": "Training processes",
    "trust_model": "Trust model",
    "guarantee": "Guarantee",
    "status": "Status",
}
_QUERY_LABELS = {
    **_LABELS,
    "query": "Query",
    "mechanism": "Mechanism",
    "steps": "Steps",
    "eps": "eps",
    "delta": "delta",
}
_MEANINGS = {
    "zero_out": "zero-out: one unit's contribution becomes zero; N is public and fixed",
    "poisson": "Poisson: each unit enters each step on its own with probability q",
    "poisson_subsampled_gaussian": "Poisson-subsampled Gaussian",
    "dp_sgd": "DP-SGD",
    "prv": "PRV (numerical composition, Gopi et al. 2021)",
    "rdp": "RDP (Renyi, Mironov et al. 2019)",
}


@dataclass(frozen=True)
class Banner:
    """A warning that stands above everything else."""

    title: str
    text: str


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
    usefulness: Usefulness
    grids: list[Grid]
    curve: Markup | None
    statement: list[tuple[str, Any]]
    queries: list[list[tuple[str, Any]]]
    not_covered: list[str]
    looks: list[tuple[str, list[str]]]
    versions: list[tuple[str, str]]

    @property
    def grey(self) -> bool:
        """Whether the released images are grey."""
        return self.grids[-1].src is not None and not self.grids[-1].colour


def read_content(run: Run) -> Content:
    """Gather the content of one run. Missing files leave their part empty; nothing is computed
    from private images, and none is opened."""
    cfg = run.config()
    statement = _statement(run)
    eps = statement.get("eps")
    return Content(
        name=run.path.resolve().name,
        dataset=str(OmegaConf.select(cfg, "dataset.name") or "unnamed data"),
        public=_public_name(cfg),
        stated=bool(statement),
        private=eps is not None,
        void=is_void(statement),
        eps=eps,
        delta=statement.get("delta"),
        unit=str(statement.get("unit") or "example"),
        num_examples=statement.get("num_examples"),
        num_samples=count_images(run.samples_dir),
        classes=[folder.name for folder in class_folders(run.samples_dir)],
        has_model=run.has_model(),
        banners=_banners(statement),
        usefulness=read_usefulness(run.metrics(), run.metrics_meta()),
        grids=run_grids(run, private=eps is not None),
        curve=_curve(statement),
        statement=[(_LABELS[key], _plain(statement[key])) for key in _LABELS if key in statement],
        queries=[
            [(_QUERY_LABELS.get(key, key), _plain(value)) for key, value in query.items()]
            for query in statement.get("queries", [])
        ],
        not_covered=[str(sentence) for sentence in statement.get("not_covered", [])],
        looks=[_look(look) for look in statement.get("unaccounted_looks", [])],
        versions=[(name, str(v)) for name, v in statement.get("versions", {}).items()],
    )


def _statement(run: Run) -> dict[str, Any]:
    """``privacy.json``; empty where there is none."""
    if not run.privacy_path.is_file():
        return {}
    try:
        return run.statement()
    except ValueError:
        raise UserError(f"{run.privacy_path} is not JSON; the file is damaged.") from None


def odds_factor(eps: float) -> str:
    """e to the eps, for a sentence."""
    if eps > 50:
        return "an astronomical factor"
    factor = math.exp(eps)
    return f"a factor of {factor:,.2f}" if factor < 10 else f"a factor of {factor:,.0f}"


def _public_name(cfg: DictConfig) -> str | None:
    """The published model, or the module of a loader, as in ``dp_synth.data.font_digits.load``."""
    if (path := OmegaConf.select(cfg, "public.path")) is not None:
        return Path(str(path)).name
    target = OmegaConf.select(cfg, "public.load._target_")
    module = str(target or "").rpartition(".")[0]
    return module.rpartition(".")[2].replace("_", " ") or None


def _banners(statement: Mapping[str, Any]) -> list[Banner]:
    if not statement:
        return [
            Banner(
                "No privacy statement",
                "This run has no privacy.json: it never began to train, or the file was removed. "
                "Treat whatever it holds as private.",
            )
        ]
    banners = []
    if statement.get("eps") is None:
        banners.append(
            Banner(
                "No privacy",
                "This model was trained without differential privacy. Nothing on this page "
                "protects anyone in its training data; do not release it as private data.",
            )
        )
    if is_void(statement):
        banners.append(
            Banner(
                "The guarantee is void: repeatable randomness",
                "The run was made with privacy.unsafe_repeatable_randomness, a setting for tests: "
                "whoever knows its seed can undo the noise. The eps below does not hold.",
            )
        )
    status = statement.get("status", "unknown")
    if status != "finished":
        whole_plan = (
            " The eps below is that of the whole plan, since a run in progress must not "
            "under-state what it may spend."
        )
        banners.append(
            Banner(
                "Unfinished",
                f"The status of this run is “{status}”, not “finished”. Do not release its files."
                + (whole_plan if status == "running" else ""),
            )
        )
    return banners


def _curve(statement: Mapping[str, Any]) -> Markup | None:
    """The eps curve of the statement's mechanism; None without a mechanism to compute it from."""
    accountant = str(statement.get("accountant", "")).partition(" ")[0]
    try:
        # The plan warns of a large delta when it is made, before the run: no need to say it again.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = PrivacyPlan(
                eps=statement.get("eps_planned", statement["eps"]),
                delta=statement["delta"],
                max_grad_norm=statement["max_grad_norm"],
                batch_size=round(statement["sample_rate"] * statement["num_examples"]),
                steps=statement["steps"],
                num_examples=statement["num_examples"],
                noise_multiplier=statement["noise_multiplier"],
                accountant=accountant if accountant in ACCOUNTANTS else ACCOUNTANTS[0],
            )
            return charts.epsilon_curve(plan.epsilon_curve(_CURVE_POINTS))
    except (KeyError, TypeError, UserError):
        return None


def _look(look: Any) -> tuple[str, list[str]]:
    """A look is a sentence, or ``{"what": sentence, "metrics": names}``."""
    if isinstance(look, Mapping):
        return str(look.get("what", "")), [str(name) for name in look.get("metrics", [])]
    return str(look), []


def _plain(value: Any) -> Any:
    return _MEANINGS.get(value, value) if isinstance(value, str) else value
