"""Lets ``import torchvision`` succeed where its compiled part does not fit the installed torch.

PyPI's torchvision wheels are linked against CUDA. Beside a CPU build of torch their library cannot
be loaded, and torchvision then dies while it registers fake kernels for operators that were never
defined (pytorch/vision#9085); lightning and torchmetrics import torchvision and die with it.
Declaring the operators is enough: transforms, data sets and models are pure Python.
"""

import importlib.util
from pathlib import Path

import torch

# The operators for which torchvision registers fake kernels without checking that they exist.
_NMS_LIKE = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def make_torchvision_importable() -> bool:
    """Declare torchvision's unloadable operators; must run before torchvision is imported.

    Returns:
        True if operators were declared, False if nothing had to be done: torchvision is absent,
        or its library loads.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _library_loads(Path(spec.origin).parent):
        return False
    for name in _NMS_LIKE:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", _SCHEMA)
    return True


def _library_loads(package: Path) -> bool:
    libraries = list(package.glob("_C*.so")) + list(package.glob("_C*.pyd"))
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        return False
    return True
