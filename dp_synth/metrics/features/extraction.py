"""The one interface of all features: images as bytes in, one row of numbers each out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dp_synth.errors import UserError


@dataclass(frozen=True, eq=False)
class Features:
    """A network that turns images into features, and what reports call it.

    Attributes:
        name: in names of metrics, such as ``efficientnet_lite0``.
        label: in sentences, such as ``EfficientNet-Lite0 features``.
        num_features: length D of the features of one image.
        load: returns the network, which maps uint8 ``[N, C, H, W]`` to ``[N, D]`` and computes on
            the device of its parameters. It is called at the first use.
        batch_size: images in one call of the network.
        fingerprint: names all that the features depend on beside the pixels; None where they are
            too cheap to be kept on disk.
        frechet_name: what the Frechet distance in these features is called: ``fid`` is the one in
            those of the published Inception network, and no other.
        logits: maps features ``[N, D]`` to logits of classes; None where the network has none.
    """

    name: str
    label: str
    num_features: int
    load: Callable[[], nn.Module]
    batch_size: int
    fingerprint: str | None = None
    frechet_name: Literal["frechet", "fid"] = "frechet"
    logits: Callable[[npt.NDArray[np.float32]], Tensor] | None = None

    @cached_property
    def network(self) -> nn.Module:
        """The network, in memory from here on."""
        return self.load()

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return features ``[N, D]`` of images ``[N, H, W, C]``; N may be 0.

        Raises:
            UserError: a number of channels that the network cannot take.
        """
        rows = np.empty((len(pixels), self.num_features), np.float32)
        start = 0
        for batch in self.batches(pixels):
            rows[start : start + len(batch)] = batch
            start += len(batch)
        return rows

    def batches(self, pixels: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the rows of ``__call__`` a batch at a time, with a progress bar.

        Only a batch of ``pixels`` is read at once: they may lie in a file.
        """
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        starts = range(0, len(pixels), self.batch_size)
        for start in tqdm(starts, desc=self.label, leave=False, delay=1, disable=None):
            # A copy: torch takes no pixels that cannot be written to or that run backwards.
            batch = torch.from_numpy(np.array(pixels[start : start + self.batch_size]))
            with torch.inference_mode():
                rows = self.network(batch.permute(0, 3, 1, 2).to(device))
            yield rows.float().cpu().contiguous().numpy()


def ready(network: nn.Module) -> nn.Module:
    """Return the network set to evaluate, without gradients, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.eval().requires_grad_(False).to(device)


def in_colour(pixels: Tensor) -> Tensor:
    """Return images ``[N, 3, H, W]`` of ``[N, C, H, W]``: grey ones have three equal channels.

    Raises:
        UserError: C is neither 1 nor 3.
    """
    channels = pixels.shape[1]
    if channels not in (1, 3):
        raise UserError(
            f"networks trained on colour photographs take images of 1 or 3 channels, not "
            f"{channels}; use evaluator.fidelity.features=[classifier]."
        )
    return pixels.expand(-1, 3, -1, -1)
