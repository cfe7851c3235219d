"""Plants gradient canaries in each step of private training and watches what becomes of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from dp_synth.data.module import Batch
from dp_synth.errors import UserError
from dp_synth.module import DiffusionModule
from dp_synth.privacy.audit.canaries import Canaries
from dp_synth.privacy.audit.losses import mean_losses
from dp_synth.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class _Place:
    """The coordinates of one parameter that belong to canaries.

    Attributes:
        parameter: a trainable one.
        at: index of the coordinates, a tensor [n] a dimension.
        canaries: int64 [n], whose they are.
    """

    parameter: nn.Parameter
    at: tuple[Tensor, ...]
    canaries: Tensor


class CanaryCallback(Callback):
    """Adds each gradient canary that is in, and in the batch, to the sum that is about to be noised.

    A canary contributes `max_grad_norm` at one coordinate of the trainable parameters: as much as a
    clipped example can (the Dirac canaries of Nasr et al. 2023, arXiv 2302.07956). Whether a step
    takes it in is decided by batches drawn from the plan as the examples' own are.

    Its score is what the strongest adversary sees: one who is shown the noised sum of every step
    and knows what all other examples contributed to it, so that the sum at the canary's coordinate,
    less that, is the canary's own contribution and the noise. Scores add up over the steps. No
    private image has any influence on them; but they tell noise, so that they are to be kept as
    secret as the coins.

    It is to stand after the callbacks that make training private and before the one that saves:
    the scores are part of the checkpoint, and a resumed run goes on with them.

    Args:
        canaries: planted in the run.
        plan: calibrated; its `num_examples` counts the canaries.
        draws: of timestep and noise, for the loss of the image canaries before training.
    """

    def __init__(self, canaries: Canaries, plan: PrivacyPlan, draws: int) -> None:
        self.canaries = canaries
        self.plan = plan
        self.draws = draws
        self.scores = torch.zeros(len(canaries.gradient_coins), dtype=torch.float64)
        self.losses_before: Tensor | None = None

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Find the canaries' coordinates; in a new run, look at the image canaries' losses, too."""
        assert isinstance(pl_module, DiffusionModule)
        self._places = _places(pl_module.net, len(self.scores))
        self._batches: Iterator[np.ndarray] = iter(
            self.plan.batches(pl_module.randomness, first_step=trainer.global_step)
        )
        if self.losses_before is None:
            classes = tuple(map(str, range(pl_module.no_label)))
            images = self.canaries.image_set(classes)
            losses = mean_losses(pl_module.net, pl_module.diffusion, images, self.draws)
            self.losses_before = torch.from_numpy(losses)

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Add the canaries to the clipped sum, before the optimizer adds noise to it."""
        contributions = self._contributions().to(pl_module.device)
        for place in self._places:
            grad = place.parameter.grad
            assert grad is not None
            self.scores[place.canaries] -= grad[place.at].double().cpu()
            with torch.no_grad():
                grad[place.at] += contributions[place.canaries].to(grad.dtype)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Read the noised sum, which the optimizer leaves divided by the expected batch size."""
        for place in self._places:
            grad = place.parameter.grad
            assert grad is not None
            noised_sum = grad[place.at].double().cpu() * self.plan.batch_size
            self.scores[place.canaries] += noised_sum

    def _contributions(self) -> Tensor:
        """What each canary adds to the sum of this step."""
        first = self.plan.num_examples - len(self.scores)
        selected = np.zeros(self.plan.num_examples, dtype=bool)
        selected[next(self._batches)] = True
        present = selected[first:] & self.canaries.gradient_coins
        return torch.from_numpy(present) * self.plan.max_grad_norm

    def state_dict(self) -> dict[str, Any]:
        """The scores, for the checkpoint."""
        return {
            "fingerprint": self.canaries.fingerprint,
            "scores": self.scores,
            "losses_before": self.losses_before,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's scores.

        Raises:
            UserError: the checkpoint was made with other canaries.
        """
        if state_dict["fingerprint"] != self.canaries.fingerprint:
            raise UserError(
                "The checkpoint was made with other canaries than those of the run; restore the "
                "run's local/ folder or start a new run."
            )
        self.scores = state_dict["scores"].clone()
        self.losses_before = state_dict["losses_before"]


def _places(net: nn.Module, canaries: int) -> list[_Place]:
    """Coordinates of the trainable parameters, each of one canary; the same for every run.

    Raises:
        UserError: there are fewer coordinates than canaries.
    """
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    ends = np.cumsum([parameter.numel() for parameter in parameters])
    if canaries > ends[-1]:
        raise UserError(
            f"audit.gradient_canaries={canaries} is more than the {ends[-1]} trainable parameters; "
            f"at most {ends[-1]} would work."
        )
    # Which coordinates they are is no secret: an adversary may know all but the coins.
    coordinates = np.random.default_rng(0).choice(ends[-1], canaries, replace=False)
    owners = np.searchsorted(ends, coordinates, side="right")
    places = []
    for number in np.unique(owners):
        parameter = parameters[number]
        mine = np.flatnonzero(owners == number)
        offsets = coordinates[mine] - (ends[number] - parameter.numel())
        at = np.unravel_index(offsets, tuple(parameter.shape))
        device = parameter.device
        places.append(
            _Place(
                parameter,
                tuple(torch.from_numpy(index).to(device) for index in at),
                torch.from_numpy(mine),
            )
        )
    return places
