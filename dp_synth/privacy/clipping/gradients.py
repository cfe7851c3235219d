"""Per-example gradients side by side: their norms, and their clipped sum.

The engine's clipping is here, and its factors serve every engine. For examples i = 0..b-1 with
gradients g_i (each already the mean over the K draws of its example) the clipped sum is

    sum_i c_i g_i,    c_i = min(1, max_grad_norm / ||g_i||)    (or automatic, see `clip_factors`),

so that no example moves the sum by more than `max_grad_norm` in L2 norm. With the gradients as rows
of a matrix G [b, P], that is one pass for the norms and one matrix-vector product, G^T c. Parameters
whose gradients are book-kept have no columns in G; they add to the norms and to the sum.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dp_synth.privacy.clipping.book_keeping import BookKept
from dp_synth.privacy.clipping.contributions import SEGMENT, Contribution, Dense, squared_norms

Clipping = Literal["flat", "automatic"]
CLIPPINGS: tuple[Clipping, ...] = ("flat", "automatic")

# The stability constant of automatic clipping, as its authors set it.
_AUTOMATIC_GAMMA = 0.01
# Factors are smaller than they need be by this much, so that the rounding of a float32 factor,
# norm, product or sum does not carry a contribution over the bound.
_MARGIN = {
    torch.float64: 2.0**-42,
    torch.float32: 2.0**-21,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def clip_factors(
    norms: Tensor, max_grad_norm: float, clipping: Clipping, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the factor c_i by which each example's gradient enters the sum, float64 [b].

    c_i ||g_i|| never exceeds `max_grad_norm`. An example whose norm is not finite, or more than
    1e38 times the bound, gets zero: otherwise one broken image would turn the whole sum into NaN,
    and its presence would show.

    Args:
        norms: ||g_i||, float64 [b], each >= 0 or not finite.
        max_grad_norm: the bound C, > 0.
        clipping: "flat" is min(1, C / ||g_i||); "automatic" is C / (||g_i|| + 0.01), which brings
            every gradient well above 0.01 to about the bound (Bu et al. 2022, arXiv 2206.07136,
            AUTO-S).
        dtype: the coarsest type that a gradient is rounded to; a clipped gradient is held below the
            bound by the rounding of that type (relative 2.3e-13 in float64, 4.8e-7 in float32).
    """
    bound = max_grad_norm * (1 - _MARGIN[dtype])
    if clipping == "automatic":
        factors = bound / (norms + _AUTOMATIC_GAMMA)
    else:
        factors = torch.where(norms <= bound, 1.0, bound / norms)
    # A factor that single precision holds with few digits would be rounded by more than the margin.
    is_normal = factors >= torch.finfo(torch.float32).tiny
    return factors.where(norms.isfinite() & is_normal, 0.0)


class FlatLayout:
    """Where each trainable parameter lies in a flat vector.

    Stored parameters come first, `stored_size` entries of a whole number of norm segments; then
    those that are book-kept; `size` entries in all. `largest` is the
    number of entries of the largest parameter. The type is float64 if any parameter is
    float64, else float32: half precision gradients are summed in float32.
    `coarsest` is the parameters' type with the fewest digits.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], book_kept: Sequence[nn.Parameter] = ()
    ) -> None:
        self.params = tuple(params)
        kept = {id(param) for param in book_kept}
        stored = [param for param in self.params if id(param) not in kept]
        self._offset: dict[int, int] = {}
        self.largest = max(param.numel() for param in self.params)
        end = self._place(stored, 0)
        self.stored_size = -(-end // SEGMENT) * SEGMENT
        end = self._place([param for param in self.params if id(param) in kept], self.stored_size)
        self.size = -(-end // SEGMENT) * SEGMENT
        double = any(param.dtype == torch.float64 for param in self.params)
        self.dtype = torch.float64 if double else torch.float32
        self.coarsest = max(
            (param.dtype for param in self.params), key=lambda dtype: torch.finfo(dtype).eps
        )
        self.device = self.params[0].device

    def _place(self, params: Sequence[nn.Parameter], start: int) -> int:
        for param in params:
            self._offset[id(param)] = start
            start += param.numel()
        return start

    def __contains__(self, param: object) -> bool:
        return id(param) in self._offset

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros of the layout's type and device."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def holds(self, flat: Tensor, param: nn.Parameter) -> bool:
        """Whether `flat` [..., columns] is wide enough to hold `param`."""
        return self._offset[id(param)] + param.numel() <= flat.shape[-1]

    def view(self, flat: Tensor, param: nn.Parameter) -> Tensor:
        """View `param`'s part of `flat` [..., columns] as [..., *param.shape]."""
        start = self._offset[id(param)]
        part = flat[..., start : start + param.numel()]
        return part.view(*flat.shape[:-1], *param.shape)

    def rearrange(self, flat: Tensor, other: "FlatLayout") -> Tensor:
        """Return `flat` [size] as `other`, a layout of the same parameters, arranges it."""
        arranged = other.zeros(other.size)
        for param in self.params:
            other.view(arranged, param).copy_(self.view(flat, param))
        return arranged

    def add_to_grads(self, flat: Tensor) -> None:
        """Add `flat` [size] to each parameter's `.grad`; where there is none, it becomes a view."""
        for param in self.params:
            part = self.view(flat, param)
            if param.grad is not None:
                param.grad.add_(part)
            else:
                param.grad = part.to(param.dtype)


