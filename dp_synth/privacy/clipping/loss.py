"""What the engines ask of a loss and of its rows."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dp_synth.errors import UserError

RowLoss = Callable[..., Tensor]


def row_losses(loss: RowLoss, rows: Sequence[Tensor]) -> Tensor:
    """Return loss(*rows), one value per row.

    Raises:
        UserError: it is not [R], or does not depend on a trainable parameter.
    """
    losses = loss(*rows)
    if losses.shape != (len(rows[0]),):
        # Without the number of rows, which tells the size of a private batch.
        raise UserError("the loss must return one value per row, [R] for R rows")
    if not losses.requires_grad:
        raise UserError("the loss does not depend on any trainable parameter: nothing to clip")
    return losses


def count_examples(rows: Sequence[Tensor], multiplicity: int) -> int:
    """Return how many examples have `multiplicity` rows each.

    Raises:
        UserError: tensors of unlike length, or rows that do not divide into draws.
    """
    if multiplicity < 1:
        raise UserError(f"multiplicity must be at least 1, not {multiplicity}")
    lengths = {len(tensor) for tensor in rows}
    if len(lengths) != 1:
        raise UserError("rows must be one or more tensors of one common length")
    (length,) = lengths
    if length % multiplicity:
        raise UserError(f"rows do not divide into multiplicity={multiplicity} draws per example")
    return length // multiplicity
