"""The networks that the benchmark clips, and random rows for them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dp_synth.diffusion import Diffusion
from dp_synth.networks import unet
from dp_synth.process import RowLoss
from dp_synth.timestep_law import TimestepLaw

NUM_CLASSES = 10

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
Point = tuple[int, int]  # (B examples, K draws of each)


@dataclass(frozen=True)
class Network:
    """A U-Net's architecture, and the points that are measured where none are asked for.

    ``attention`` names the levels that have it beside the middle block, 0 the highest resolution.
    """

    image_shape: tuple[int, int, int]
    channels: tuple[int, ...]
    attention: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    attention_head_dim: int
    points: tuple[Point, ...]
    time_scale_shift: str = "default"

    def build(self, device: str) -> nn.Module:
        """The network, with the same random weights every time."""
        torch.manual_seed(0)
        levels = range(len(self.channels))
        kinds = ["Attn" if level in self.attention else "" for level in levels]
        net = unet(
            self.image_shape,
            NUM_CLASSES,
            block_out_channels=self.channels,
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.norm_num_groups,
            attention_head_dim=self.attention_head_dim,
            resnet_time_scale_shift=self.time_scale_shift,
        )
        return net.to(device).train()

    def random_rows(self, point: Point, device: str) -> Rows:
        """x0, noise, t, y for K draws of B examples, draw-major: row k * B + i is draw k of i."""
        examples, multiplicity = point
        rows = examples * multiplicity
        generator = torch.Generator().manual_seed(1)
        x0 = 2 * torch.rand(examples, *self.image_shape, generator=generator) - 1
        y = torch.randint(NUM_CLASSES, (examples,), generator=generator)
        noise = torch.randn(rows, *self.image_shape, generator=generator)
        t = torch.randint(1000, (rows,), generator=generator)
        x0, y = x0.repeat(multiplicity, 1, 1, 1), y.repeat(multiplicity)
        return x0.to(device), noise.to(device), t.to(device), y.to(device)


_SMALL_POINTS = ((32, 1), (16, 4), (8, 16), (4, 32))
NETWORKS = {
    # model=unet_digits
    "digits": Network((1, 8, 8), (16, 32, 64), (), 1, 8, 16, _SMALL_POINTS),
    "small": Network((1, 28, 28), (32, 64, 64), (1,), 1, 8, 16, _SMALL_POINTS),
    # The size of Ho et al. 2020's CIFAR-10 model.
    "paper": Network((3, 32, 32), (128, 256, 256, 256), (1,), 2, 32, 64, ((2, 8), (8, 1))),
    # About the size of Ghalebikesabi et al. 2023's; for GPUs.
    "paper-80m": Network(
        (3, 32, 32), (192, 384, 384, 384), (1,), 2, 32, 64,
        ((32, 1), (8, 16), (4, 128)), "scale_shift",
    ),
}  # fmt: skip


def row_loss(net: nn.Module, bf16: bool) -> RowLoss:
    """The training loss of each row; under bfloat16 autocast if asked."""
    loss = Diffusion("v", TimestepLaw([0, 1000], [1.0])).row_loss(net)

    def autocast_loss(x0: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x0.device.type, dtype=torch.bfloat16):
            return loss(x0, noise, t, y)

    return autocast_loss if bf16 else loss
