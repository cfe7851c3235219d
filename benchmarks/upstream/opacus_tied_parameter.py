"""Opacus 1.6.0: ghost clipping refuses a network that calls one of its layers twice.

diffusers' ``DiTTransformer2DModel`` does: its output layer calls the first block's ``norm1.emb`` once
more, so that no DiT trains with ghost clipping. Hooks mode adds both calls up and is right.
Needs opacus only. Exits with 0 if the fault is there, with 1 if it has been fixed.
"""

import sys

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping


class CallsTwice(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(super().forward(x))


x = torch.randn(1, 3, requires_grad=True)  # one sample: autograd's gradient is its own
hooks = GradSampleModule(CallsTwice(torch.nn.Linear(3, 3)), loss_reduction="sum")
hooks(x).square().sum().backward()
weight = next(hooks.parameters())
error = ((weight.grad_sample.sum(0) - weight.grad).norm() / weight.grad.norm()).item()

ghost = GradSampleModuleFastGradientClipping(CallsTwice(torch.nn.Linear(3, 3)))
try:
    ghost(x).square().sum().backward()
    refusal = None
except NotImplementedError as raised:
    refusal = str(raised)

verdict = f"REPRODUCED: ghost mode raises {refusal!r}" if refusal else "FIXED: ghost mode runs"
print(f"{verdict}; hooks mode is off by {error:.2g} of autograd's gradient")
sys.exit(0 if refusal else 1)
