"""Progress bars. A private phase shows steps and eps, never a rate: a step's time follows its batch."""

import bisect
import sys
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from tqdm.auto import tqdm

from dp_synth.module import DiffusionModule, MeanGradient
from dp_synth.privacy.silence import screen

_REFRESH_SECONDS = 0.2 if sys.stderr.isatty() else 10.0
_PRIVATE_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"


class _Progress(Callback):
    """A bar that is closed whatever happens."""

    bar: tqdm

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Close the bar."""
        if hasattr(self, "bar"):
            self.bar.close()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Close the bar after an error, too: Lightning then tears nothing down."""
        self.teardown(trainer, pl_module, stage="fit")


class PublicProgress(_Progress):
    """Steps, rate and the smoothed training loss of public training.

    Args:
        caption: what is being trained.
    """

    def __init__(self, caption: str) -> None:
        self.caption = caption
        self.loss: float | None = None

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Open the bar."""
        self.bar = tqdm(
            total=trainer.max_steps, desc=self.caption, unit="step", mininterval=_REFRESH_SECONDS
        )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Advance and log the loss."""
        assert isinstance(pl_module, DiffusionModule)
        assert isinstance(pl_module.engine, MeanGradient)
        loss = pl_module.engine.loss
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        if trainer.logger is not None and trainer.global_step % 50 == 0:
            trainer.logger.log_metrics({"loss": self.loss}, step=trainer.global_step)
        self.bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
        self.bar.update()


def private_bar(caption: str, steps: int, taken: int = 0) -> tqdm:
    """A bar of private steps, drawn past the gate, without a rate.

    Redrawn every so many steps and never by the clock, since which steps a log shows would tell
    how long they took, and so how large their batches were.

    Args:
        caption: what is being trained.
        steps: all of them.
        taken: those of earlier sittings.
    """
    return tqdm(
        total=steps,
        initial=taken,
        desc=caption,
        bar_format=_PRIVATE_FORMAT,
        file=screen(),
        miniters=max(1, steps // 50),
        mininterval=0,
        maxinterval=float("inf"),
    )


class PrivateProgress(_Progress):
    """Steps and eps of private training: functions of the plan and the step number alone.

    Args:
        caption: what is being trained.
        curve: (steps, eps) points, increasing; between two points the larger eps is shown.
    """

    def __init__(self, caption: str, curve: list[tuple[int, float]]) -> None:
        self.caption = caption
        self.curve = curve

    def eps(self, steps_taken: int) -> float:
        """eps at the first point of the curve that is not before ``steps_taken``."""
        point = bisect.bisect_left(self.curve, (steps_taken, 0.0))
        return self.curve[min(point, len(self.curve) - 1)][1]

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Open the bar, at the steps already taken in a resumed run."""
        self.bar = private_bar(self.caption, trainer.max_steps, trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Advance and show eps; the loggers compute their curve from the plan, afterwards."""
        eps = self.eps(trainer.global_step)
        self.bar.set_postfix_str(f"eps spent {eps:.2f}", refresh=False)
        self.bar.update()
