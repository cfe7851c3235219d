"""The mechanism as a frozen, validated value: what is promised and at what noise.

`PublicPlan` has the same face and promises nothing, so that training code need not ask which it is.
"""

import math
import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from dp_synth.checks import count, one_of, positive, whole
from dp_synth.errors import UserError
from dp_synth.privacy import accounting
from dp_synth.privacy.batches import EpochBatches, PoissonBatches
from dp_synth.privacy.clipping.gradients import CLIPPINGS, Clipping
from dp_synth.privacy.randomness import (
    PrivateRandomness,
    PublicRandomness,
    Randomness,
    RepeatablePrivateRandomness,
)
from dp_synth.privacy.wording import (
    ASSUMPTIONS,
    EXAMPLE,
    GUARANTEE,
    MANY_IMAGES,
    MANY_UNITS,
    NO_GUARANTEE,
    NOT_COVERED,
    VOID,
)

ENGINES = ("auto", "loop", "opacus")
_SHOWN_POINTS = 20  # of the eps curve; each costs a fraction of a second of accounting


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """DP-SGD with `steps` Poisson batches, promising (`eps`, `delta`) under zero-out adjacency.

    `batch_size` is the expected number of examples (units) of a batch, `max_grad_norm` the L2 bound
    on one example's contribution, `multiplicity` the draws averaged before the clip. `clipping` is
    "flat" (no gradient is longer than the bound) or "automatic" (all are scaled to almost the
    bound; Bu et al. 2022, arXiv 2206.07136): the bound, and so the noise, is the same. The engine
    that clips changes no guarantee; it is recorded. `unit` names what is protected where that is
    not the example but all images of a patient, say; then N, the batches and q count units. `unsafe_repeatable_randomness` is a seed that
    makes every private draw repeatable: for tests, and it voids the guarantee.

    Raises UserError naming the key for a value out of range; warns where delta >= 1 / num_examples.
    """

    eps: float
    delta: float
    max_grad_norm: float
    batch_size: int
    steps: int
    num_examples: int
    multiplicity: int = 1
    accountant: str = "prv"
    clipping: Clipping = "flat"
    engine: Literal["auto", "loop", "opacus"] = "auto"
    unit: str | None = None
    noise_multiplier: float | None = None
    unsafe_repeatable_randomness: int | None = None

    private: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("eps", "delta", "max_grad_norm"):
            object.__setattr__(self, name, positive(_key(name), getattr(self, name)))
        for name in ("num_examples", "batch_size", "steps", "multiplicity"):
            object.__setattr__(self, name, count(_key(name), getattr(self, name)))
        if self.delta >= 1:
            raise UserError(
                f"privacy.delta={self.delta} must lie strictly between 0 and 1, "
                f"below 1/N = {1 / self.num_examples:.2g}."
            )
        if self.batch_size > self.num_examples:
            raise UserError(
                f"privacy.batch_size={self.batch_size} is larger than the N={self.num_examples} "
                f"examples of the data set; at most {self.num_examples} works."
            )
        one_of("privacy.accountant", self.accountant, accounting.ACCOUNTANTS)
        one_of("privacy.clipping", self.clipping, CLIPPINGS)
        one_of("privacy.engine", self.engine, ENGINES)
        if self.engine == "opacus" and self.multiplicity != 1:
            raise UserError(
                "privacy.engine=opacus has no augmentation multiplicity and cannot do "
                f"privacy.multiplicity={self.multiplicity}; privacy.multiplicity=1 or "
                "privacy.engine=auto would work."
            )
        if self.noise_multiplier is not None:
            noise_multiplier = positive("privacy.noise_multiplier", self.noise_multiplier)
            object.__setattr__(self, "noise_multiplier", noise_multiplier)
        if self.unsafe_repeatable_randomness is not None:
            seed = whole("privacy.unsafe_repeatable_randomness", self.unsafe_repeatable_randomness)
            object.__setattr__(self, "unsafe_repeatable_randomness", seed)
        if self.delta >= 1 / self.num_examples:
            warnings.warn(
                f"privacy.delta={self.delta} is not below 1/N = {1 / self.num_examples:.2g}: "
                "publishing a whole record picked at random would satisfy such a guarantee.",
                stacklevel=3,
            )

    @property
    def sample_rate(self) -> float:
        """The probability q with which each example enters each step; never rounded."""
        return self.batch_size / self.num_examples

    def calibrate(self) -> Self:
        """This plan with the smallest noise multiplier that keeps eps; itself if it has one.

        Raises UserError if the noise multiplier that it has does not keep eps.
        """
        if self.noise_multiplier is not None:
            if self._spent(self.steps, self.accountant).eps > self.eps * (1 + 1e-6):
                raise UserError(
                    f"privacy.noise_multiplier={self.noise_multiplier} does not keep "
                    f"privacy.eps={self.eps}; leave it out and it is calibrated."
                )
            return self
        noise_multiplier = accounting.calibrate(
            eps=self.eps,
            delta=self.delta,
            sample_rate=self.sample_rate,
            steps=self.steps,
            accountant=self.accountant,
        )
        # The new plan has the same delta; its warning has been given.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return replace(self, noise_multiplier=noise_multiplier)

    def epsilon(self, steps_taken: int | None = None) -> float:
        """eps after `steps_taken` steps (default: all). Raises UserError for more than planned."""
        return self._spent(steps_taken, self.accountant).eps

    def rdp_epsilon(self, steps_taken: int | None = None) -> float:
        """The same by Renyi accounting alone, as a cross-check: usually a little larger."""
        return self._spent(steps_taken, "rdp").eps

    def epsilon_curve(self, points: int = 10) -> list[tuple[int, float]]:
        """(steps, eps) at up to `points` evenly spaced step counts from 0 to the last."""
        counts = np.unique(np.linspace(0, self.steps, points).round().astype(int)).tolist()
        return [(steps, self.epsilon(steps)) for steps in counts]

    def randomness(self, seed: int) -> Randomness:
        """The source of every private draw; the public `seed` has no influence on it."""
        if self.unsafe_repeatable_randomness is not None:
            return RepeatablePrivateRandomness(self.unsafe_repeatable_randomness)
        return PrivateRandomness()

    def batches(self, randomness: Randomness, first_step: int = 0) -> PoissonBatches:
        """The Poisson batches from `first_step` to the last step."""
        return PoissonBatches(
            self.sample_rate, self.num_examples, self.steps, randomness, first_step
        )

    def callbacks(
        self,
        caption: str,
        micro_batch_size: int | None = None,
        memory_mib: float | None = None,
    ) -> list[Any]:
        """The Lightning callbacks that carry the mechanism out and show steps and eps.

        `caption` names the phase; for the others see ``ClippingEngine``.
        """
        # Imported here: a plan must open without Lightning.
        from dp_synth.privacy.callback import PrivacyEngineCallback
        from dp_synth.progress import PrivateProgress

        return [
            PrivacyEngineCallback(self, micro_batch_size, memory_mib),
            PrivateProgress(caption, self.epsilon_curve(_SHOWN_POINTS)),
        ]

    def same_mechanism(self, other: "PrivacyPlan | PublicPlan") -> list[str]:
        """Names of the fields in which two mechanisms differ; empty if a run may be resumed.

        Both are calibrated first. The engine is left out, since it changes no guarantee.
        """
        if not isinstance(other, PrivacyPlan):
            return ["private"]
        mine, theirs = self.calibrate(), other.calibrate()
        return [name for name in _differing(mine, theirs) if name != "engine"]

    def to_dict(self) -> dict[str, Any]:
        """The fields, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The plan that `to_dict` wrote; values are validated again."""
        return cls(**_checked_fields(cls, values))

    def statement(self, steps_taken: int, status: str) -> dict[str, Any]:
        """The privacy statement, fit for JSON: what is guaranteed, and what is not covered.

        Until `status` is "finished", the eps of the whole plan is stated: a run that is killed or
        continued must not leave a number below what its later steps spend.
        """
        plan = self.calibrate()
        steps = steps_taken if status == "finished" else self.steps
        spent = plan._spent(steps, self.accountant)
        mechanism = {
            "eps": spent.eps,
            "delta": self.delta,
            "noise_multiplier": plan.noise_multiplier,
            "sample_rate": self.sample_rate,
            "steps": steps,
            "max_grad_norm": self.max_grad_norm,
            "clipping": self.clipping,
        }
        void = self.unsafe_repeatable_randomness is not None
        return {
            "private": True,
            "guarantee": VOID if void else GUARANTEE,
            "status": status,
            **mechanism,
            "eps_planned": self.eps,
            "eps_rdp": plan.rdp_epsilon(steps),
            "accountant": spent.accountant,
            # While it runs, nobody keeps this file up to date.
            "steps_taken": None if status == "running" else steps_taken,
            "steps_planned": self.steps,
            "batch_size": self.batch_size,
            "multiplicity": self.multiplicity,
            "num_examples": self.num_examples,
            "engine": self.engine,
            **ASSUMPTIONS,
            "unit": self.unit or EXAMPLE,
            "queries": [
                {"query": "dp_sgd", "mechanism": "poisson_subsampled_gaussian", **mechanism}
            ],
            "unaccounted_looks": [],
            "not_covered": [MANY_UNITS if self.unit else MANY_IMAGES, *NOT_COVERED],
        }

    def _spent(self, steps_taken: int | None, accountant: str) -> accounting.Spent:
        steps = self.steps if steps_taken is None else steps_taken
        if not 0 <= steps <= self.steps:
            raise UserError(f"{steps} steps are not within the privacy.steps={self.steps} planned.")
        plan = self if self.noise_multiplier is not None else self.calibrate()
        assert plan.noise_multiplier is not None
        return accounting.spent(
            noise_multiplier=plan.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=steps,
            delta=self.delta,
            accountant=accountant,
        )


