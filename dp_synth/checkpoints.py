"""Checkpoints of the private phase: written atomically, read as data only, resumable."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dp_synth.checks import count
from dp_synth.errors import UserError
from dp_synth.files import write_atomically

_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        steps: of the furthest checkpoint of this branch.
        abandoned: steps of earlier branches, from the checkpoint at which a run went on to the
            furthest one that had been written. They left output, and count beside ``steps``.
    """

    steps: int = 0
    abandoned: int = 0


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
                f"{path} is not a checkpoint of this program or is damaged; restore it, or remove it "
                "to go on from an older one, whose steps then count twice."
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
        if last:
            # Which steps the clock chose tells how long they took, and nobody needs them any more.
            for path in newest_first(self.directory)[1:]:
                if int(path.stem.removeprefix("step=")) % self.every:
                    path.unlink()

    def save(self, trainer: lightning.Trainer) -> None:
        """Save now, note how far the run has come, then drop all but the newest two."""
        trainer.save_checkpoint(_path(self.directory, trainer.global_step))
        abandoned = read_progress(self.directory).abandoned
        write_progress(self.directory, Progress(trainer.global_step, abandoned))
        self.saved_at = time.monotonic()
        for old in newest_first(self.directory)[2:]:
            old.unlink()


def newest_first(directory: Path) -> list[Path]:
    """The checkpoints in a directory, the one with most steps first."""
    return sorted(directory.glob("step=*.ckpt"), reverse=True)


def resume_point(directory: Path) -> tuple[Path | None, Progress]:
    """The checkpoint to continue from, and what counts if the run goes on there.

    Steps after the furthest checkpoint left no output: they are redone, and count once. If the
    furthest checkpoint is gone, the steps from the newest that is left to it count as abandoned.

    Returns:
        The newest checkpoint, or None where there is none, and the progress that is to be written
        before the run goes on.
    """
    noted = read_progress(directory)
    newest = next(iter(newest_first(directory)), None)
    steps = 0 if newest is None else int(newest.stem.removeprefix("step="))
    # A crash between the two writes leaves the note one checkpoint behind, never ahead.
    return newest, Progress(steps, noted.abandoned + max(0, noted.steps - steps))


def read_progress(directory: Path) -> Progress:
    """What was last written; no steps before the first checkpoint.

    Raises:
        UserError: the file is damaged.
    """
    path = directory / _PROGRESS
    if not path.is_file():
        return Progress()
    try:
        return Progress(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged; without it nobody knows what was spent, so restore it or start a "
            "new run."
        ) from error


def write_progress(directory: Path, progress: Progress) -> None:
    """Note how far a run has come; whole or not at all."""
    directory.mkdir(exist_ok=True)
    write_atomically(directory / _PROGRESS, json.dumps(asdict(progress)) + "\n")


def _path(directory: Path, steps_taken: int) -> Path:
    return directory / f"step={steps_taken:06d}.ckpt"
