"""Precision, recall, density and coverage: who lies among whose nearest neighbours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dp_synth.metrics.intervals import Rows

NEIGHBOURS = 5
_CHUNK = 1024

Squares = npt.NDArray[np.float64]


class Manifolds:
    """Two sets of features, each as the union of balls that reach to a point's k-th neighbour.

    Balls are closed, as in the first authors' code, and k = 5. Distances are exact: all pairs, in
    float64. Memory holds 8 bytes for each pair of ``features`` and 9 for each pair across.

    Args:
        reference: features ``[M, D]`` of real images, M > 5.
        radii: ``squared_radii(reference)``, which serves many sets of features.
        features: features ``[N, D]`` of the images that are judged, N > 5.
    """

    def __init__(
        self,
        reference: npt.NDArray[np.float32],
        radii: Squares,
        features: npt.NDArray[np.float32],
    ) -> None:
        self._across = _squared_distances(features, reference)
        self._within = _squared_distances(features, features)
        np.fill_diagonal(self._within, 0)
        self._inside = self._across <= radii
        self._all = np.arange(len(features))

    def precision(self, rows: Rows | None = None) -> float:
        """Return the share of the judged images that lie in a ball of a real one, 0..1.

        Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 2.

        Args:
            rows: which of the judged images there are, more than 5; None: all.
        """
        return float(self._inside[self._chosen(rows)].any(axis=1).mean())

    def recall(self, rows: Rows | None = None) -> float:
        """Return the share of the real images that lie in a ball of a judged one, 0..1.

        Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 2. For ``rows`` see ``precision``.
        """
        chosen = self._chosen(rows)
        radii = _kth_smallest(self._within[np.ix_(chosen, chosen)])
        return float((self._across[chosen] <= radii[:, None]).any(axis=0).mean())

    def density(self, rows: Rows | None = None) -> float:
        """Return how many balls of real images a judged one lies in, over k: 0 or more.

        Naeem et al. 2020, arXiv 2002.09797, eq. 4: 1 is expected of real images, and more is no
        error. For ``rows`` see ``precision``.
        """
        return float(self._inside[self._chosen(rows)].sum(axis=1).mean() / NEIGHBOURS)

    def coverage(self, rows: Rows | None = None) -> float:
        """Return the share of the real images that have a judged one in their ball, 0..1.

        Naeem et al. 2020, arXiv 2002.09797, eq. 5. For ``rows`` see ``precision``.
        """
        return float(self._inside[self._chosen(rows)].any(axis=0).mean())

    def _chosen(self, rows: Rows | None) -> Rows:
        return self._all if rows is None else rows


def squared_radii(features: npt.NDArray[np.float32]) -> Squares:
    """Return the squared distance ``[N]`` of each of N > 5 points to its fifth nearest other."""
    radii = np.empty(len(features))
    for start in range(0, len(features), _CHUNK):
        squares = _squared_distances(features[start : start + _CHUNK], features)
        itself = np.arange(len(squares))
        squares[itself, start + itself] = 0
        radii[start : start + _CHUNK] = _kth_smallest(squares)
    return radii


def _kth_smallest(squares: Squares) -> Squares:
    """The fifth smallest of each row, one 0 of the point itself not counted."""
    return np.partition(squares, NEIGHBOURS, axis=1)[:, NEIGHBOURS]


def _squared_distances(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> Squares:
    """``|a|^2 + |b|^2 - 2 a.b``, by one product of matrices: fast, and in float64 exact enough."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    squares = a @ b.T
    squares *= -2
    squares += (a * a).sum(axis=1)[:, None]
    squares += (b * b).sum(axis=1)
    return np.maximum(squares, 0, out=squares)
