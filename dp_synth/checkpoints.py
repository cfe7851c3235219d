"""Checkpoints of the private phase: written atomically, read as data only, resumable."""

import os
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dp_synth.checks import count
from dp_synth.errors import UserError
from dp_synth.files import write_atomically

# Holds the steps of the newest checkpoint ever written.
_FURTHEST = "furthest"


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, for the owner alone; nothing loaded is run."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write beside the target, flush to disk, then rename: a crash leaves the old file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read tensors and plain values; a file that holds anything else is refused.

        Raises:
            UserError: not a checkpoint, or a damaged one.
        """
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"{path} is not a checkpoint of this program or is damaged; an older one would "
                "spend its steps' eps a second time, so restore this file or start a new run."
            ) from error


class PeriodicCheckpoint(Callback):
    """Saves at step 0, then every ``every`` steps or ``seconds``, and keeps the newest two.

    Args:
        directory: where the files go, ``step=<steps taken>.ckpt``.
        every: optimizer steps between two checkpoints.
        seconds: a checkpoint is also due when this long has passed.
    """

    def __init__(self, directory: Path, every: int, seconds: float = 30.0) -> None:
        self.directory = directory
        self.every = count("trainer.checkpoint_every", every)
        self.seconds = seconds
        self.saved_at = time.monotonic()

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save before the first step, so that no run is without a checkpoint."""
        self.save(trainer)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save when one is due."""
        overdue = time.monotonic() - self.saved_at >= self.seconds
        last = trainer.global_step == trainer.max_steps
        if trainer.global_step % self.every == 0 or overdue or last:
            self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        """Save now, note how far the run has come, then drop all but the newest two."""
        trainer.save_checkpoint(_path(self.directory, trainer.global_step))
        write_atomically(self.directory / _FURTHEST, f"{trainer.global_step}\n")
        self.saved_at = time.monotonic()
        for old in newest_first(self.directory)[2:]:
            old.unlink()


def newest_first(directory: Path) -> list[Path]:
    """The checkpoints in a directory, the one with most steps first."""
    return sorted(directory.glob("step=*.ckpt"), reverse=True)


def resume_point(directory: Path) -> Path | None:
    """The checkpoint to continue from, or None where a run was stopped before its first one.

    Steps after the furthest checkpoint left no output and are redone. Those before it did: taking
    them again would spend their eps twice, which no plan holds.

    Raises:
        UserError: the furthest checkpoint is gone.
    """
    note = directory / _FURTHEST
    noted = _path(directory, int(note.read_text())) if note.is_file() else None
    # A crash between the two writes leaves the note one checkpoint behind, never ahead.
    newest = next(iter(newest_first(directory)), None)
    if noted is not None and (newest is None or newest.name < noted.name):
        raise UserError(
            f"{noted} is missing; an older checkpoint would spend its steps' eps a second time, "
            "so restore this file or start a new run."
        )
    return newest


def _path(directory: Path, steps_taken: int) -> Path:
    return directory / f"step={steps_taken:06d}.ckpt"
