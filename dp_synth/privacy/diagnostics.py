"""What training does to single examples, in a file that stays: for whoever may see the images."""

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dp_synth.data.journal import open_private
from dp_synth.module import DiffusionModule
from dp_synth.privacy.clipping.choice import Engine
from dp_synth.privacy.silence import make_local
from dp_synth.process import RowLoss

_FIELDS = (
    "step",
    "batch_size",
    "loss",
    "clipped_fraction",
    "norm_mean",
    "norm_median",
    "norm_max",
    "not_finite",
)


class Diagnostics(Callback):
    """Writes ``diagnostics.csv``: a line a step, of what eps does not cover.

    The realised batch size; the mean loss of its rows; the fraction of its examples whose gradient
    was longer than ``max_grad_norm``; mean, median and maximum of the gradients' norms before they
    were clipped; how many norms were not finite. Losses and norms that are not finite are left out
    of the others; a field is empty where there is nothing to tell. The first line says that the file is private. A resumed run adds lines: of
    steps that were taken twice, the last counts.

    It watches what the engine computes anyway, so that no update changes by a bit. Nothing reads
    the file, and nobody is sent it; whoever chooses a setting by it spends more than eps.

    Args:
        directory: of the file; made, with mode 0700.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin the file, and watch the engine from now on: it has been checked."""
        assert isinstance(pl_module, DiffusionModule)
        assert isinstance(pl_module.engine, Engine)
        make_local(self.directory)
        self.watched = pl_module.engine = _WatchedEngine(pl_module.engine)
        if not (self.directory / "diagnostics.csv").exists():
            self._write("# PRIVATE: tells of single images and is not covered by eps.")
            self._write(",".join(_FIELDS))

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the step's line."""
        values: dict[str, float] = {"step": trainer.global_step, "batch_size": len(batch.indices)}
        values |= self.watched.summary()
        self._write(",".join(str(values.get(name, "")) for name in _FIELDS))

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Leave the engine as it was."""
        assert isinstance(pl_module, DiffusionModule)
        pl_module.engine = self.watched.engine

    def _write(self, line: str) -> None:
        with open_private(self.directory / "diagnostics.csv", "ab") as file:
            file.write(f"{line}\n".encode())


class _WatchedEngine:
    """Hands rows on to an engine and remembers their losses."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.losses: list[Tensor] = []

    def accumulate(self, loss: RowLoss, rows: tuple[Tensor, ...], multiplicity: int) -> None:
        """What the engine does."""
        self.losses = []

        def watched(*part: Tensor) -> Tensor:
            losses = loss(*part)
            self.losses.append(losses.detach())
            return losses

        self.engine.accumulate(watched, rows, multiplicity)

    def summary(self) -> dict[str, float]:
        """What the last sum was made of, without what an empty one leaves open."""
        if not self.engine.norms:
            return {}
        losses, norms = _finite(torch.cat(self.losses)), torch.cat(self.engine.norms)
        not_finite: dict[str, float] = {"not_finite": int((~norms.isfinite()).sum())}
        norms = _finite(norms)
        if not len(norms):
            return not_finite
        return not_finite | {
            "loss": losses.mean().item(),
            "clipped_fraction": (norms > self.engine.max_grad_norm).float().mean().item(),
            "norm_mean": norms.mean().item(),
            "norm_median": norms.median().item(),
            "norm_max": norms.max().item(),
        }


def _finite(values: Tensor) -> Tensor:
    return values[values.isfinite()]
