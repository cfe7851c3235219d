"""The LightningModule: one training step = one logical batch = one optimizer step = one EMA step."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import lightning
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from dp_synth.data.module import Batch
from dp_synth.data.pixels import to_float
from dp_synth.privacy.randomness import Randomness
from dp_synth.privacy.units import spread
from dp_synth.process import Process, RowLoss

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_MICRO_BATCH_SIZE = 512


class GradientEngine(Protocol):
    """Turns a batch into a gradient; the clipping engine is the private one."""

    def accumulate(self, loss: RowLoss, rows: tuple[Tensor, ...], multiplicity: int) -> None:
        """Add the batch's gradient to each parameter's ``.grad``."""


class MeanGradient:
    """The engine of public training: the plain gradient of the mean loss.

    Args:
        micro_batch_size: rows of one backward, at most; None is enough to keep a processor busy.
    """

    def __init__(self, micro_batch_size: int | None = None) -> None:
        self.micro_batch_size = micro_batch_size or _MICRO_BATCH_SIZE
        self.loss = float("nan")

    def accumulate(self, loss: RowLoss, rows: tuple[Tensor, ...], multiplicity: int) -> None:
        """Add the gradient of the mean row loss, and remember that loss: it is public."""
        count = len(rows[0])
        if count == 0:  # none of the batch's examples could be read
            return
        self.loss = 0.0
        for part in zip(*(tensor.split(self.micro_batch_size) for tensor in rows), strict=True):
            value = loss(*part).sum() / count
            value.backward()
            self.loss += value.item()


class DiffusionModule(lightning.LightningModule):
    """A class-conditional diffusion model in training.

    Manual optimisation: a logical batch, however large, is one call of ``training_step`` and one
    optimizer step, so that Lightning's ``global_step``, the optimizer's, EMA's and the accountant's
    are the same number. The step is the same with and without privacy; what differs, the engine and
    the optimizer, is put in place by the plan's callbacks.

    Args:
        net: the network.
        diffusion: the process that it learns to reverse.
        optimizer: makes the optimizer from the trainable parameters.
        randomness: where each example's draws come from.
        multiplicity: draws of timestep, noise (and flip, and image of a unit) per example and step.
        ema_decay: limit of the EMA decay; warmed up as (1 + n) / (10 + n).
        label_dropout: chance that a draw is shown "no label" in place of its class.
        flip: whether draws mirror the image at random.
    """

    def __init__(
        self,
        net: UNet2DModel,
        diffusion: Process,
        optimizer: MakeOptimizer,
        randomness: Randomness,
        multiplicity: int,
        ema_decay: float,
        label_dropout: float,
        flip: bool,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.diffusion = diffusion
        self.make_optimizer = optimizer
        self.randomness = randomness
        self.multiplicity = multiplicity
        self.label_dropout = label_dropout
        self.flip = flip
        self.engine: GradientEngine = MeanGradient()
        self.ema = EMAModel(net.parameters(), decay=ema_decay)

    @property
    def no_label(self) -> int:
        """The label that stands for "no label"."""
        return self.net.config.num_class_embeds - 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the trainable parameters."""
        return self.make_optimizer(p for p in self.net.parameters() if p.requires_grad)

    def on_fit_start(self) -> None:
        """Bring the averaged weights to the network's device."""
        self.ema.to(self.device)

    def draw_rows(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The rows of a logical batch: each example repeated with draws of its own.

        A unit has K rows like any example, spread over its images (see ``spread``), whose labels
        they take. Changing a unit's images, or their number, changes no other unit's rows.

        Args:
            batch: B examples; B may be 0.
            step: the step, from 0; repeatable randomness is keyed by it.

        Returns:
            x0 [K*B,C,H,W], noise [K*B,C,H,W], t [K*B] (see ``Process.draw_t``), y int64 [K*B];
            row k * B + i is draw k of example i.
        """
        k = self.multiplicity
        draws = self.randomness.rows(step, batch.indices, k, self.device)
        if batch.counts is None:
            x0, y = to_float(batch.pixels).repeat(k, 1, 1, 1), batch.labels.repeat(k)
        else:
            # Drawn also where each unit of this batch owns one image: a draw that is left out for
            # some batches would tie the later draws of a unit to its companions.
            image = spread(batch.counts, k, draws.uniform())
            x0, y = to_float(batch.pixels[image]), batch.labels[image]
        t = self.diffusion.draw_t(draws.uniform())
        noise = draws.normal(tuple(x0.shape[1:]))
        y = torch.where(draws.uniform() < self.label_dropout, self.no_label, y)
        if self.flip:
            mirrored = (draws.uniform() < 0.5).view(-1, 1, 1, 1)
            x0 = torch.where(mirrored, x0.flip(-1), x0)
        return x0, noise, t, y

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One update from one logical batch, which may be empty."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        rows = self.draw_rows(batch, self.global_step)
        self.engine.accumulate(self.diffusion.row_loss(self.net), rows, self.multiplicity)
        optimizer.step()
        self.ema.step(self.net.parameters())

    def averaged_network(self) -> UNet2DModel:
        """A copy of the network with the EMA weights."""
        averaged = type(self.net).from_config(self.net.config)
        averaged.load_state_dict(self.net.state_dict())
        self.ema.copy_to(averaged.parameters())
        return averaged.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the averaged weights into the checkpoint."""
        checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the averaged weights from the checkpoint."""
        self.ema.load_state_dict(checkpoint["ema"])
