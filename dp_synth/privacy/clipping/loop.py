"""The per-example loop: plain autograd, one example's draws per backward, for any network."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dp_synth.errors import UserError
from dp_synth.privacy.clipping.contributions import Dense
from dp_synth.privacy.clipping.gradients import ExampleGradients, FlatLayout

RowLoss = Callable[..., Tensor]


def row_losses(loss: RowLoss, rows: Sequence[Tensor]) -> Tensor:
    """Return loss(*rows), one value per row.

    Raises:
        UserError: it is not [R], or does not depend on a trainable parameter.
    """
    losses = loss(*rows)
    if losses.shape != (len(rows[0]),):
        raise UserError(
            f"the loss must return one value per row, shape ({len(rows[0])},),"
            f" not {tuple(losses.shape)}"
        )
    if not losses.requires_grad:
        raise UserError("the loss does not depend on any trainable parameter: nothing to clip")
    return losses


def example_gradient(
    layout: FlatLayout, loss: RowLoss, draws: Sequence[Tensor], step: int, matrix: Tensor
) -> ExampleGradients:
    """Return the gradient of the mean loss over one example's draws, written to `matrix` [1, size].

    Args:
        layout: the trainable parameters.
        loss: rows -> one loss per row.
        draws: tensors whose leading dimension is the K draws of one example.
        step: draws per backward, at most; the parts are added before anything is clipped.
        matrix: memory to use.
    """
    multiplicity = len(draws[0])
    grads = ExampleGradients(layout, matrix)
    backwards = -(-multiplicity // step)
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
