"""What looks at private data, as values: a subsampled Gaussian, and the best of a random number."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from dp_synth.checks import fraction, not_negative, whole
from dp_synth.errors import UserError
from dp_synth.privacy.accounting.random_stopping import (
    NumberOfRuns,
    TruncatedNegativeBinomialRuns,
    law_from_dict,
    law_to_dict,
    number_of_runs,
)


@dataclass(frozen=True)
class SubsampledGaussian:
    """`steps` Poisson-subsampled Gaussian steps.

    Each unit enters each step on its own with probability `sample_rate`; the sum of contributions
    of L2 norm at most C gets Gaussian noise of standard deviation `noise_multiplier` * C. With
    `sample_rate` 1 it is the plain Gaussian mechanism. Raises UserError for values out of range.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    mechanism: ClassVar[str] = "poisson_subsampled_gaussian"

    def __post_init__(self) -> None:
        noise_multiplier = not_negative("noise_multiplier", self.noise_multiplier)
        object.__setattr__(self, "noise_multiplier", noise_multiplier)
        object.__setattr__(self, "sample_rate", fraction("sample_rate", self.sample_rate))
        object.__setattr__(self, "steps", whole("steps", self.steps))

    def to_dict(self) -> dict[str, Any]:
        """JSON values, from which `mechanism_from_dict` makes the same mechanism."""
        return {"mechanism": self.mechanism, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` wrote, without "mechanism"; UserError naming what is wrong with it."""
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"{dict(values)} is not a {cls.mechanism}: {error}.") from None


@dataclass(frozen=True)
class RandomStopping:
    """The best of a random number of runs, the others kept secret.

    `candidate` is what one run does with private data, its score included; where candidates differ,
    the costliest. Each run draws its hyper-parameters afresh and on its own from a law that does
    not depend on private data. Nothing else leaves: not the number of runs, nor another run's score
    or model. Papernot and Steinke 2022 (arXiv 2110.03620).
    """

    candidate: tuple[SubsampledGaussian, ...]
    runs: NumberOfRuns

    mechanism: ClassVar[str] = "random_stopping"

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidate", tuple(self.candidate))

    @classmethod
    def expecting(
        cls, runs: float, candidate: tuple[SubsampledGaussian, ...], eta: float = 0.0
    ) -> Self:
        """The best of a truncated negative binomial number of runs, `runs` of them expected."""
        return cls(candidate, TruncatedNegativeBinomialRuns.expecting(runs, eta=eta))

    def number_of_runs(self, uniform: float) -> int:
        """How many runs a secret uniform draw from [0, 1) stands for; see `number_of_runs`."""
        return number_of_runs(self.runs, uniform)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, from which `mechanism_from_dict` makes the same mechanism."""
        candidate = [part.to_dict() for part in self.candidate]
        return {
            "mechanism": self.mechanism,
            "candidate": candidate,
            "runs": law_to_dict(self.runs),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` wrote, without "mechanism"; UserError naming what is wrong with it."""
        match dict(values):
            case {"candidate": list(parts), "runs": dict(law), **rest} if not rest:
                found = [mechanism_from_dict(part) for part in parts]
                candidate = tuple(part for part in found if isinstance(part, SubsampledGaussian))
                if len(candidate) == len(parts):
                    return cls(candidate, law_from_dict(law))
        raise UserError(f"{dict(values)} is not a {cls.mechanism}.")


Mechanism = SubsampledGaussian | RandomStopping


def mechanism_from_dict(values: Mapping[str, Any]) -> Mechanism:
    """The mechanism that `to_dict` wrote; UserError naming what is wrong with it."""
    kinds = {kind.mechanism: kind for kind in (SubsampledGaussian, RandomStopping)}
    arguments = dict(values)
    name = arguments.pop("mechanism", None)
    if name not in kinds:
        raise UserError(f"mechanism={name!r} is unknown; use {' or '.join(kinds)}.")
    return kinds[name].from_dict(arguments)
