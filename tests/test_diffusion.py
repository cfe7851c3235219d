"""The diffusion process: the timestep law, the parameterisations, the per-row loss, guidance."""

import math

import pytest
import torch
from conftest import tiny_diffusion, tiny_net
from scipy import stats
from torch import nn

from dp_synth.diffusion import Diffusion, TimestepLaw, guided
from dp_synth.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
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


def some_rows(rows=7, timesteps=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(rows, 1, 4, 4, generator=generator).double() for _ in range(2))
    return x0, noise, torch.linspace(0, timesteps - 1, rows).long()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_clean_image_comes_back_from_a_perfect_prediction(prediction):
    diffusion = tiny_diffusion(prediction)
    x0, noise, t = some_rows()
    x = diffusion.diffuse(x0, noise, t)
    back = diffusion.to_x0(diffusion.target(x0, noise, t), x, t)
    torch.testing.assert_close(back, x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_diffusion_agrees_with_diffusers(prediction):
    diffusion = tiny_diffusion(prediction)
    x0, noise, t = some_rows()
    x = diffusion.diffuse(x0, noise, t)
    torch.testing.assert_close(x, diffusion.schedule.add_noise(x0, noise, t))
    assert diffusion.schedule.config.prediction_type == prediction
    if prediction == "v_prediction":
        expected = diffusion.schedule.get_velocity(x0, noise, t)
        torch.testing.assert_close(diffusion.target(x0, noise, t), expected)


def test_velocity_is_a_rotation_of_image_and_noise():
    """Salimans and Ho 2022: |x|^2 + |v|^2 = |x0|^2 + |noise|^2, and x cos - v sin is the image."""
    diffusion = tiny_diffusion("v_prediction")
    x0, noise, t = some_rows()
    x, v = diffusion.diffuse(x0, noise, t), diffusion.target(x0, noise, t)
    before, after = x0.square() + noise.square(), x.square() + v.square()
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    abar = diffusion.schedule.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    torch.testing.assert_close((1 - abar).sqrt() * x + abar.sqrt() * v, noise, rtol=1e-6, atol=1e-6)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(UserError, match=r"model\.diffusion\.prediction='x0'"):
        Diffusion("x0", TimestepLaw([0, 5], [1]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_each_row_is_its_own(prediction):
    """Against a loop that sees one row at a time."""
    net, diffusion = tiny_net(), tiny_diffusion(prediction)
    x0, noise, t = some_rows()
    x0, noise, y = x0.float(), noise.float(), torch.arange(7) % 4
    together = diffusion.row_loss(net)(x0, noise, t, y)
    assert together.shape == (7,)
    for i in range(7):
        row = slice(i, i + 1)
        x = diffusion.diffuse(x0[row], noise[row], t[row])
        output = net(x, t[row], class_labels=y[row]).sample
        expected = (output - diffusion.target(x0[row], noise[row], t[row])).square().mean()
        torch.testing.assert_close(together[i], expected, rtol=1e-4, atol=1e-6)


class Constant(nn.Module):
    """A network whose output is its label everywhere."""

    def forward(self, x, t, class_labels, return_dict):
        return (class_labels.view(-1, 1, 1, 1).to(x.dtype).expand_as(x),)


def test_the_denoiser_binds_labels_and_clamps():
    x = torch.zeros(3, 1, 2, 2)
    t = torch.tensor([0, 1, 2])
    y = torch.tensor([0, 1, 5])
    x0 = tiny_diffusion("sample").denoiser(Constant(), y)(x, t)
    assert x0[:, 0, 0, 0].tolist() == [0, 1, 1]


def test_guidance_of_zero_is_the_conditional_denoiser():
    def conditional(x, t):
        return 0.5 * x

    def unconditional(x, t):
        raise AssertionError("not needed")

    assert guided(conditional, unconditional, 0) is conditional


@pytest.mark.parametrize("guidance", [0.5, 1.0, 3.0])
def test_guidance_extrapolates_and_clamps(guidance):
    x = torch.linspace(-1, 1, 9).view(1, 1, 3, 3)
    denoise = guided(lambda x, t: 0.5 * x, lambda x, t: 0.3 * x, guidance)
    expected = ((0.5 + guidance * 0.2) * x).clamp(-1, 1)
    torch.testing.assert_close(denoise(x, torch.zeros(1)), expected)
