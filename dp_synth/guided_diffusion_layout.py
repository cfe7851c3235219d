"""The architecture of guided-diffusion's U-Net, and its weights under diffusers' names.

The names and shapes of the weights tell the architecture; the widths of attention heads they do
not.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Weights = Mapping[str, Tensor]

# Their name of a layer, and the one that diffusers has for it: in a block, and outside of blocks.
_LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
    "op": "conv",
    "conv": "conv",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UPSAMPLER = re.compile(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.0)\.weight")
_GROUPS = 32  # of every normalisation in both programs


@dataclass(frozen=True)
class Layout:
    """The architecture of a network, as far as the shapes of its weights tell it.

    Attributes:
        in_channels: of an image.
        out_channels: as many, or twice as many where the variance is learned.
        timestep_channels: of the sinusoidal embedding.
        input_channels: after the first convolution.
        channels: of each level, the finest first.
        res_blocks: per level.
        attention: whether each level has it; the middle block always does.
        resnet_resampling: whether res-blocks halve and double images (``--resblock_updown``).
        scale_shift: whether the timestep scales and shifts norms (``--use_scale_shift_norm``).
        num_classes: rows of the label table; None without one.
    """

    in_channels: int
    out_channels: int
    timestep_channels: int
    input_channels: int
    channels: tuple[int, ...]
    res_blocks: int
    attention: tuple[bool, ...]
    resnet_resampling: bool
    scale_shift: bool
    num_classes: int | None

    @classmethod
    def of(cls, weights: Weights) -> "Layout":
        """Read the layout off the shapes.

        Raises:
            KeyError, IndexError, TypeError, ValueError: the weights are of something else.
        """
        blocks = _count_blocks(weights, "output_blocks")
        upsamplers = [found[1] for found in map(_UPSAMPLER.fullmatch, weights) if found]
        levels = len(upsamplers) + 1
        per_level, rest = divmod(blocks, levels)
        # Both halves have the same number of blocks: the input convolution stands for the
        # down-sampler that the coarsest level lacks.
        if rest or blocks != _count_blocks(weights, "input_blocks"):
            raise ValueError("unequal levels")
        firsts = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
        channels = tuple(len(weights[f"{first}.0.out_layers.3.weight"]) for first in firsts)
        label_table = weights.get("label_emb.weight")
        return cls(
            in_channels=weights["input_blocks.0.0.weight"].shape[1],
            out_channels=len(weights["out.2.weight"]),
            timestep_channels=weights["time_embed.0.weight"].shape[1],
            input_channels=len(weights["input_blocks.0.0.weight"]),
            channels=channels,
            res_blocks=per_level - 1,
            attention=tuple(f"{first}.1.qkv.weight" in weights for first in firsts),
            resnet_resampling="in_layers.0" in upsamplers,
            scale_shift=len(weights[f"{firsts[0]}.0.emb_layers.1.weight"]) == 2 * channels[0],
            num_classes=None if label_table is None else len(label_table),
        )

    def attention_channels(self) -> set[int]:
        """The numbers of channels that attention layers have."""
        at_levels = {n for n, has_it in zip(self.channels, self.attention, strict=True) if has_it}
        return at_levels | {self.channels[-1]}

    def architecture(self) -> dict[str, Any]:
        """The arguments of ``diffusers.UNet2DModel`` that compute the same; no head width."""
        plain_down, plain_up = (
            ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
            if self.resnet_resampling
            else ("DownBlock2D", "UpBlock2D")
        )
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.channels,
            "layers_per_block": self.res_blocks,
            "down_block_types": tuple(
                "AttnDownBlock2D" if has_it else plain_down for has_it in self.attention
            ),
            "up_block_types": tuple(
                "AttnUpBlock2D" if has_it else plain_up for has_it in reversed(self.attention)
            ),
            "downsample_type": "resnet" if self.resnet_resampling else "conv",
            "upsample_type": "resnet" if self.resnet_resampling else "conv",
            "downsample_padding": 1,
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
            "norm_num_groups": _GROUPS,
            # Left alone, diffusers drops this norm where the timestep scales and shifts.
            "attn_norm_num_groups": _GROUPS,
            "norm_eps": 1e-5,
            "flip_sin_to_cos": True,  # cosines come first
            "freq_shift": 0,
            "num_class_embeds": self.num_classes,
        }


def _count_blocks(weights: Weights, half: str) -> int:
    """How many blocks a half of the network has; ValueError where one has no weights."""
    indices = {int(name.split(".")[1]) for name in weights if name.startswith(f"{half}.")}
    if not indices or indices != set(range(len(indices))):
        raise ValueError(f"{half} has gaps")
    return len(indices)


def convert(
    weights: Weights, layout: Layout, heads: Callable[[int], int], use_new_attention_order: bool
) -> dict[str, Tensor]:
    """The same weights under the names and in the shapes of ``diffusers.UNet2DModel``.

    Args:
        weights: in float16 or float32; float32 comes back.
        layout: of these weights.
        heads: from the channels of an attention layer to its number of heads.
        use_new_attention_order: see ``GuidedDiffusionWeights``.

    Raises:
        KeyError: there is a weight that such a network does not have.
    """
    places = dict(_places(layout))
    names = _ENDS | {
        f"{theirs}.{layer}": f"{ours}.{name}"
        for theirs, ours in places.items()
        for layer, name in _LAYERS.items()
    }
    converted = {}
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".")
        if layer.endswith(".qkv"):
            place = places[layer.removesuffix(".qkv")]
            parts = _split_qkv(tensor.float(), heads(len(tensor) // 3), use_new_attention_order)
            for part, value in zip("qkv", parts, strict=True):
                converted[f"{place}.to_{part}.{kind}"] = value
        elif layer.endswith(".proj_out"):
            converted[f"{names[layer]}.{kind}"] = _as_linear(tensor.float())
        else:
            converted[f"{names[layer]}.{kind}"] = tensor.float()
    return converted


def _places(layout: Layout) -> Iterator[tuple[str, str]]:
    """Where each res-block, attention layer and resampler stands, as (theirs, ours)."""
    per_level, last = layout.res_blocks + 1, len(layout.channels) - 1
    for level, attention in enumerate(layout.attention):
        first, ours = 1 + level * per_level, f"down_blocks.{level}"
        for i in range(layout.res_blocks):
            yield f"input_blocks.{first + i}.0", f"{ours}.resnets.{i}"
            if attention:
                yield f"input_blocks.{first + i}.1", f"{ours}.attentions.{i}"
        if level < last:
            yield f"input_blocks.{first + layout.res_blocks}.0", f"{ours}.downsamplers.0"
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
    for step, attention in enumerate(reversed(layout.attention)):
        first, ours = step * per_level, f"up_blocks.{step}"
        for i in range(per_level):
            yield f"output_blocks.{first + i}.0", f"{ours}.resnets.{i}"
            if attention:
                yield f"output_blocks.{first + i}.1", f"{ours}.attentions.{i}"
        if step < last:
            place = 2 if attention else 1
            yield f"output_blocks.{first + per_level - 1}.{place}", f"{ours}.upsamplers.0"


def _split_qkv(
    tensor: Tensor, heads: int, use_new_attention_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each with its heads one after the other, as diffusers has them.

    One projection of [3 * channels, ...] makes all three. The new order is all queries, all keys,
    all values; the old one is queries, keys and values of the first head, then of the second.
    """
    rows = _as_linear(tensor)
    if use_new_attention_order:
        query, key, value = rows.chunk(3)
    else:
        by_head = rows.unflatten(0, (heads, 3, -1))
        query, key, value = (by_head[:, part].flatten(0, 1) for part in range(3))
    return query, key, value


def _as_linear(tensor: Tensor) -> Tensor:
    """The weight of a 1x1 convolution over positions as that of a linear layer; a bias as it is."""
    return tensor.flatten(1) if tensor.dim() > 1 else tensor
