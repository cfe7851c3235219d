"""Feeds a plan's logical batches to Lightning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dp_synth.data.images import Images


@dataclass
class Batch:
    """A logical batch of B examples; B is a Poisson draw in private training and may be 0.

    Attributes:
        indices: int64 [B], which examples.
        pixels: uint8 [B,C,H,W].
        labels: int64 [B].
    """

    indices: Tensor
    pixels: Tensor
    labels: Tensor


class _Examples(Dataset[Batch]):
    """Hands out a whole logical batch at once; the empty list of indices gives an empty batch."""

    def __init__(self, images: Images) -> None:
        self.pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(images.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Batch:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return Batch(chosen, self.pixels[chosen], self.labels[chosen])


class ImageDataModule(lightning.LightningDataModule):
    """Images in memory, served in the batches that a plan asks for.

    Args:
        images: the training split.
        batches: called with the number of steps taken so far; gives the index arrays of the
            remaining logical batches. A resumed run calls it again and so gets fresh batches.
    """

    def __init__(self, images: Images, batches: Callable[[int], Any]) -> None:
        super().__init__()
        self.images = images
        self.batches = batches

    def train_dataloader(self) -> DataLoader[Batch]:
        """One item per logical batch. No worker processes: indexing memory is faster."""
        steps_taken = self.trainer.global_step if self.trainer is not None else 0
        return DataLoader(
            _Examples(self.images),
            batch_sampler=self.batches(steps_taken),
            collate_fn=_as_is,
        )

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Move a batch; Lightning cannot look into it by itself."""
        return Batch(batch.indices, batch.pixels.to(device), batch.labels.to(device))


def _as_is(batch: Any) -> Batch:
    return batch
