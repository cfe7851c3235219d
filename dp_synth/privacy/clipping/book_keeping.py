"""Clipping a wide layer with few rows without ever writing its per-example gradients out.

A layer's weight gradient is g_i = sum_n dy_n x_n^T over the N rows (draws and positions) of example
i, so that

    ||g_i||^2 = sum_nm <x_n, x_m> <dy_n, dy_m>    and    sum_i c_i g_i = sum_i sum_n (c_i dy_n) x_n^T:

the norm from two N x N matrices of inner products (Goodfellow 2015, arXiv 1510.01799), the sum as an
ordinary weight gradient of scaled rows, whose activations were kept ("book-keeping", Bu et al. 2023,
arXiv 2210.00038). That costs 2 N^2 (p + d) multiplications beside the ordinary 2 N p d, and no
memory per example. So it is for wide layers with few rows; with many draws N is seldom small.

What is added is computed after the norm is known, so both must be exact, or a contribution could
exceed the bound: inner products are taken in float64, since a gradient may be a small difference of
large terms, and norms are rounded up by what the sum may be off; scaled rows are float32 at least, since half precision would round them once more. Where
a device multiplies float32 in TF32, other ways are left.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dp_synth.privacy.clipping.contributions import Contribution

# Beyond this many rows the matrices of inner products outgrow any gradient they could replace.
_MOST_ROWS = 512
# What the weighted sum is allowed to be off by, in unit roundoffs of its terms.
_ROUNDOFFS = 2.0


class BookKept(Contribution):
    """Per-example gradients known by their norms and their weighted sum.

    Args:
        squared_norms: float64 [b].
        dense: writes the gradients out after all, for a parameter that is used again.
        weighted_sum: float64 factors [b] -> the weight gradient of rows scaled by them.
    """

    def __init__(
        self,
        squared_norms: Tensor,
        dense: Callable[[], Tensor],
        weighted_sum: Callable[[Tensor], Tensor],
    ) -> None:
        self._squared_norms = squared_norms
        self._dense = dense
        self._weighted_sum = weighted_sum

    def dense(self) -> Tensor:
        return self._dense()

    def squared_norms(self) -> Tensor:
        return self._squared_norms

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return self._weighted_sum(factors)


def is_possible(x: Tensor, rows: int) -> bool:
    """Whether layers with input `x` and `rows` rows per example, N, can be book-kept exactly."""
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    is_rounded = tf32 and x.device.type == "cuda" and x.dtype != torch.float64
    return rows <= _MOST_ROWS and not is_rounded


def pays_off(rows: int, out_features: int, in_features: int) -> bool:
    """A rule of thumb, for where nothing has been measured: N^2 well below p d."""
    return 8 * rows**2 <= out_features * in_features


def inner_products(rows_bnd: Tensor) -> Tensor:
    """Return all inner products of each example's rows, float64 [b, N, N] from [b, N, d]."""
    rows = rows_bnd.double()
    return torch.bmm(rows, rows.transpose(1, 2))


def squared_norms(x_bnn: Tensor, dy_bnn: Tensor, dtype: torch.dtype) -> Tensor:
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


def full_precision(rows: Tensor) -> Tensor:
    """Return rows in float32 at least."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def scale_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """Scale draw-major `rows` [K * b, ...] by their examples' finite `factors` [b], unrounded."""
    rows = full_precision(rows)
    by_row = factors.to(rows.dtype).repeat(len(rows) // len(factors))
    return rows * by_row.view(-1, *(1,) * (rows.dim() - 1))