@dataclass(frozen=True, kw_only=True)
class PublicPlan:
    """Ordinary training on public data, with the face of a PrivacyPlan and no guarantee.

    `batch_size` above `num_examples` is lowered to it. Raises UserError for a value out of range.
    """

    batch_size: int
    steps: int
    num_examples: int
    multiplicity: int = 1

    private: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("num_examples", "batch_size", "steps", "multiplicity"):
            object.__setattr__(self, name, count(_key(name), getattr(self, name)))
        object.__setattr__(self, "batch_size", min(self.batch_size, self.num_examples))

    @property
    def sample_rate(self) -> float:
        """The fraction of the examples in one batch."""
        return self.batch_size / self.num_examples

    def calibrate(self) -> Self:
        """Itself: there is no noise to find."""
        return self

    def epsilon(self, steps_taken: int | None = None) -> float:
        """Infinity: nothing is promised about the training data."""
        return math.inf

    def randomness(self, seed: int) -> PublicRandomness:
        """Randomness that the public seed repeats."""
        return PublicRandomness(seed)

    def batches(self, randomness: Randomness, first_step: int = 0) -> EpochBatches:
        """Shuffled fixed-size batches from `first_step` to the last step."""
        return EpochBatches(self.batch_size, self.num_examples, self.steps, randomness, first_step)

    def callbacks(
        self,
        caption: str,
        micro_batch_size: int | None = None,
        memory_mib: float | None = None,
    ) -> list[Any]:
        """Progress alone: the optimizer and the gradients are the ordinary ones."""
        from dp_synth.progress import PublicProgress

        return [PublicProgress(caption)]

    def same_mechanism(self, other: "PrivacyPlan | PublicPlan") -> list[str]:
        """Names of the fields in which two plans differ."""
        return _differing(self, other) if isinstance(other, PublicPlan) else ["private"]

    def to_dict(self) -> dict[str, Any]:
        """The fields, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The plan that `to_dict` wrote; values are validated again."""
        return cls(**_checked_fields(cls, values))

    def statement(self, steps_taken: int, status: str) -> dict[str, Any]:
        """A statement, fit for JSON, that there is no guarantee: its eps is null."""
        return {
            "private": False,
            "guarantee": NO_GUARANTEE,
            "status": status,
            "eps": None,
            "steps_taken": steps_taken,
            "steps_planned": self.steps,
            "batch_size": self.batch_size,
            "multiplicity": self.multiplicity,
            "num_examples": self.num_examples,
            "sampling": "epochs",
            "queries": [],
            "unaccounted_looks": [],
            "not_covered": ["The training data: nothing is promised about them."],
        }


def _key(name: str) -> str:
    """The key as the user types it."""
    return f"dataset.{name}" if name == "num_examples" else f"privacy.{name}"


def _differing(mine: Any, theirs: Any) -> list[str]:
    names = [field.name for field in fields(mine)]
    return [name for name in names if getattr(mine, name) != getattr(theirs, name)]


def _checked_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(values) - {field.name for field in fields(cls)})
    if unknown:
        raise UserError(f"a stored plan has unknown fields: {', '.join(unknown)}.")
    return values
