"""Exact nearest neighbours among many vectors, in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_QUERIES, _REFERENCES = 1024, 4096  # rows of a piece: 32 MiB of distances

Vectors = npt.NDArray[Any]  # [N, D], uint8 or floating; may lie in a file
Distances = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def nearest(queries: Vectors, references: Vectors) -> tuple[Distances, Indices]:
    """Return the distance ``[Q]`` of each query to its nearest reference, and its index ``[Q]``.

    Of references that are equally near it is the first. Distances between vectors of bytes are
    exact up to the rounding of the square root: ties are ties, and copies have distance 0.

    Args:
        queries: ``[Q, D]``; Q may be 0.
        references: ``[R, D]``, R >= 1.
    """
    distances = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    indices = torch.zeros(len(queries), dtype=torch.int64)
    for rows, start, squared in _squared_distances(queries, references):
        least, place = squared.min(dim=1)
        nearer = least < distances[rows]
        distances[rows] = torch.where(nearer, least, distances[rows])
        indices[rows] = torch.where(nearer, place + start, indices[rows])
    return distances.sqrt().numpy(), indices.numpy()


def several_nearest(
    queries: Vectors,
    references: Vectors,
    k: int,
    query_units: Indices | None = None,
    reference_units: Indices | None = None,
) -> tuple[Distances, Indices]:
    """Return distances ``[Q, k]`` to the k nearest references, ascending, and indices ``[Q, k]``.

    Args:
        queries: ``[Q, D]``; Q may be 0.
        references: ``[R, D]``, of which each query may be compared with k or more.
        k: 1 or more.
        query_units: ``[Q]``; a query is not compared with references of its own unit.
        reference_units: ``[R]``; given together with ``query_units``.
    """
    distances = torch.full((len(queries), k), torch.inf, dtype=torch.float64)
    indices = torch.zeros((len(queries), k), dtype=torch.int64)
    for rows, start, squared in _squared_distances(queries, references):
        if query_units is not None and reference_units is not None:
            theirs = reference_units[start : start + squared.shape[1]]
            own = torch.from_numpy(query_units[rows][:, None] == theirs)
            squared.masked_fill_(own, torch.inf)
        numbers = torch.arange(start, start + squared.shape[1]).expand(len(squared), -1)
        squared = torch.cat([distances[rows], squared], dim=1)
        numbers = torch.cat([indices[rows], numbers], dim=1)
        distances[rows], places = squared.topk(k, dim=1, largest=False)
        indices[rows] = numbers.gather(1, places)
    return distances.sqrt().numpy(), indices.numpy()


def _squared_distances(
    queries: Vectors, references: Vectors
) -> Iterator[tuple[slice, int, Tensor]]:
    """Yield rows of queries, the first reference and squared distances ``[q, r]``, in float64."""
    for start in range(0, len(references), _REFERENCES):
        theirs = _double(references[start : start + _REFERENCES])
        for first in range(0, len(queries), _QUERIES):
            rows = slice(first, min(first + _QUERIES, len(queries)))
            ours = _double(queries[rows])
            norms = ours.square().sum(1)[:, None] + theirs.square().sum(1)
            yield rows, start, norms.addmm_(ours, theirs.T, alpha=-2).clamp_(min=0)


def _double(vectors: Vectors) -> Tensor:
    # float64 holds every sum of squared bytes exactly; float32 would tell copies by rounding.
    return torch.from_numpy(np.asarray(vectors, dtype=np.float64))
