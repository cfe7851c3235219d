"""The law of the training timestep: exact, in range, refused by its key."""

import math

import pytest
import torch
from scipy import stats

from dp_synth.errors import UserError
from dp_synth.timestep_law import TimestepLaw

LAWS = [
    ([0, 1], [1.0]),
    ([0, 7], [0.3]),
    ([0, 1, 2], [1, 3]),
    ([0, 3, 60, 100], [0.015, 0.785, 0.2]),
    ([0, 3, 60, 100], [0, 1, 0]),
    ([0, 3, 60, 100], [1, 0, 1]),
    ([0, 3, 60, 100], [0, 0, 5]),
    ([0, 13, 14, 101], [2, 1, 2]),
    ([0, 1, 1000], [1e-9, 1]),
]


def probabilities(bounds, weights):
    """The law written out, one number per timestep."""
    p = []
    for low, high, weight in zip(bounds, bounds[1:], weights, strict=False):
        p += [weight / sum(weights) / (high - low)] * (high - low)
    return torch.tensor(p, dtype=torch.float64)


@pytest.mark.parametrize(("bounds", "weights"), LAWS)
def test_the_timestep_law_is_the_inverse_of_its_cumulative(bounds, weights):
    """Exact: a fine grid of uniforms hits each timestep in proportion to its probability."""
    law = TimestepLaw(bounds, weights)
    points = 200_000
    t = law((torch.arange(points, dtype=torch.float64) + 0.5) / points)
    assert t.dtype == torch.int64 and law.num_timesteps == bounds[-1]
    counts = torch.bincount(t, minlength=bounds[-1])
    # A grid cell at each of an interval's two ends may fall on either side.
    assert ((counts - probabilities(bounds, weights) * points).abs() <= 1 + 1e-6).all()
    assert (t.diff() >= 0).all()


@pytest.mark.parametrize(("bounds", "weights"), LAWS)
def test_draws_follow_the_timestep_law(bounds, weights):
    p = probabilities(bounds, weights)
    t = TimestepLaw(bounds, weights)(torch.rand(50_000, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(t, minlength=len(p))
    assert (counts[p == 0] == 0).all()
    likely = p * len(t) > 5
    observed, expected = counts[likely].double(), p[likely] * len(t)
    expected *= observed.sum() / expected.sum()
    if len(observed) > 1:
        assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-6


@pytest.mark.parametrize(("bounds", "weights"), LAWS)
def test_extreme_uniforms_stay_in_range(bounds, weights):
    p = probabilities(bounds, weights)
    below_one = [math.nextafter(1.0, 0.0), 1 - 2.0**-24]
    t = TimestepLaw(bounds, weights)(torch.tensor([0.0, *below_one], dtype=torch.float64))
    assert (p[t] > 0).all()
    assert int(t[0]) == int(p.nonzero()[0]) and int(t[1]) == int(p.nonzero()[-1])
    assert len(TimestepLaw(bounds, weights)(torch.zeros(0))) == 0


@pytest.mark.parametrize(
    ("bounds", "weights"),
    [
        ([0, 10], [1, 1]),
        ([1, 10], [1]),
        ([0, 10, 10], [1, 1]),
        ([0, 10, 5], [1, 1]),
        ([0, 5, 10], [1, -1]),
        ([0, 5, 10], [0, 0]),
    ],
)
def test_an_impossible_law_is_refused_by_its_key(bounds, weights):
    with pytest.raises(UserError, match=r"model\.diffusion\.timestep_law\.(bounds|weights)="):
        TimestepLaw(bounds, weights)
