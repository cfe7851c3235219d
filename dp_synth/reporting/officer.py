"""``privacy.html``: the privacy statement of a run in plain words, for whoever must answer for it.

It follows the checklist of Ponomareva et al. 2023 (arXiv 2303.00654, section 5.3.3) and NIST
SP 800-226 (2025, doi 10.6028/NIST.SP.800-226).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dp_synth import __version__
from dp_synth.files import write_atomically
from dp_synth.privacy.accounting import SubsampledGaussian, delta_spent
from dp_synth.privacy.statement import OF_THE_MODEL
from dp_synth.privacy.wording import EXAMPLE, is_void
from dp_synth.reporting import meaning
from dp_synth.reporting import statement as wording
from dp_synth.reporting.content import public_name, read_statement
from dp_synth.reporting.pages import environment
from dp_synth.reporting.statement import Banner
from dp_synth.runs import Run

_FOR_COMPARISON = (1.0, 3.0, 10.0)
_ACCUSED = 0.001


@dataclass(frozen=True)
class Odds:
    """What an eps means for an attacker, in words; see ``meaning``."""

    eps: float
    delta: float
    guess: str
    found: str
    odds: str


@dataclass(frozen=True)
class Use:
    """A query on the private images, as the statement lists it.

    Attributes:
        name, mechanism, released: in words.
        numbers: its noise multiplier, sampling rate and steps, as far as it has them.
        eps, delta: by itself; None where the statement does not say.
        of_the_model: whether the statement's eps covers it.
    """

    name: str
    mechanism: str
    released: str
    numbers: list[tuple[str, Any]]
    eps: float | None
    delta: float | None
    of_the_model: bool


@dataclass(frozen=True)
class Together:
    """What all queries cost: ``summed`` where eps and delta were only added up."""

    eps: float
    delta: float
    summed: bool


class Fields(dict[str, Any]):
    """The fields of a statement; those that an earlier version did not write are None."""

    def __missing__(self, key: str) -> None:
        return None


@dataclass(frozen=True)
class Officer:
    """Everything that the page shows; ``None`` and empty values are missing parts."""

    name: str
    dataset: str
    begun: str
    banners: list[Banner]
    private: bool
    void: bool
    audited: bool
    finished: bool
    one: str
    by_image: bool
    statement: Fields
    odds: list[Odds]
    guess_by_mechanism: str | None
    uses: list[Use]
    together: Together | None
    looks: list[tuple[str, list[str]]]
    not_covered: list[str]
    rows: list[tuple[str, Any]]
    public: list[tuple[str, str]]
    recomputed: list[SubsampledGaussian]
    versions: list[tuple[str, str]]

    @property
    def promised(self) -> bool:
        """Whether there is a guarantee."""
        return self.private and not self.void

    @property
    def releasable(self) -> bool:
        """Whether model and samples may leave under the guarantee."""
        return self.promised and self.finished and not self.audited


def write_privacy_page(run: Run) -> Path:
    """Write ``privacy.html`` from a run's statement and config; no image is opened.

    The page loads nothing from anywhere, runs no script and names no path of the machine. It says
    what ``privacy.json`` says when it is written: whoever adds to that writes the page again.

    Args:
        run: has its config; without a statement the page says that there is none.

    Returns:
        Where the page is.

    Raises:
        UserError: a file of the run is damaged.
    """
    path = run.privacy_page_path
    write_atomically(path, privacy_page(run))
    return path


def privacy_page(run: Run) -> str:
    """The page of ``write_privacy_page`` as HTML."""
    template = environment().get_template("officer.html.j2")
    return template.render(run=read_officer(run), version=__version__)


def read_officer(run: Run) -> Officer:
    """Gather what the page shows of a run.

    Raises:
        UserError: a file of the run is damaged.
    """
    cfg = run.config()
    said = read_statement(run)
    eps, delta = said.get("eps"), said.get("delta")
    void = is_void(said)
    unit = str(said.get("unit") or EXAMPLE)
    queries = said.get("queries", [])
    mechanisms = wording.mechanisms(one for one in queries if one.get("query") in OF_THE_MODEL)
    gaussians = [one for one in mechanisms if isinstance(one, SubsampledGaussian)]
    return Officer(
        name=run.path.resolve().name,
        dataset=str(OmegaConf.select(cfg, "dataset.name") or "unnamed data"),
        begun=str(cfg.get("started", ""))[:10],
        banners=wording.banners(said),
        private=eps is not None,
        void=void,
        audited=bool(said.get("audit")),
        finished=said.get("status") == "finished",
        one="image" if unit == EXAMPLE else unit,
        by_image=unit == EXAMPLE,
        statement=Fields(said),
        odds=[] if eps is None or void else _odds(eps, delta or 0.0),
        guess_by_mechanism=_guess(gaussians) if gaussians and not void else None,
        uses=[_use(entry) for entry in queries],
        together=_together(said),
        looks=wording.looks(said),
        not_covered=[str(sentence) for sentence in said.get("not_covered", [])],
        rows=wording.rows(said),
        public=_public(cfg),
        recomputed=gaussians,
        versions=[(name, str(v)) for name, v in said.get("versions", {}).items()],
    )


def _odds(eps: float, delta: float) -> list[Odds]:
    """Some eps to compare with, then the run's own."""
    return [
        Odds(
            one,
            delta,
            guess=meaning.guess(one, delta),
            found=meaning.found(one, delta, _ACCUSED),
            odds=meaning.odds_after(one),
        )
        for one in (*_FOR_COMPARISON, eps)
    ]


def _guess(mechanisms: list[SubsampledGaussian]) -> str:
    """The most right guesses by all that is known of the mechanisms, not by one eps of theirs."""
    return meaning.guess_by_advantage(min(1.0, delta_spent(mechanisms, eps=0)))


def _use(entry: Mapping[str, Any]) -> Use:
    labelled = {key: wording.query_label(key) for key in entry}
    own = {"query", "mechanism", "released", "eps", "delta", "candidate", "runs"}
    return Use(
        name=wording.plain(entry.get("query", "unnamed")),
        mechanism=wording.plain(entry.get("mechanism", "not said")),
        released=str(entry.get("released", "")),
        numbers=[(labelled[key], value) for key, value in entry.items() if key not in own],
        eps=entry.get("eps"),
        delta=entry.get("delta"),
        of_the_model=entry.get("query") in OF_THE_MODEL,
    )


def _together(said: Mapping[str, Any]) -> Together | None:
    """What all queries cost, where there are some that the statement's eps does not cover."""
    queries = said.get("queries", [])
    if all(entry.get("query") in OF_THE_MODEL for entry in queries):
        return None
    if said.get("eps_all_queries") is not None:
        return Together(said["eps_all_queries"], said["delta"], summed=False)
    spent = [(entry.get("eps"), entry.get("delta")) for entry in queries]
    if any(eps is None or delta is None for eps, delta in spent):
        return None
    return Together(sum(eps for eps, _ in spent), sum(delta for _, delta in spent), summed=True)


def _public(cfg: DictConfig) -> list[tuple[str, str]]:
    """The public data that the model saw before, by name; nothing where it saw none."""
    name = public_name(cfg)
    if name is None:
        return []
    found = [("Source", name)]
    if (root := OmegaConf.select(cfg, "public.root")) is not None:
        found.append(("Folder", Path(str(root)).name))
    for key, label in (("load.num_images", "Images"), ("steps", "Steps of public training")):
        if (value := OmegaConf.select(cfg, f"public.{key}")) is not None:
            found.append((label, f"{value:,}" if isinstance(value, int) else str(value)))
    return found
