"""Builds the class-conditional diffusers U-Net, carries public weights over, chooses what trains."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

from dp_synth.errors import UserError

Trainable = str | Sequence[str]

# Fragments of the names of the parameters that each word makes trainable.
_TRAINABLE = {"all": ("",), "attention": ("attentions", "class_embedding")}


def unet(image_shape: tuple[int, int, int], num_classes: int, **architecture: Any) -> UNet2DModel:
    """A ``diffusers.UNet2DModel`` for images of one shape, conditioned on a class label.

    The label table has one row more than there are classes: row ``num_classes`` stands for "no
    label" and is what label dropout trains and classifier-free guidance reads.

    Args:
        image_shape: (C, H, W); read off the data, never configured.
        num_classes: number of classes.
        architecture: further arguments of ``diffusers.UNet2DModel``.

    Raises:
        UserError: the image cannot be halved once per level of the network.
    """
    channels, height, width = image_shape
    levels = len(architecture["block_out_channels"])
    factor = 2 ** (levels - 1)
    if height % factor or width % factor:
        raise UserError(
            f"model.network.block_out_channels has {levels} levels and needs images whose sides "
            f"are multiples of {factor}; these are {height}x{width}."
        )
    return UNet2DModel(
        sample_size=(height, width),
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=num_classes + 1,
        **architecture,
    )


@torch.no_grad()
def carry_over(
    prior: UNet2DModel, prior_classes: Sequence[str], net: UNet2DModel, classes: Sequence[str]
) -> None:
    """Start a network from public weights.

    Everything but the label table is copied. A label's row is kept where a public class has the
    same name, and so is the row for "no label"; the others stay as the network was initialised.

    Raises:
        UserError: the two networks differ in more than their label tables.
    """
    weights = dict(prior.state_dict())
    table = weights.pop("class_embedding.weight")
    try:
        missing, unexpected = net.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(
            "The public model does not fit model.network: pre-train it with the same network."
        ) from error
    if unexpected or set(missing) != {"class_embedding.weight"}:
        raise UserError(
            "The public model does not fit model.network: pre-train it with the same network."
        )
    own_table = net.class_embedding.weight
    row_of = {name: row for row, name in enumerate(prior_classes)}
    for row, name in enumerate(classes):
        if name in row_of:
            own_table[row] = table[row_of[name]]
    own_table[len(classes)] = table[len(prior_classes)]


def choose_trainable(net: nn.Module, trainable: Trainable) -> None:
    """Freeze what shall not be fine-tuned: what does not move needs no noise.

    Args:
        trainable: "all"; "attention" for attention layers and the label table; or fragments of
            parameter names, any of which makes a parameter trainable.

    Raises:
        UserError: an unknown word, or a fragment that no parameter's name contains.
    """
    names = [name for name, _ in net.named_parameters()]
    if isinstance(trainable, str) and trainable not in _TRAINABLE:
        raise UserError(
            f"model.trainable={trainable} is unknown; {', '.join(_TRAINABLE)} or a list of "
            "fragments of parameter names would work."
        )
    fragments = _TRAINABLE[trainable] if isinstance(trainable, str) else tuple(trainable)
    for fragment in fragments:
        if not any(fragment in name for name in names):
            raise UserError(
                f"model.trainable: no parameter's name contains {fragment!r}; names look like "
                f"{names[0]}."
            )
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(any(fragment in name for fragment in fragments))
