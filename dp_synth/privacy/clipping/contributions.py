"""What one layer contributes to the per-example gradients of one parameter.

A contribution stands for gradients [b, *shape], one per example, in the form in which the layer
found them cheapest. Most are written out side by side; a book-kept one (``book_keeping``) never is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

# A float32 norm over a million entries loses four digits on a CPU, and over four thousand equal
# ones two. Norms of short segments, combined in float64, lose none, and cost the same.
SEGMENT = 256


class Contribution(ABC):
    """Gradients [b, *shape] of b examples for one parameter."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the gradients themselves."""

    def write(self, memory: Tensor, first: bool) -> None:
        """Write the gradients to `memory` [b, *shape], or add them to what it holds already."""
        if first:
            memory.copy_(self.dense())
        else:
            memory.add_(self.dense())

    def squared_norms(self) -> Tensor:
        """Return each example's squared L2 norm, float64 [b]."""
        return squared_norms(self.dense().flatten(1))

    def weighted_sum(self, factors: Tensor, some_left_out: bool) -> Tensor:
        """Return sum_i factors_i g_i, [*shape].

        Args:
            factors: finite, float64 [b].
            some_left_out: whether some are zero, whose gradients may be not finite.
        """
        grads = self.dense()
        flat = grads.flatten(1)
        if some_left_out:  # 0 * NaN would be NaN
            flat = flat.masked_fill((factors == 0).unsqueeze(1), 0.0)
        return torch.mv(flat.t(), factors.to(flat.dtype)).view(grads.shape[1:])


class Dense(Contribution):
    """Gradients at hand, of any floating point type."""

    def __init__(self, grads: Tensor) -> None:
        self._grads = grads

    def dense(self) -> Tensor:
        return self._grads


class Product(Contribution):
    """One matrix product per example, left [b, p, n] times right [b, n, d]; made where it goes."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left = left
        self._right = right

    def dense(self) -> Tensor:
        return torch.bmm(self._left, self._right)

    def write(self, memory: Tensor, first: bool) -> None:
        if self._left.dtype != memory.dtype:  # half precision products, full precision sums
            super().write(memory, first)
        elif first:
            torch.bmm(self._left, self._right, out=memory)
        else:
            memory.baddbmm_(self._left, self._right)


class OneByOne(Contribution):
    """Gradients computed example by example, each when it is written."""

    def __init__(self, examples: int, gradient: Callable[[int], Tensor]) -> None:
        self._examples = examples
        self._gradient = gradient

    def dense(self) -> Tensor:
        return torch.stack([self._gradient(i) for i in range(self._examples)])

    def write(self, memory: Tensor, first: bool) -> None:
        for i in range(self._examples):
            Dense(self._gradient(i)).write(memory[i], first)


def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared L2 norm of each of `rows` [b, n], in float64."""
    count = rows.shape[1] // SEGMENT
    whole, rest = rows[:, : count * SEGMENT], rows[:, count * SEGMENT :]
    segments = torch.linalg.vector_norm(whole.unflatten(1, (count, SEGMENT)), dim=2).double()
    return segments.square().sum(1) + torch.linalg.vector_norm(rest, dim=1).double().square()
