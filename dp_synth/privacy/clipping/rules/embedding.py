"""Embedding tables: class labels, timesteps, tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_synth.privacy.clipping import book_keeping
from dp_synth.privacy.clipping.book_keeping import BookKept
from dp_synth.privacy.clipping.contributions import Dense
from dp_synth.privacy.clipping.recording import Call, Ways, by_example, recorded_call


@dataclass(frozen=True)
class Embedding:
    """y = W[index] for int64 index [R, *] and W [V, d]; the entry `padding_idx` is not trained."""

    padding_idx: int | None

    def forward(self, x: Tensor, weight: Tensor, bias: None) -> tuple[Tensor, tuple[Tensor, ...]]:
        return F.embedding(x, weight), ()

    def backward(self, call: Call, dy: Tensor, saved: tuple[Tensor, ...], needs_dx: bool) -> None:
        x, weight = saved
        rows = call.multiplicity * x.shape[1:].numel()
        few = book_keeping.pays_off(rows, *weight.shape)
        ways = weight_ways(x, dy, weight, self.padding_idx, call.multiplicity)
        call.add_weight(x, ways, default="book-keeping" if few else "tables")


def weight_ways(
    index: Tensor, dy: Tensor, weight: Tensor, padding_idx: int | None, multiplicity: int
) -> Ways:
    """The ways to the weight's gradients [b, V, d] from index [R, *] and dy [R, *, d].

    A table per example has b V d entries to clear; book-keeping, with inner products that are one
    for equal indices and zero for others, none.
    """
    ways: Ways = {
        "tables": lambda: Dense(table_grads(index, dy, weight, padding_idx, multiplicity))
    }
    if book_keeping.is_possible(dy, weight, rows=multiplicity * index.shape[1:].numel()):
        ways["book-keeping"] = lambda: _book_kept(index, dy, weight, padding_idx, multiplicity)
    return ways


def table_grads(
    index: Tensor, dy: Tensor, weight: Tensor, padding_idx: int | None, multiplicity: int
) -> Tensor:
    """Return [b, V, d]: dy added at each example's own copy of the table."""
    num_embeddings, width = weight.shape
    examples = len(index) // multiplicity
    example = torch.arange(examples, device=index.device).repeat(multiplicity)
    example = example.view(-1, *(1,) * (index.dim() - 1))
    grads = dy.new_zeros(examples * num_embeddings, width)
    grads.index_add_(0, (example * num_embeddings + index).flatten(), dy.reshape(-1, width))
    grads = grads.view(examples, num_embeddings, width)
    if padding_idx is not None:
        grads[:, padding_idx] = 0.0
    return grads


def _book_kept(
    index: Tensor, dy: Tensor, weight: Tensor, padding_idx: int | None, multiplicity: int
) -> BookKept:
    index_bn = by_example(index.unsqueeze(-1), multiplicity).squeeze(-1)
    equal = index_bn.unsqueeze(2) == index_bn.unsqueeze(1)
    if padding_idx is not None:
        equal &= (index_bn != padding_idx).unsqueeze(2)
    norms = book_keeping.squared_norms_of_products(
        equal.double(), book_keeping.inner_products(by_example(dy, multiplicity)), dy.dtype
    )

    def weight_grad(index: Tensor, dy: Tensor) -> Tensor:
        skipped = -1 if padding_idx is None else padding_idx
        return torch.ops.aten.embedding_dense_backward(
            dy, index, len(weight), skipped, scale_grad_by_freq=False
        )

    return BookKept(
        index,
        dy,
        norms,
        dense=lambda: table_grads(index, dy, weight, padding_idx, multiplicity),
        weight_grad=weight_grad,
    )


def recorded_embedding(layer: nn.Embedding, call: Call, index: Tensor) -> Tensor:
    """The layer's forward, recorded."""
    return recorded_call(Embedding(layer.padding_idx), call, index, layer.weight, None)
