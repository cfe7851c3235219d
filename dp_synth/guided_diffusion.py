"""Files of OpenAI's guided-diffusion and improved-diffusion weights, read as diffusers' U-Net.

https://github.com/openai/guided-diffusion (Dhariwal and Nichol 2021, arXiv 2105.05233) and
https://github.com/openai/improved-diffusion (Nichol and Dhariwal 2021, arXiv 2102.09672).
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import Tensor

from dp_synth.errors import UserError
from dp_synth.guided_diffusion_layout import Layout, Weights, convert


class GuidedDiffusionWeights:
    """A ``.pt`` or ``.safetensors`` file of U-Net weights as either program saves them.

    Args:
        path: the file. Tensors are read from it and nothing else; nothing in it is run.
        attention_head_dim: channels of an attention head (``--num_head_channels``); None for a
            single head of all channels (``--num_heads 1``). diffusers has one width for all heads:
            a network with the same number of heads at levels of unlike widths cannot be expressed.
        use_new_attention_order: the flag of that name. The weights look the same either way.

    Raises:
        UserError: by every method, where the file is not such a network, or is one that diffusers
            cannot express.
    """

    def __init__(
        self, path: Path, attention_head_dim: int | None, use_new_attention_order: bool
    ) -> None:
        self.path = path
        self.attention_head_dim = attention_head_dim
        self.use_new_attention_order = use_new_attention_order

    def architecture(self) -> dict[str, Any]:
        """The arguments of ``diffusers.UNet2DModel`` that build this network; no image size."""
        layout = self._layout(self._read())
        return layout.architecture() | {"attention_head_dim": self.attention_head_dim}

    def network(self) -> UNet2DModel:
        """The network with its weights."""
        weights = self._read()
        layout = self._layout(weights)
        try:
            net = UNet2DModel(**layout.architecture(), attention_head_dim=self.attention_head_dim)
            net.load_state_dict(convert(weights, layout, self._heads, self.use_new_attention_order))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self._refusal("a weight is missing, left over or of another shape") from error
        return net

    def classes(self) -> None:
        """The weights name no classes."""

    def schedule(self) -> None:
        """The weights do not tell which diffusion process they were trained for."""

    def _heads(self, channels: int) -> int:
        return 1 if self.attention_head_dim is None else channels // self.attention_head_dim

    def _layout(self, weights: Weights) -> Layout:
        try:
            layout = Layout.of(weights)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._refusal(
                "it has no equal levels of res-blocks with a learned down- and up-sampler between"
            ) from error
        if len({layout.timestep_channels, layout.input_channels, layout.channels[0]}) > 1:
            raise self._refusal(
                f"its timesteps are embedded in {layout.timestep_channels} channels, and its first "
                f"level has {layout.channels[0]}: diffusers wants them equal"
            )
        for channels in layout.attention_channels():
            if self.attention_head_dim is not None and channels % self.attention_head_dim:
                raise UserError(
                    f"public.attention_head_dim={self.attention_head_dim} does not divide the "
                    f"{channels} channels that attention has in {self.path}; it is what the model "
                    "was trained with as --num_head_channels, or its channels by --num_heads."
                )
        return layout

    def _read(self) -> Weights:
        try:
            weights = _tensors(self.path)
        except Exception as error:  # whatever a damaged file makes the readers stumble over
            raise UserError(
                f"public.path={self.path} cannot be read as weights: it is damaged, or holds "
                "objects other than tensors, which are never loaded."
            ) from error
        if not isinstance(weights, Mapping) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
        ):
            raise self._refusal("it is not a flat table of named tensors")
        return weights

    def _refusal(self, reason: str) -> UserError:
        return UserError(
            f"public.path={self.path} is not a U-Net of guided-diffusion or improved-diffusion "
            f"that diffusers can express: {reason}."
        )


def _tensors(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    # A file that is mapped costs no memory until a weight is used; the oldest format cannot be.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
