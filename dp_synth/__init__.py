"""Differentially private diffusion models that turn private images into synthetic data sets.

The method is Ghalebikesabi et al. 2023, "Differentially private diffusion models generate useful
synthetic images" (arXiv 2302.13861). Commands: ``python -m dp_synth.train`` and its siblings.
"""

from dp_synth.torchvision_shim import make_torchvision_importable

__version__ = "0.1.0"

# Before anything imports lightning or torchmetrics, which import torchvision where it is installed.
make_torchvision_importable()
