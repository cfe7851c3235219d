"""Per-example gradients side by side in one matrix: their norms, and their clipped sum.

The arithmetic of the mechanism is here and nowhere else. For examples i = 0..b-1 with gradients g_i
(each already the mean over the K draws of its example) the clipped sum is

    sum_i c_i g_i,    c_i = min(1, max_grad_norm / ||g_i||),

so that no example moves the sum by more than `max_grad_norm` in L2 norm. With the gradients as rows
of a matrix G [b, P], that is one pass for the norms and one matrix-vector product, G^T c.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# A float32 norm over a million entries loses four digits on a CPU. Norms of short segments,
# combined in float64, lose none, and cost the same.
_SEGMENT = 4096


class FlatLayout:
    """Where each trainable parameter lies in a flat vector.

    `size` is padded with zeros to a whole number of norm segments. The type is float64 if any
    parameter is float64, else float32: half precision gradients are summed in float32.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = tuple(params)
        self._offset: dict[int, int] = {}
        end = 0
        for param in self.params:
            self._offset[id(param)] = end
            end += param.numel()
        self.size = -(-end // _SEGMENT) * _SEGMENT
        double = any(param.dtype == torch.float64 for param in self.params)
        self.dtype = torch.float64 if double else torch.float32
        self.device = self.params[0].device

    def __contains__(self, param: object) -> bool:
        return id(param) in self._offset

    def zeros(self, *leading: int) -> Tensor:
        """Return zeros [*leading, size]."""
        return torch.zeros(*leading, self.size, dtype=self.dtype, device=self.device)

    def view(self, flat: Tensor, param: nn.Parameter) -> Tensor:
        """View `param`'s part of `flat` [..., size] as [..., *param.shape]."""
        start = self._offset[id(param)]
        part = flat[..., start : start + param.numel()]
        return part.view(*flat.shape[:-1], *param.shape)

    def add_to_grads(self, flat: Tensor) -> None:
        """Add `flat` [size] to each parameter's `.grad`, which is made where it is None."""
        for param in self.params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            param.grad.add_(self.view(flat, param))


class ExampleGradients:
    """The gradients of b examples, one row each, in a matrix that outlives them.

    Args:
        layout: which columns belong to which parameter.
        matrix: [b, layout.size]; its old content is ignored, except that the padding must be zero.
    """

    def __init__(self, layout: FlatLayout, matrix: Tensor) -> None:
        self._layout = layout
        self._matrix = matrix
        self._written: set[int] = set()

    def __len__(self) -> int:
        return len(self._matrix)

    def wants(self, param: object) -> bool:
        """Whether `param` is trained, so that its gradients are to be added."""
        return param in self._layout

    def add(self, param: nn.Parameter, grads: Tensor) -> None:
        """Add `grads` [b, *param.shape]; a module called twice adds twice, before any norm."""
        view = self._layout.view(self._matrix, param)
        if id(param) in self._written:
            view.add_(grads)
        else:  # saves clearing the matrix first
            view.copy_(grads)
            self._written.add(id(param))

    def clipped_sum(self, max_grad_norm: float) -> Tensor:
        """Return sum_i min(1, max_grad_norm / ||g_i||) g_i, as [layout.size].

        An example whose gradient is not finite, or whose norm overflows, contributes nothing:
        otherwise one broken image would turn the whole sum into NaN, and its presence would show.
        """
        for param in self._layout.params:
            if id(param) not in self._written:
                self._layout.view(self._matrix, param).zero_()
        norms = self.norms()
        finite = norms.isfinite()
        if not finite.all():
            self._matrix[~finite] = 0.0  # a factor of zero would not do: 0 * NaN is NaN
        factors = (max_grad_norm / norms).clamp(max=1.0).where(finite, 0.0)
        return torch.mv(self._matrix.t(), factors.to(self._matrix.dtype))

    def norms(self) -> Tensor:
        """Return the L2 norms ||g_i|| in float64, [b]."""
        segments = self._matrix.unflatten(1, (-1, _SEGMENT))
        return torch.linalg.vector_norm(torch.linalg.vector_norm(segments, dim=2).double(), dim=1)
