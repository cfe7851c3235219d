"""Features of Inception-v3 with the weights in which FID, KID and Inception score are published."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dp_synth.errors import UserError
from dp_synth.metrics.features.extraction import Features, in_colour, ready

# The weights of Heusel et al. in torch-fidelity's format. The file's name ends in the first digits
# of its SHA-256; torch-fidelity and torchmetrics keep it under the same name.
_DIGITS = "6726825d"
_FILE = f"weights-inception-2015-12-05-{_DIGITS}.pth"
_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_FILE}"
_NUM_FEATURES = 2048


class _Pooled(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        (rows,) = self.network(in_colour(pixels))
        return rows


def inception(weights: str | Path | None = None) -> Features:
    """Return the 2048 pooled features of Inception-v3, as FID (arXiv 1706.08500) reads them.

    torch-fidelity's network resizes images to 299x299 as the original implementation did, so that
    distances compare with published ones. Grey images have three equal channels. The file is found,
    or downloaded, at once; published weights are read at the first use.

    Args:
        weights: a file of weights in torch-fidelity's format; None: torch's hub cache, and from
            the network if they are not there. With weights other than the published ones a
            Frechet distance is not called FID.

    Raises:
        UserError: torch-fidelity is not installed; the weights are not there and cannot be
            downloaded; a file that does not hold such weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            "evaluator.fidelity.features=[inception] needs a package: pip install torch-fidelity."
        ) from error
    path = Path(weights) if weights is not None else _downloaded()
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"evaluator.fidelity.inception_weights={path} cannot be read ({error.strerror})."
        ) from error
    published = digest.startswith(_DIGITS)
    network = cache(partial(_read, path, FeatureExtractorInceptionV3))
    if not published:
        network()  # Nobody vouches for the file: what it holds is to be known at once.

    def logits(rows: npt.NDArray[np.float32]) -> Tensor:
        # Without the bias, as the Inception score is published.
        return torch.tensor(rows) @ network().fc.weight.detach().cpu().T

    return Features(
        name="inception",
        label="Inception-v3 features" if published else "features of a given Inception-v3",
        num_features=_NUM_FEATURES,
        load=lambda: ready(_Pooled(network())),
        batch_size=64,
        fingerprint=f"inception {digest}",
        frechet_name="fid" if published else "frechet",
        logits=logits,
    )


def _read(path: Path, architecture: Callable[..., Any]) -> Any:
    """Return torch-fidelity's network with the weights in a file.

    Raises:
        UserError: a file that does not hold such weights.
    """
    try:
        # torch-fidelity would unpickle whatever the file holds; what it gets was read safely.
        buffer = io.BytesIO()
        torch.save(torch.load(path, map_location="cpu", weights_only=True), buffer)
        buffer.seek(0)
        return architecture("inception", ["2048"], buffer)
    except (RuntimeError, UnpicklingError, EOFError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} does not hold weights of Inception-v3 in torch-fidelity's format; they are "
            f"published at {_URL}."
        ) from error


def _downloaded() -> Path:
    """Return the published weights in torch's hub cache, from the network if they are not there.

    Raises:
        UserError: they are not there, and the network does not give them.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / _FILE
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(_URL, str(path), hash_prefix=_DIGITS)
    except (OSError, RuntimeError) as error:  # RuntimeError: not the file that was asked for
        raise UserError(
            f"the weights of Inception-v3 could not be downloaded ({error}); get {_URL} where "
            "there is a network and give evaluator.fidelity.inception_weights=FILE, or do without "
            "FID: evaluator.fidelity.features=[efficientnet_lite0]."
        ) from error
    return path
