"""Feeds a plan's logical batches to Lightning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dp_synth.data import camelyon17, cifar10
from dp_synth.data.images import Images
from dp_synth.privacy.units import Units


@dataclass
class Batch:
    """A logical batch of B examples; B is a Poisson draw in private training and may be 0.

    An example is an image, or a unit with all of its images: M images in all.

    Attributes:
        indices: int64 [B], which examples.
        pixels: uint8 [M,C,H,W], example after example.
        labels: int64 [M].
        counts: int64 [B], images of each unit, >= 1; or None where an example is an image.
    """

    indices: Tensor
    pixels: Tensor
    labels: Tensor
    counts: Tensor | None = None


class _Examples(Dataset[Batch]):
    """Hands out a whole logical batch at once; the empty list of indices gives an empty batch.

    Pixels are read when they are asked for, so that they may lie in a file. An index beyond the
    images found is an example that could not be read: it enters steps as any other does, and
    contributes nothing.
    """

    def __init__(self, images: Images) -> None:
        self.pixels = images.pixels
        self.labels = torch.from_numpy(images.labels)
        self.units = None if images.units is None else Units.from_ids(images.units)
        self.found = images.num_units

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Batch:
        examples = torch.as_tensor(indices, dtype=torch.int64)
        examples = examples[examples < self.found]
        chosen, counts = examples, None
        if self.units is not None:
            chosen, counts = self.units.images(examples)
        pixels = torch.from_numpy(self.pixels[chosen.numpy()]).permute(0, 3, 1, 2).contiguous()
        return Batch(examples, pixels, self.labels[chosen], counts)


class ImageDataModule(lightning.LightningDataModule):
    """Images, served in the batches that a plan asks for.

    Where the images have units, the plan's examples are the units: Poisson batches select units,
    and an epoch of public training passes over the units once, not over the images.

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
        counts = None if batch.counts is None else batch.counts.to(device)
        return Batch(batch.indices, batch.pixels.to(device), batch.labels.to(device), counts)


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10's training split in the batches of a plan.

    Args:
        batches: see ``ImageDataModule``.
        options: of ``cifar10.load``, such as ``root``.
    """

    def __init__(self, batches: Callable[[int], Any], **options: Any) -> None:
        super().__init__(cifar10.load(split="train", **options), batches)


class Camelyon17DataModule(ImageDataModule):
    """Camelyon17-WILDS' training split in the batches of a plan.

    Args:
        batches: see ``ImageDataModule``.
        options: of ``camelyon17.load``, such as ``root``, ``resolution`` and ``unit``.
    """

    def __init__(self, batches: Callable[[int], Any], **options: Any) -> None:
        super().__init__(camelyon17.load(split="train", **options), batches)


def _as_is(batch: Any) -> Batch:
    return batch
