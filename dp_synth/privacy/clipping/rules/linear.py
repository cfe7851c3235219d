"""Linear layers over any number of positions: attention projections, feed-forwards, LoRA factors."""

import torch.nn.functional as F
from torch import Tensor, nn

from dp_synth.privacy.clipping import book_keeping
from dp_synth.privacy.clipping.book_keeping import BookKept
from dp_synth.privacy.clipping.contributions import Product
from dp_synth.privacy.clipping.recording import (
    Call,
    UnsupportedInput,
    Ways,
    autocast,
    by_example,
    recorded_call,
    split_draws,
)


class Linear:
    """y = x W^T + b for x [R, *, d] and W [p, d]."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return F.linear(x, weight, bias), ()

    def backward(
        self, call: Call, dy: Tensor, saved: tuple[Tensor, ...], needs_dx: bool
    ) -> Tensor | None:
        x, weight = saved
        if call.wants("weight"):
            rows = call.multiplicity * x.shape[1:-1].numel()
            few = book_keeping.pays_off(rows, *weight.shape)
            ways = weight_ways(x, dy, weight, call.multiplicity)
            call.add_weight(x, ways, default="book-keeping" if few else "product")
        if call.wants("bias"):
            call.add("bias", bias_grads(dy, call.multiplicity))
        return dy @ weight if needs_dx else None


def weight_ways(x: Tensor, dy: Tensor, weight: Tensor, multiplicity: int) -> Ways:
    """The ways to the weight's gradients [b, p, d] from x [R, *, d] and dy [R, *, p].

    The product dy^T x of each example has the ordinary gradient's cost, F; with several positions
    and K > 1 it copies x and dy once, to bring an example's draws together.
    """
    x_bnd, dy_bnp = by_example(x, multiplicity), by_example(dy, multiplicity)
    product = Product(dy_bnp.transpose(1, 2), x_bnd)
    ways: Ways = {"product": lambda: product}
    if book_keeping.is_possible(x, weight, rows=x_bnd.shape[1]):
        ways["book-keeping"] = lambda: _book_kept(x, dy, x_bnd, dy_bnp, product)
    return ways


def _book_kept(x: Tensor, dy: Tensor, x_bnd: Tensor, dy_bnp: Tensor, product: Product) -> BookKept:
    norms = book_keeping.squared_norms_of_products(
        book_keeping.inner_products(x_bnd), book_keeping.inner_products(dy_bnp), dy.dtype
    )
    return BookKept(x, dy, norms, product.dense, _weight_grad)


def _weight_grad(x: Tensor, dy: Tensor) -> Tensor:
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)


def bias_grads(dy: Tensor, multiplicity: int) -> Tensor:
    """Return [b, p]: the sum of dy [R, *, p] over an example's draws and positions."""
    split = split_draws(dy, multiplicity)
    return split.sum([dim for dim in range(split.dim() - 1) if dim != 1])


def recorded_linear(layer: nn.Linear, call: Call, x: Tensor) -> Tensor:
    """The layer's forward, recorded."""
    if x.dim() < 2 or 0 in x.shape[1:]:
        raise UnsupportedInput("a linear layer of an input without features or positions")
    return recorded_call(Linear(), call, *autocast(x, layer.weight, layer.bias))
