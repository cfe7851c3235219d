"""Draws any stretch of a data set's images, batch by batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from diffusers import UNet2DModel

from dp_synth.data.images import Images
from dp_synth.process import Process
from dp_synth.sampling.execution import ExecutedNetwork, Execution
from dp_synth.sampling.sampler import Sampler
from dp_synth.sampling.shards import Shard


@dataclass(frozen=True)
class Source:
    """What images are drawn from.

    Attributes:
        net: the network, in evaluation mode, on the device that it is to run on.
        model: fingerprint of its weights.
        process: the one that it was trained to reverse.
        classes: class names in label order.
        shares: of each class, summing to 1; None: labels cycle through the classes.
        seed: public.
    """

    net: UNet2DModel
    model: str
    process: Process
    classes: tuple[str, ...]
    shares: Sequence[float] | None
    seed: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of one image."""
        height, width = self.net.config.sample_size
        return self.net.config.in_channels, height, width


class Drawing:
    """Draws shards of a data set.

    Args:
        source: what to draw from.
        sampler: what to draw.
        execution: how to run the network.
    """

    def __init__(self, source: Source, sampler: Sampler, execution: Execution) -> None:
        self.source = source
        self.sampler = sampler
        self._net = ExecutedNetwork(source.net, execution)
        self._labels = sampler.labels_of(len(source.classes), source.shares)

    def __call__(self, shard: Shard, drawn: Callable[[int], None]) -> Images:
        """Draw a shard, its batches counted from its start; ``drawn`` hears of each one's images."""
        channels, height, width = self.source.shape
        labels = self._labels[shard.first : shard.first + shard.count]
        pixels = np.empty((shard.count, height, width, channels), np.uint8)
        for start in range(0, shard.count, self.sampler.batch_size):
            y = labels[start : start + self.sampler.batch_size]
            pixels[start : start + len(y)] = self.sampler.draw(
                self._net, self.source.process, y, shard.first + start, self.source.seed
            )
            drawn(len(y))
        return Images(pixels, labels.numpy(), self.source.classes)
