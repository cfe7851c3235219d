"""Features of a DINOv2 network: learnt without labels, from the model hub or from a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
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
    antialiased). Its files are found, or downloaded, at once; weights are read at the first use.

    Args:
        model: id on the Hugging Face hub, such as ``facebook/dinov2-large``, or a folder of the
            same format. Weights are read as safetensors; no code of the repository is run.

    Raises:
        UserError: transformers is not installed, or there is no such network.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UserError(
            "evaluator.fidelity.features=[dinov2] needs a package: pip install transformers."
        ) from error
    try:
        folder = _folder(model)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_be_loaded(model, error) from error
    weights = sorted(folder.glob("*.safetensors"))
    if not config.model_type.startswith("dinov2") or not weights:
        raise _not_whole(model)
    return Features(
        name="dinov2",
        label=f"DINOv2 features ({model})",
        num_features=config.hidden_size,
        load=partial(_read, model, folder),
        batch_size=64,
        fingerprint=f"dinov2 {_digest([folder / 'config.json', *weights])}",
    )


def _folder(model: str) -> Path:
    """Return the folder of a network: the one that is named, or the hub's in its cache."""
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, allow_patterns=["config.json", "*.safetensors*"]))


def _read(model: str, folder: Path) -> nn.Module:
    """Read the network.

    Raises:
        UserError: files that are damaged, or of another network.
    """
    from transformers import AutoModel

    try:
        network, report = AutoModel.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_be_loaded(model, error) from error
    if report["missing_keys"]:
        raise _not_whole(model)
    return ready(_ClassToken(network))


def _digest(files: Sequence[Path]) -> str:
    """Hash what the features depend on: a hub id or a folder may hold others tomorrow."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _cannot_be_loaded(model: str, error: Exception) -> UserError:
    return UserError(
        f"evaluator.fidelity.dinov2={model} could not be loaded ({_first_line(error)}); give the id "
        "of a DINOv2 network on the Hugging Face hub, or a folder that holds one."
    )


def _not_whole(model: str) -> UserError:
    return UserError(
        f"evaluator.fidelity.dinov2={model} is not a whole DINOv2 network; give one such as "
        "facebook/dinov2-large."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