class ExampleGradients:
    """The gradients of b examples: one row each of a matrix that outlives them, or book-kept.

    Args:
        layout: which columns belong to which parameter.
        matrix: [b, columns]; its old content is ignored, except that the padding must be zero. A
            parameter beyond its columns is held as what its layer contributed.
    """

    def __init__(self, layout: FlatLayout, matrix: Tensor) -> None:
        self._layout = layout
        self._matrix = matrix
        self._written: set[int] = set()
        self._held: dict[nn.Parameter, Contribution] = {}

    @property
    def book_kept(self) -> list[nn.Parameter]:
        """The parameters whose gradients are not written out."""
        return [param for param, held in self._held.items() if isinstance(held, BookKept)]

    def __len__(self) -> int:
        return len(self._matrix)

    def wants(self, param: object) -> bool:
        """Whether `param` is trained, so that its gradients are to be added."""
        return param in self._layout

    def memory_for(self, param: nn.Parameter) -> Tensor:
        """Return memory [b, *param.shape] of the type in which gradients are written out."""
        return self._matrix.new_empty(len(self._matrix), *param.shape)

    def add(self, param: nn.Parameter, contribution: Contribution) -> None:
        """Add a layer's part; a module called twice adds twice, before any norm."""
        if self._layout.holds(self._matrix, param):
            # Writing the first part saves clearing the matrix.
            first = id(param) not in self._written
            contribution.write(self._layout.view(self._matrix, param), first)
            self._written.add(id(param))
        elif param in self._held:
            # The norm of a sum is not known from the parts' norms.
            self._held[param] = self._written_out(self._held[param], contribution)
        elif isinstance(contribution, BookKept):
            self._held[param] = contribution
        else:
            self._held[param] = self._written_out(contribution)

    def _written_out(self, *contributions: Contribution) -> Dense:
        """Add contributions up; in the layout's type, for a norm of the very numbers summed."""
        parts = [part.dense().to(self._layout.dtype) for part in contributions]
        return Dense(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])

    @torch.no_grad()
    def add_clipped_sum(self, total: Tensor, max_grad_norm: float, clipping: Clipping) -> Tensor:
        """Add sum_i c_i g_i to `total` [layout.size], with c_i as `clip_factors` gives them.

        Returns:
            The norms ||g_i||, float64 [b].
        """
        # Autocast would round what the norm has been taken of.
        with torch.autocast(total.device.type, enabled=False):
            self._clear_unwritten()
            norms = self.norms()
            factors = clip_factors(norms, max_grad_norm, clipping, self._layout.coarsest)
            some_left_out = bool((factors == 0).any())
            if some_left_out:
                self._matrix[factors == 0] = 0.0  # a factor of zero would not do: 0 * NaN is NaN
            columns = self._matrix.shape[1]
            total[:columns].addmv_(self._matrix.t(), factors.to(self._matrix.dtype))
            for param, contribution in self._held.items():
                self._layout.view(total, param).add_(
                    contribution.weighted_sum(factors, some_left_out)
                )
        return norms

    def norms(self) -> Tensor:
        """Return the L2 norms ||g_i|| in float64, [b]."""
        squares = squared_norms(self._matrix)
        for contribution in self._held.values():
            squares = squares + contribution.squared_norms()
        return squares.sqrt()

    def _clear_unwritten(self) -> None:
        for param in self._layout.params:
            if self._layout.holds(self._matrix, param) and id(param) not in self._written:
                self._layout.view(self._matrix, param).zero_()
