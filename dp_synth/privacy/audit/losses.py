"""The diffusion loss of single images, averaged over draws: what a loss-based attack looks at."""

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor

from dp_synth.data.images import Images
from dp_synth.data.pixels import to_float
from dp_synth.privacy.audit.one_run import Scores
from dp_synth.process import Process

_ROWS = 512  # of one forward


@torch.no_grad()
def mean_losses(
    net: UNet2DModel, diffusion: Process, images: Images, draws: int, seed: int = 0
) -> Scores:
    """The training loss of each image under its label, averaged over draws of t and noise: [N].

    All images see the same draws, which makes the comparison between them sharper and leaves the
    losses of independent images independent. The timesteps are spread over their law evenly. The
    network is in evaluation mode meanwhile; the global random state is not touched.

    Args:
        net: on any device.
        diffusion: its process; the law of t is that of training.
        images: N may be 0.
        draws: 1 or more.
        seed: fixes the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    uniforms = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws
    timesteps = diffusion.draw_t(uniforms)
    device, was_training = next(net.parameters()).device, net.training
    net.eval()
    row_loss = diffusion.row_loss(net)
    total = torch.zeros(len(images), dtype=torch.float64)
    for t in timesteps:
        noise = torch.randn((1, *images.shape), generator=generator)
        for start in range(0, len(images), _ROWS):
            rows = slice(start, start + _ROWS)
            x0 = to_float(images.pixels[rows])
            batch: list[Tensor] = [
                x0,
                noise.expand_as(x0),
                t.expand(len(x0)),
                torch.from_numpy(images.labels[rows]),
            ]
            total[rows] += row_loss(*(tensor.to(device) for tensor in batch)).double().cpu()
    net.train(was_training)
    return np.asarray(total / draws)
