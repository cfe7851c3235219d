"""Fits a diffusion model to images under a plan; the same code with and without privacy."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from dp_synth.checkpoints import PeriodicCheckpoint, SafeCheckpointIO
from dp_synth.checks import count, one_of, positive
from dp_synth.data.images import Images
from dp_synth.data.module import ImageDataModule
from dp_synth.errors import UserError
from dp_synth.module import DiffusionModule, MeanGradient
from dp_synth.privacy.diagnostics import Diagnostics
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.privacy.silence import declared, silently

# Those whose clipped sums are added in float32; in half precision a sum over a batch would round by
# more than one example may contribute.
PRECISIONS = ("32-true", "bf16-mixed")


class Interrupted(Exception):
    """Training was stopped by Ctrl-C or by trainer.max_time after a whole step, and was saved.

    Args:
        steps_taken: all of them, those of earlier sittings included.
        steps: what the plan holds.
        caption: the phase.
    """

    def __init__(self, steps_taken: int, steps: int, caption: str) -> None:
        super().__init__(f"{steps_taken} of {steps} steps of {caption} taken")
        self.steps_taken = steps_taken


class _DeclaredCheckpointIO(SafeCheckpointIO):
    """Of a private phase: writes the fields that ``silence.declared`` names, and no others."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write what may be kept."""
        super().save_checkpoint(declared(checkpoint), path, storage_options)


class GracefulInterrupt(Callback):
    """Lets the step in progress end on Ctrl-C, so that no noisy update is half made.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.asked = False

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Take over SIGINT."""
        self.previous = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop after a whole step."""
        if self.asked:
            trainer.should_stop = True

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Give SIGINT back."""
        if hasattr(self, "previous"):
            signal.signal(signal.SIGINT, self.previous)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Give SIGINT back after an error, too: Lightning then tears nothing down."""
        self.teardown(trainer, pl_module, stage="fit")


def fit(
    module: DiffusionModule,
    images: Images,
    plan: PrivacyPlan | PublicPlan,
    trainer_cfg: DictConfig,
    *,
    caption: str,
    logger: Logger | None = None,
    checkpoints: PeriodicCheckpoint | None = None,
    resume_from: Path | None = None,
    local_dir: Path | None = None,
    diagnostics: bool = False,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Take the plan's steps, or what is left of them; silently, where the plan is private.

    Args:
        module: trained in place.
        images: the training split; one logical batch of it per step, as the plan draws them. Where
            it has units, these are the plan's examples.
        plan: batches, their number, and the callbacks that make training private.
        trainer_cfg: the ``trainer`` group.
        caption: what the progress bar says.
        logger: a Lightning logger of a public phase. A private one is connected to none, whatever
            is given: what callbacks and ``self.log`` say to the trainer's logger is dropped.
        checkpoints: where to save, or None for a phase that is cheap to repeat.
        resume_from: a checkpoint of this plan.
        local_dir: what may tell of private images is kept in it, and leaves by no other way; see
            ``silence.silently``.
        diagnostics: whether a private phase writes ``diagnostics.csv`` into it; see
            ``Diagnostics``. No update changes.
        callbacks: further ones; they come after the plan's and before the one that saves.

    Raises:
        Interrupted: after Ctrl-C or ``trainer.max_time``; the state is saved if there is a place.
        ValueError: the plan is for another number of examples, or there is no ``local_dir`` for
            diagnostics.
        UserError, StepFault, Withheld: what ``silence.silently`` lets through.
    """
    if images.num_examples != plan.num_examples:
        counted = "examples" if images.units is None else "units (dataset.unit)"
        raise ValueError(
            f"the plan is for num_examples={plan.num_examples}, not {images.num_examples} {counted}"
        )
    if trainer_cfg.activation_checkpointing:
        module.net.enable_gradient_checkpointing()
    module.engine = MeanGradient(trainer_cfg.micro_batch_size)  # a private plan brings another
    all_callbacks = [
        *plan.callbacks(caption, trainer_cfg.micro_batch_size, trainer_cfg.memory_mib),
        *callbacks,
        GracefulInterrupt(),
    ]
    if trainer_cfg.max_time is not None:
        all_callbacks.append(_TimeLimit(trainer_cfg.max_time, verbose=False))
    if plan.private and diagnostics:
        if local_dir is None:
            raise ValueError("diagnostics need a local_dir")
        all_callbacks.append(Diagnostics(local_dir))
    trainer = build_trainer(
        trainer_cfg,
        max_steps=plan.steps,
        callbacks=[*all_callbacks, *([checkpoints] if checkpoints else [])],
        logger=DummyLogger() if plan.private else logger or False,
        checkpoint_io=_DeclaredCheckpointIO() if plan.private else SafeCheckpointIO(),
    )
    data = ImageDataModule(
        images, lambda steps_taken: plan.batches(module.randomness, first_step=steps_taken)
    )

    def take_steps() -> None:
        trainer.fit(module, datamodule=data, ckpt_path=resume_from)
        if trainer.global_step < plan.steps and checkpoints is not None:
            checkpoints.save(trainer)

    if plan.private:
        silently(take_steps, local_dir)
    else:
        take_steps()
    if trainer.global_step < plan.steps:
        raise Interrupted(trainer.global_step, plan.steps, caption)


def build_trainer(
    trainer_cfg: DictConfig, checkpoint_io: SafeCheckpointIO | None = None, **options: Any
) -> lightning.Trainer:
    """Lightning's trainer, as the ``trainer`` group and one logical batch per step want it.

    Args:
        trainer_cfg: the ``trainer`` group.
        checkpoint_io: writes and reads checkpoints; where None, there are none.
        options: of ``lightning.Trainer``.

    Raises:
        UserError: there is no such accelerator here, or ``trainer.devices`` asks for several
            processes.
    """
    one_of("trainer.precision", trainer_cfg.precision, PRECISIONS)
    if trainer_cfg.micro_batch_size is not None:
        count("trainer.micro_batch_size", trainer_cfg.micro_batch_size)
    if trainer_cfg.memory_mib is not None:
        positive("trainer.memory_mib", trainer_cfg.memory_mib)
    try:
        trainer = lightning.Trainer(
            accelerator=trainer_cfg.accelerator,
            devices=trainer_cfg.devices,
            precision=trainer_cfg.precision,
            max_epochs=-1,
            plugins=[checkpoint_io or SafeCheckpointIO(), *_cluster_plugins()],
            # Under SLURM, Lightning would take any checkpoint that it finds there for its own, also
            # one of a private run for public training. Nothing is to be found here.
            default_root_dir=os.devnull,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            # A resumed run ends Lightning's epoch early, for it counts the batches of the first
            # sitting in; asking again for a loader gives the batches that are left.
            reload_dataloaders_every_n_epochs=1,
            inference_mode=False,
            **options,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UserError(
            f"trainer.accelerator={trainer_cfg.accelerator} trainer.devices={trainer_cfg.devices} "
            f"trainer.precision={trainer_cfg.precision} cannot be had here: {error}"
        ) from error
    # Here, since Lightning starts the other processes, each a command of its own, before any hook.
    if trainer.world_size != 1:
        raise UserError(
            f"trainer.devices={trainer_cfg.devices} gives {trainer.world_size} processes, and "
            "training runs on one: trainer.devices=1 would work."
        )
    return trainer


def _cluster_plugins() -> list[Any]:
    """No requeueing by Lightning: it would write checkpoints of its own, and resume from them."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


class _TimeLimit(Timer):
    """``trainer.max_time`` for this sitting: a resumed run has all of it again."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: time spent in an earlier sitting does not count."""
        return {}
