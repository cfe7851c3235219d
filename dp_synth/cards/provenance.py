"""What both cards say of the run behind them: the data, the guarantee, its limits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from dp_synth.privacy.wording import EXAMPLE, is_void
from dp_synth.reporting import statement as wording
from dp_synth.reporting.content import public_name
from dp_synth.reporting.statement import Banner
from dp_synth.runs import Run

# What a header repeats of the statement.
_STATED = ("guarantee", "eps", "delta", "unit", "adjacency", "num_examples")


@dataclass(frozen=True)
class Provenance:
    """The run behind a card.

    Attributes:
        dataset: name of the private data set.
        public: name of the public data or model that training began with; None without any.
        statement: ``privacy.json``.
    """

    dataset: str
    public: str | None
    statement: Mapping[str, Any]

    @property
    def promised(self) -> bool:
        """Whether there is a guarantee."""
        return self.statement.get("eps") is not None and not is_void(self.statement)

    @property
    def banners(self) -> list[Banner]:
        """What must be said before anything else."""
        return wording.banners(self.statement)

    @property
    def one(self) -> str:
        """What is protected, in a word."""
        unit = str(self.statement.get("unit") or EXAMPLE)
        return "image" if unit == EXAMPLE else unit

    @property
    def not_covered(self) -> list[str]:
        """What the guarantee does not speak of, in sentences."""
        return [str(sentence) for sentence in self.statement.get("not_covered", [])]

    def header(self) -> dict[str, Any]:
        """The same for programs; what the statement does not hold is None."""
        return {key: self.statement.get(key) for key in _STATED} | {"public": self.public}


def read_provenance(run: Run) -> Provenance:
    """The run behind a card.

    Raises:
        UserError: the run has no statement.
    """
    cfg = run.config()
    return Provenance(
        dataset=str(OmegaConf.select(cfg, "dataset.name") or "unnamed data"),
        public=public_name(cfg),
        statement=run.statement(),
    )
