"""Builds the class-conditional diffusers U-Net, carries public weights over, chooses what trains."""

from collections.abc import Mapping, Sequence
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
    refuse_unless_halved("model.network.block_out_channels", levels, height, width)
    return UNet2DModel(
        sample_size=(height, width),
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=num_classes + 1,
        **architecture,
    )


def refuse_unless_halved(what: str, levels: int, height: int, width: int) -> None:
    """UserError, naming what has the levels, unless an image can be halved from each to the next."""
    factor = 2 ** (levels - 1)
    if height % factor or width % factor:
        raise UserError(
            f"{what} has {levels} levels and needs images whose sides are multiples of {factor}; "
            f"these are {height}x{width}."
        )


@torch.no_grad()
def carry_over(
    prior: UNet2DModel,
    prior_classes: Sequence[str] | None,
    net: UNet2DModel,
    classes: Sequence[str],
) -> None:
    """Start a network from public weights.

    Everything but the label table is copied. A label's row is kept where a public class has the
    same name. Every other row, "no label" included, starts as what the public model does without a
    label: its own row for "no label"; the mean of its rows where it names no classes; zero, which
    changes nothing, where it has no labels.

    Args:
        prior: the public model. Where it predicts a variance too, in a second half of its output
            channels, these are left out.
        prior_classes: its classes in the order of its label table, whose last row then is "no
            label"; None where they are unknown, or there are no labels.
        net: changed in place.
        classes: of ``net``, in the order of its label table.

    Raises:
        UserError: the two networks differ in more than their label tables.
    """
    weights = dict(prior.state_dict())
    table = weights.pop("class_embedding.weight", None)
    if predicts_variance(prior.config):
        for name in ("conv_out.weight", "conv_out.bias"):
            weights[name] = weights[name][: net.config.out_channels]
    misfit = UserError(
        "The public model does not fit model.network: pre-train it with the same network."
    )
    try:
        missing, unexpected = net.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise misfit from error
    if unexpected or set(missing) != {"class_embedding.weight"}:
        raise misfit
    own_table = net.class_embedding.weight
    if table is None:
        own_table.zero_()
        return
    own_table[:] = table.mean(0) if prior_classes is None else table[len(prior_classes)]
    row_of = {name: row for row, name in enumerate(prior_classes or ())}
    for row, name in enumerate(classes):
        if name in row_of:
            own_table[row] = table[row_of[name]]


def predicts_variance(config: Mapping[str, Any]) -> bool:
    """Whether a ``UNet2DModel`` of this config predicts mean and variance (Nichol 2021)."""
    return config["out_channels"] == 2 * config["in_channels"]


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
