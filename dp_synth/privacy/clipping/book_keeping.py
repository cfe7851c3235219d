"""Clipping a wide layer with few rows without ever writing its per-example gradients out.

A layer's weight gradient is g_i = sum_n dy_n x_n^T over the N rows (draws and positions) of example
i, so that

    ||g_i||^2 = sum_nm <x_n, x_m> <dy_n, dy_m>,    sum_i c_i g_i = sum_i sum_n (c_i dy_n) x_n^T:

the norm from two N x N matrices of inner products (Goodfellow 2015, arXiv 1510.01799), the sum as an
ordinary weight gradient of scaled rows, whose activations were kept ("book-keeping", Bu et al. 2023,
arXiv 2210.00038). That costs 2 N^2 (p + d) multiplications beside the ordinary 2 N p d, and no
memory per example. So it is for wide layers with few rows; with many draws N is seldom small.

What is added is computed after the norm is known, so both must be exact, or a contribution could
exceed the bound: inner products are taken in float64, since a gradient may be a small difference of
large terms, and norms are rounded up by what the sum may be off; scaled rows are float32 at least,
since half precision would round them once more. Where a device multiplies float32 in TF32, other
ways are left.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dp_synth.privacy.clipping.contributions import Contribution

# What the weighted sum is allowed to be off by, in unit roundoffs of its terms.
_ROUNDOFFS = 2.0


class BookKept(Contribution):
    """Per-example gradients known by their norms and their weighted sum.

    Args:
        x: the layer's input rows [K * b, ...], draw-major.
        dy: the gradient of its output rows.
        squared_norms: float64 [b].
        dense: writes the gradients out after all, for a parameter that is used again.
        weight_grad: rows x and scaled dy, float32 at least -> the ordinary weight gradient.
    """

    def __init__(
        self,
        x: Tensor,
        dy: Tensor,
        squared_norms: Tensor,
        dense: Callable[[], Tensor],
        weight_grad: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self._x = x
        self._dy = dy
        self._squared_norms = squared_norms
        self._dense = dense
        self._weight_grad = weight_grad

    def dense(self) -> Tensor:
        return self._dense()

    def squared_norms(self) -> Tensor:
        return self._squared_norms

    def weighted_sum(self, factors: Tensor, some_left_out: bool) -> Tensor:
        x, dy = _full_precision(self._x), _full_precision(self._dy)
        if some_left_out:
            x, dy = _zero_where(factors == 0, x), _zero_where(factors == 0, dy)
        by_row = factors.to(dy.dtype).repeat(len(dy) // len(factors))
        return self._weight_grad(x, dy * by_row.view(-1, *(1,) * (dy.dim() - 1)))


def _full_precision(rows: Tensor) -> Tensor:
    """Return rows in float32 at least; indices stay as they are."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def _zero_where(examples: Tensor, rows: Tensor) -> Tensor:
    """Clear draw-major rows [K * b, ...] of `examples` [b]: zero times NaN would be NaN."""
    by_row = examples.repeat(len(rows) // len(examples))
    return rows.masked_fill(by_row.view(-1, *(1,) * (rows.dim() - 1)), 0)


def is_possible(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether a layer with input `x` and `rows` rows per example, N, can be book-kept.

    It must be exact, and its inner products, a few matrices of N^2 in float64, must take no more
    memory than twice the gradient that they replace.
    """
    is_rounded = x.dtype != torch.float64 and multiplies_in_tf32(x.device)
    return 4 * rows**2 <= weight.numel() and not is_rounded


def multiplies_in_tf32(device: torch.device) -> bool:
    """Whether `device` rounds float32 factors to TF32."""
    if device.type != "cuda":
        return False
    try:
        return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by the newer interface, beside which the old one cannot be read
        return True


def pays_off(rows: int, out_features: int, in_features: int) -> bool:
    """A rule of thumb, for where nothing has been measured: N^2 well below p d."""
    return 8 * rows**2 <= out_features * in_features


def inner_products(rows_bnd: Tensor) -> Tensor:
    """Return all inner products of each example's rows, float64 [b, N, N] from [b, N, d]."""
    rows = rows_bnd.double()
    return torch.bmm(rows, rows.transpose(1, 2))


def squared_norms_of_products(x_bnn: Tensor, dy_bnn: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ||g_i||^2, float64 [b], from both matrices of inner products, rounded up.

    A sum of products in `dtype` is off by up to about its unit roundoff times sum_n ||x_n||
    ||dy_n||, which is far more than that of ||g_i|| where the terms cancel. A bound on what will be
    added must allow for it.
    """
    examples = len(x_bnn)
    products = torch.bmm(x_bnn.reshape(examples, 1, -1), dy_bnn.reshape(examples, -1, 1))
    # Rounding may leave a tiny negative number where the gradient is zero.
    norms = products.flatten().clamp(min=0.0).sqrt()
    terms = (x_bnn.diagonal(dim1=1, dim2=2) * dy_bnn.diagonal(dim1=1, dim2=2)).sqrt().sum(1)
    roundoff = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    return (norms + _ROUNDOFFS * roundoff * terms).square()
