"""Which class each image of a synthetic data set is of."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Policy = Literal["uniform", "dp_histogram"]
POLICIES: tuple[str, ...] = get_args(Policy)


def cyclic(total: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., 0, 1, ...: every class equally often in any stretch of them, int64 [total]."""
    return torch.arange(total) % num_classes


def proportional(total: int, shares: Sequence[float]) -> Tensor:
    """Labels in proportion to the classes' shares, in an order without pattern, int64 [total].

    The order is mixed, so that every shard of the data set holds all classes; it is always the same.
    """
    counts = torch.tensor(apportion(total, shares))
    labels = torch.arange(len(shares)).repeat_interleave(counts)
    return labels[torch.randperm(total, generator=torch.Generator().manual_seed(0))]


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to shares, that sum to ``total``: the largest remainders get more.

    Args:
        total: 0 or more.
        shares: each 0 or more, summing to 1.
    """
    exact = total * np.asarray(shares, dtype=np.float64)
    counts = np.floor(exact).astype(np.int64)
    largest_first = np.argsort(counts - exact, kind="stable")
    counts[largest_first[: total - counts.sum()]] += 1
    return counts.tolist()
