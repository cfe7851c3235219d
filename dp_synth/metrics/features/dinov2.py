"""Features of a DINOv2 network: learnt without labels, from the model hub or from a folder."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from dp_synth.errors import UserError
from dp_synth.metrics.features.extraction import Features, in_colour, ready

_SIDE = 224
# Of ImageNet's pixels, 0..1, as the network was trained.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class _ClassToken(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(_STD)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        x = in_colour(pixels).float() / 255
        x = F.interpolate(x, (_SIDE, _SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        return self.network((x - self.mean) / self.std).last_hidden_state[:, 0]


def dinov2(model: str) -> Features:
    """Return the class token of a DINOv2 network (Oquab et al. 2023, arXiv 2304.07193).

    Frechet distances in it follow people's judgement of images better than FID does (Stein et al.
    2023, arXiv 2306.04675, who take the large network). Images are resized to 224x224 (bicubic,
    antialiased).

    Args:
        model: id on the Hugging Face hub, such as ``facebook/dinov2-large``, or a folder of the
            same format. Weights are read as safetensors; no code of the repository is run.

    Raises:
        UserError: transformers is not installed, or there is no such network.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise UserError(
            "evaluator.fidelity.features=[dinov2] needs a package: pip install transformers."
        ) from error
    try:
        network, report = AutoModel.from_pretrained(
            model, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"evaluator.fidelity.dinov2={model} could not be loaded ({_first_line(error)}); give "
            "the id of a DINOv2 network on the Hugging Face hub, or a folder that holds one."
        ) from error
    if not network.config.model_type.startswith("dinov2") or report["missing_keys"]:
        raise UserError(
            f"evaluator.fidelity.dinov2={model} is not a whole DINOv2 network; give one such as "
            "facebook/dinov2-large."
        )
    return Features(
        name="dinov2",
        label=f"DINOv2 features ({model})",
        num_features=network.config.hidden_size,
        network=ready(_ClassToken(network)),
        batch_size=64,
        fingerprint=f"dinov2 {_digest(network)}",
    )


def _digest(network: nn.Module) -> str:
    """Hash all weights: a hub id or a folder may hold others tomorrow."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
