"""The mechanism as a frozen, validated value: what is promised and at what noise.

`PublicPlan` has the same face and promises nothing, so that training code need not ask which it is.
"""

import math
import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from dp_synth.checks import count, flag, one_of, positive, whole
from dp_synth.errors import UserError
from dp_synth.privacy import accounting
from dp_synth.privacy.accounting import SubsampledGaussian
from dp_synth.privacy.batches import EpochBatches, PoissonBatches
from dp_synth.privacy.clipping.gradients import CLIPPINGS, Clipping
from dp_synth.privacy.randomness import (
    PrivateRandomness,
    PublicRandomness,
    Randomness,
    RepeatablePrivateRandomness,
)
from dp_synth.privacy.statement import private_statement, public_statement
from dp_synth.privacy.wording import round_up

ENGINES = ("auto", "loop", "opacus")
_NOT_COMPARED = ("engine", "abandoned_steps")
_SHOWN_POINTS = 20  # of the eps curve; each costs a fraction of a second of accounting


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """DP-SGD with `steps` Poisson batches, promising (`eps`, `delta`) under zero-out adjacency.

    `batch_size` is the expected number of examples (units) of a batch, `max_grad_norm` the L2 bound
    on one example's contribution, `multiplicity` the draws averaged before the clip. `clipping` is
    "flat" (no gradient is longer than the bound) or "automatic" (all are scaled to almost the
    bound; Bu et al. 2022, arXiv 2206.07136): the bound, and so the noise, is the same. The engine
    that clips changes no guarantee; it is recorded. `unit` names what is protected where that is
    not the example but all images of a patient, say; then N, the batches and q count units.
    `label_histogram_eps` is what a noised histogram of the labels would cost by itself at `delta`:
    where it is set, that query comes before the first step, and both together keep `eps`.
    `secure_noise` draws the noise from a cryptographic generator onto a grid. `abandoned_steps`
    were taken by a branch of the run that was given up for an older checkpoint: they left output,
    and count beside `steps`. `unsafe_repeatable_randomness` is a seed that makes every private draw
    repeatable: for tests, and it voids the guarantee.

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
    label_histogram_eps: float | None = None
    secure_noise: bool = False
    abandoned_steps: int = 0
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
        if self.label_histogram_eps is not None:
            histogram_eps = positive("privacy.label_histogram_eps", self.label_histogram_eps)
            object.__setattr__(self, "label_histogram_eps", histogram_eps)
            if histogram_eps >= self.eps:
                raise UserError(
                    f"privacy.label_histogram_eps={histogram_eps:g} leaves nothing of "
                    f"privacy.eps={self.eps:g} for training; a twentieth of it would work."
                )
        flag("privacy.secure_noise", self.secure_noise)
        abandoned_steps = whole("privacy.abandoned_steps", self.abandoned_steps)
        object.__setattr__(self, "abandoned_steps", abandoned_steps)
        if self.unsafe_repeatable_randomness is not None:
            seed = whole("privacy.unsafe_repeatable_randomness", self.unsafe_repeatable_randomness)
            object.__setattr__(self, "unsafe_repeatable_randomness", seed)
            if self.secure_noise:
                raise UserError(
                    "privacy.secure_noise=true and privacy.unsafe_repeatable_randomness exclude "
                    "each other: noise that can be repeated is not secure."
                )
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
            if self.epsilon() > self.eps * (1 + 1e-6):
                raise UserError(
                    f"privacy.noise_multiplier={self.noise_multiplier} does not keep "
                    f"privacy.eps={self.eps}; leave it out and it is calibrated."
                )
            return self
        noise_multiplier = accounting.calibrate(
            eps=self.eps,
            delta=self.delta,
            sample_rate=self.sample_rate,
            steps=self.steps + self.abandoned_steps,
            accountant=self.accountant,
            others=self._histogram(),
        )
        return self._with(noise_multiplier=noise_multiplier)

    def spent(self, steps_taken: int | None = None) -> accounting.Spent:
        """eps after `steps_taken` steps (default: all) and the accountant that it came from.

        Raises UserError for more steps than planned.
        """
        return accounting.composed(
            self.mechanisms(steps_taken).values(), delta=self.delta, accountant=self.accountant
        )

    def epsilon(self, steps_taken: int | None = None) -> float:
        """eps after `steps_taken` steps (default: all). Raises UserError for more than planned."""
        return self.spent(steps_taken).eps

    def rdp_epsilon(self, steps_taken: int | None = None) -> float:
        """The same by Renyi accounting alone, as a cross-check: usually a little larger."""
        mechanisms = self.mechanisms(steps_taken).values()
        return accounting.composed(mechanisms, delta=self.delta, accountant="rdp").eps

    def mechanisms(self, steps_taken: int | None = None) -> dict[str, SubsampledGaussian]:
        """What has looked at private images after `steps_taken` steps (default: all), by query.

        Raises UserError for more steps than planned.
        """
        steps = self.steps if steps_taken is None else steps_taken
        if not 0 <= steps <= self.steps:
            raise UserError(f"{steps} steps are not within the privacy.steps={self.steps} planned.")
        plan = self if self.noise_multiplier is not None else self.calibrate()
        assert plan.noise_multiplier is not None
        dp_sgd = SubsampledGaussian(
            plan.noise_multiplier, self.sample_rate, steps + self.abandoned_steps
        )
        return dict(zip(("label_histogram",), self._histogram(), strict=False)) | {"dp_sgd": dp_sgd}

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

    def after_abandoning(self, steps: int) -> Self:
        """This plan, at its own noise, of a run that gave up branches of `steps` steps in all.

        Raises UserError where eps does not hold them beside the planned ones.
        """
        plan = self.calibrate()._with(abandoned_steps=steps)
        if plan.epsilon() > plan.eps * (1 + 1e-6):
            raise UserError(
                f"going on from an older checkpoint would count {steps} steps beside the "
                f"{plan.steps} planned, eps = {round_up(plan.epsilon())} in all, above "
                f"privacy.eps={plan.eps:g}; restore the newest checkpoint or start a new run."
            )
        return plan

    def same_mechanism(self, other: "PrivacyPlan | PublicPlan") -> list[str]:
        """Names of the fields in which two mechanisms differ; empty if a run may be resumed.

        Both are calibrated first. The engine is left out, since it changes no guarantee, and so are
        abandoned steps, which only a resumed run has.
        """
        if not isinstance(other, PrivacyPlan):
            return ["private"]
        mine, theirs = self.calibrate(), other.calibrate()
        return [name for name in _differing(mine, theirs) if name not in _NOT_COMPARED]

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
        return private_statement(self.calibrate(), steps_taken, status)

    @property
    def label_histogram_noise_multiplier(self) -> float | None:
        """Standard deviation of the noise of a count of units, or None without that query."""
        histogram = self._histogram()
        return histogram[0].noise_multiplier if histogram else None

    def _with(self, **changes: Any) -> Self:
        """The same but for some fields; of its delta, which stays, a warning has been given."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return replace(self, **changes)

    def _histogram(self) -> tuple[SubsampledGaussian, ...]:
        if self.label_histogram_eps is None:
            return ()
        noise_multiplier = accounting.calibrate(
            eps=self.label_histogram_eps, delta=self.delta, sample_rate=1.0, steps=1
        )
        return (SubsampledGaussian(noise_multiplier, 1.0, 1),)


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
    label_histogram_noise_multiplier: ClassVar[None] = None

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

    def after_abandoning(self, steps: int) -> Self:
        """Itself: no step is counted."""
        return self

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
        return public_statement(self, steps_taken, status)


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
