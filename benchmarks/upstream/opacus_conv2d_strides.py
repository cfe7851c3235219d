"""Opacus 1.6.0: Conv2d's per-sample gradients are wrong where its input is not NCHW-contiguous.

``opacus.utils.tensor_utils.unfold2d`` takes the last two strides to be those of a contiguous tensor.
In ghost mode the norm is wrong and the gradient is not, so a clipped sample adds more than its bound.
Needs opacus only. Exits with 0 if the fault is there, with 1 if it has been fixed.
"""

import sys

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

torch.manual_seed(0)
# One sample: autograd's gradient is its own.
x = torch.randn(1, 3, 8, 8, requires_grad=True).to(memory_format=torch.channels_last)

hooks = GradSampleModule(torch.nn.Conv2d(3, 4, 3, bias=False), loss_reduction="sum")
hooks(x).square().sum().backward()
weight = next(hooks.parameters())
error = ((weight.grad_sample.sum(0) - weight.grad).norm() / weight.grad.norm()).item()

ghost = GradSampleModuleFastGradientClipping(
    torch.nn.Conv2d(3, 4, 3, bias=False), loss_reduction="sum", max_grad_norm=1.0
)
losses = ghost(x).square().flatten(1).sum(1)
optimizer = torch.optim.SGD(ghost.parameters())
DPTensorFastGradientClipping(ghost, optimizer, losses, "sum").backward()
contribution = next(ghost.parameters()).grad.norm().item()

faulty = error > 1e-4
print(
    f"{'REPRODUCED' if faulty else 'FIXED'}: grad_sample is off by {error:.2g} of autograd's "
    f"gradient; ghost clipping to 1.0 adds a gradient of norm {contribution:.4g}"
)
sys.exit(0 if faulty else 1)
