"""Rank tests of whether two groups could have been drawn alike, exact whatever the distances are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import hypergeom

_DRAWS = 9_999  # the smallest p-value is 1 / (draws + 1)


def share_p_value(
    hits: npt.NDArray[np.int64], member: npt.NDArray[np.bool_], seed: int, draws: int = _DRAWS
) -> float:
    """Test whether the members among ``[U]`` units get more hits than any as many units would.

    Which of the units are members is permuted at random; the hits stay. Where membership was drawn
    at random without a look at the hits, the p-value is valid whatever the hits depend on: it is at
    most p with probability at most p. Hits may be anything but independent, which is why a binomial
    test will not do: two samples with the same nearest image count as one finding.

    Args:
        hits: how many hits each unit got, 0 or more.
        member: which units are members; the others are what they are compared with.
        seed: of the permutations.
        draws: how many there are.

    Returns:
        The share of permutations, the one that happened included, whose members get as many hits
        as the members did or more.
    """
    # Units with equally many hits are alike, so that counting members of each kind is enough.
    values, kinds = np.unique(hits, return_counts=True)
    rng = np.random.default_rng(seed)
    members = rng.multivariate_hypergeometric(kinds, int(member.sum()), size=draws)
    as_many = int((members @ values >= hits[member].sum()).sum())
    return (1 + as_many) / (1 + draws)


def below_p_value(below: int, n: int, rank: int, num_calibration: int) -> float:
    """Test whether more of ``n`` values lie below a calibration value than if all were drawn alike.

    Args:
        below: how many of the n values are smaller than the ``rank``-th smallest calibration value.
        n: how many values there are.
        rank: 1 to ``num_calibration``.
        num_calibration: how many calibration values there are.

    Returns:
        The probability of ``below`` or more if every order of the ``n + num_calibration`` values
        were equally likely.
    """
    if below == 0:
        return 1.0
    # As many lie below exactly if, among the smallest below + rank - 1 of all values, fewer than
    # `rank` are calibration values.
    smallest = below + rank - 1
    return float(hypergeom.cdf(rank - 1, n + num_calibration, num_calibration, smallest))
