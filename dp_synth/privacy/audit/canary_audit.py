"""``audit=canaries``: plants canaries in a private run, attacks them, says what the attacks show."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import numpy as np
from diffusers import UNet2DModel

from dp_synth.building import build_diffusion
from dp_synth.checkpoints import SafeCheckpointIO, newest_first
from dp_synth.checks import count, whole
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.formats.reading import read_samples
from dp_synth.metrics.neighbours import nearest
from dp_synth.privacy.audit.canaries import CANARIES_FILE, Canaries
from dp_synth.privacy.audit.canary_callback import CanaryCallback
from dp_synth.privacy.audit.losses import mean_losses
from dp_synth.privacy.audit.one_run import OneRunBound, Scores, one_run_bound
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.runs import Run

NOT_FOR_RELEASE = (
    "This run was audited: canaries, made to be found again, were among the examples that it was "
    "trained on. Its model and its samples are not for release."
)

_ADVERSARIES = {
    "gradient_canaries": (
        "sees the noised sum of every step and knows what all other examples added to it"
    ),
    "image_canaries.loss": "has the public model and the released one, and compares their losses",
    "image_canaries.samples": "has the synthetic images alone, and looks for the nearest one",
}


class CanaryAudit:
    """The one-run audit of a private run by canaries of two kinds; see ``one_run`` and ``canaries``.

    Each attack's bound holds with ``confidence`` by itself. All of them are lower bounds: what they
    do not find may be there all the same.

    Args:
        gradient_canaries: planted in the gradients, 0 or more.
        image_canaries: planted among the images, 0 or more.
        confidence: above 1/2 and below 1.
        draws: of timestep and noise, for the loss of an image.

    Raises:
        UserError: a value out of range, or no canary at all.
    """

    def __init__(
        self, *, gradient_canaries: int, image_canaries: int, confidence: float, draws: int
    ) -> None:
        self.gradient_canaries = whole("audit.gradient_canaries", gradient_canaries)
        self.image_canaries = whole("audit.image_canaries", image_canaries)
        self.draws = count("audit.draws", draws)
        self.confidence = checked_confidence("audit.confidence", confidence)
        if self.num_canaries == 0:
            raise UserError(
                "audit.gradient_canaries and audit.image_canaries are both 0, so that there is "
                "nothing to find; audit.gradient_canaries=1000 would work."
            )

    @property
    def num_canaries(self) -> int:
        """By how much the canaries raise N, the plan's ``num_examples``."""
        return self.gradient_canaries + self.image_canaries

    @property
    def mark(self) -> dict[str, Any]:
        """What the privacy statement of an audited run says of it, fit for JSON."""
        return {
            "what": NOT_FOR_RELEASE,
            "gradient_canaries": self.gradient_canaries,
            "image_canaries": self.image_canaries,
            "confidence": self.confidence,
        }

    def check(self, plan: PrivacyPlan | PublicPlan, net: UNet2DModel) -> None:
        """Find out before any image is read whether the run can be audited.

        Raises:
            UserError: there is no guarantee to audit, or no room for so many gradient canaries.
        """
        if not plan.private:
            raise UserError("audit=canaries needs a private run: privacy=eps10 would work.")
        coordinates = sum(p.numel() for p in net.parameters() if p.requires_grad)
        if self.gradient_canaries > coordinates:
            raise UserError(
                f"audit.gradient_canaries={self.gradient_canaries} is more than the network has "
                f"trainable parameters; at most {coordinates} would work."
            )

    def plant(self, run: Run, images: Images, public: Images | None) -> Canaries:
        """The run's canaries: drawn and saved, or those that it has already.

        Args:
            run: keeps them in its ``local/``.
            images: the training split; its shape and classes alone are used.
            public: images to take canaries from, or None.

        Raises:
            UserError: the run's canaries are damaged.
        """
        path = run.local_dir / CANARIES_FILE
        if not path.is_file():
            Canaries.draw(self.gradient_canaries, self.image_canaries, images, public).save(path)
        return Canaries.load(path)

    def callback(self, canaries: Canaries, plan: PrivacyPlan) -> CanaryCallback:
        """The Lightning callback that plants and watches; it stands after the plan's own."""
        return CanaryCallback(canaries, plan, self.draws)

    def is_in(self, attacks: Collection[str]) -> bool:
        """Whether attacks on canaries are among those of these names."""
        return any(name in attacks for name in _ADVERSARIES)

    def report(self, run: Run) -> dict[str, dict[str, Any]]:
        """What each attack shows, by its name, fit for JSON; no private image is looked at.

        The attack on samples is left out where the run has none.

        Args:
            run: finished; its newest checkpoint has the canaries' scores.

        Raises:
            UserError: the run has no model, or what it keeps of its canaries is gone.
        """
        canaries = Canaries.load(run.local_dir / CANARIES_FILE)
        net, classes = run.load_model()
        seen = _seen_in_training(run)
        samples = read_samples(run.samples_dir) if run.samples_dir.is_dir() else None
        scores = {"gradient_canaries": seen["scores"].numpy()}
        if len(canaries.image_coins):
            images = canaries.image_set(classes)
            after = mean_losses(net, build_diffusion(run.config()), images, self.draws)
            scores["image_canaries.loss"] = seen["losses_before"].numpy() - after
            if samples is not None:
                scores["image_canaries.samples"] = closeness_to_samples(images, samples)
        delta = run.statement()["delta"]
        bounds = {
            name: self._bound(canaries, name, values, delta)
            for name, values in scores.items()
            if len(values)
        }
        return {
            name: {"adversary": _ADVERSARIES[name], **asdict(bound), "private": True}
            for name, bound in bounds.items()
        }

    def _bound(self, canaries: Canaries, name: str, scores: Scores, delta: float) -> OneRunBound:
        on_images = name.startswith("image_canaries")
        coins = canaries.image_coins if on_images else canaries.gradient_coins
        return one_run_bound(scores, coins, delta=delta, confidence=self.confidence)


def checked_confidence(key: str, value: float) -> float:
    """The value as a float; UserError unless it is a number above 1/2 and below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 < value < 1:
        raise UserError(f"{key}={value!r} must be a number above 0.5 and below 1.")
    return float(value)


def closeness_to_samples(images: Images, samples: Images) -> Scores:
    """Minus the distance, in grey levels, of each image to the nearest sample of its class: [N].

    Classes are matched by name; minus infinity where a class has no sample.
    """
    scores = np.full(len(images), -np.inf)
    for label, name in enumerate(images.classes):
        mine = np.flatnonzero(images.labels == label)
        if name not in samples.classes or not len(mine):
            continue
        theirs = samples.pixels[samples.labels == list(samples.classes).index(name)]
        if len(theirs):
            distances, _ = nearest(_flat(images.pixels[mine]), _flat(theirs))
            scores[mine] = -distances
    return scores


def _flat(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(len(pixels), -1)


def _seen_in_training(run: Run) -> dict[str, Any]:
    """What the run's last checkpoint holds of its canaries."""
    newest = next(iter(newest_first(run.checkpoints_dir)), None)
    if newest is None:
        raise UserError(
            f"{run.checkpoints_dir} holds no checkpoint: what became of the canaries in training "
            "is gone, and the run cannot be audited any more."
        )
    return SafeCheckpointIO().load_checkpoint(newest)["callbacks"][CanaryCallback.__name__]
