"""The per-example loop: plain autograd, one example's draws per backward, for any network."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dp_synth.privacy.clipping.contributions import Dense
from dp_synth.privacy.clipping.gradients import ExampleGradients, FlatLayout
from dp_synth.privacy.clipping.loss import RowLoss, row_losses


def example_gradient(
    layout: FlatLayout, loss: RowLoss, draws: Sequence[Tensor], draws_at_once: int, matrix: Tensor
) -> ExampleGradients:
    """Return the gradient of the mean loss over one example's draws, written to `matrix` [1, size].

    Args:
        layout: the trainable parameters.
        loss: rows -> one loss per row.
        draws: tensors whose leading dimension is the K draws of one example.
        draws_at_once: draws per backward, at most; the parts are added before anything is clipped.
        matrix: memory to use.
    """
    multiplicity = len(draws[0])
    grads = ExampleGradients(layout, matrix)
    backwards = -(-multiplicity // draws_at_once)
    for rows in zip(*(tensor.tensor_split(backwards) for tensor in draws), strict=True):
        losses = row_losses(loss, rows)
        with torch.autocast(losses.device.type, enabled=False):
            parts = torch.autograd.grad(
                losses.sum() / multiplicity, layout.params, allow_unused=True
            )
        for param, part in zip(layout.params, parts, strict=True):
            if part is not None:
                dense = part.to_dense() if part.is_sparse else part
                grads.add(param, Dense(dense.unsqueeze(0)))
    return grads
