"""What every parameterisation must have: levels, an optimal network that nothing beats, a denoiser."""

import numpy as np
import pytest
import torch
from conftest import tiny_net
from diffusers import DDPMPipeline, UNet2DModel
from processes import (
    MEAN,
    NAMES,
    PREDICTIONS,
    STD,
    GaussianOracle,
    column,
    posterior_mean,
    process,
    rows_over_time,
    tiny_edm,
)
from torch import nn

from dp_synth.diffusion import Diffusion
from dp_synth.runs import Run
from dp_synth.timestep_law import TimestepLaw

LADDERS = [
    process("v"),
    tiny_edm(),
    tiny_edm(num_timesteps=2),
    tiny_edm(num_timesteps=997, rho=3, sigma_min=1e-3, sigma_max=1e3),
    Diffusion("eps", TimestepLaw([0, 2], [1]), "linear"),
    Diffusion("eps", TimestepLaw([0, 1000], [1]), "linear"),
]


@pytest.mark.parametrize("process", LADDERS)
def test_the_levels_are_those_of_the_schedule(process):
    """Diffusers keeps abar in float32: below sigma = 0.01 it has one or two digits of the level."""
    assert process.num_timesteps == process.schedule.config.num_train_timesteps
    sigma = process.sigma(torch.arange(process.num_timesteps), torch.float64)
    assert (sigma.diff() > 0).all()
    abar = process.schedule.alphas_cumprod.double()
    theirs = ((1 - abar) / abar).sqrt()
    torch.testing.assert_close(sigma[sigma > 0.01], theirs[sigma > 0.01], rtol=2e-3, atol=0)
    torch.testing.assert_close(sigma, theirs, rtol=0.05, atol=0)


@pytest.mark.parametrize("process", LADDERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_timestep_is_the_inverse_of_sigma(process, dtype, tolerance):
    last = process.num_timesteps - 1
    t = torch.cat([torch.linspace(0, last, 211, dtype=dtype), torch.arange(last + 1).to(dtype)])
    sigma = process.sigma(t, dtype)
    assert sigma.dtype == dtype
    torch.testing.assert_close(process.timestep(sigma), t, rtol=0, atol=tolerance)
    assert torch.equal(process.sigma(t.long(), dtype), process.sigma(t.floor(), dtype))
    beyond = torch.tensor([0.0, 1e-9, 1e9, torch.inf], dtype=dtype)
    assert process.timestep(beyond).tolist() == [0, 0, last, last]


@pytest.mark.parametrize("process", LADDERS)
def test_between_two_timesteps_the_level_is_their_geometric_mean(process):
    t = torch.arange(process.num_timesteps - 1)
    below, above = process.sigma(t, torch.float64), process.sigma(t + 1, torch.float64)
    middle = process.sigma(t + 0.5, torch.float64)
    torch.testing.assert_close(middle, (below * above).sqrt())


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_levels_have_the_shape_of_their_timesteps(shape):
    process = tiny_edm()
    sigma = process.sigma(torch.full(shape, 7))
    assert sigma.shape == shape and process.timestep(sigma).shape == shape
    assert torch.allclose(process.timestep(sigma), torch.full(shape, 7.0), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_added_at_constant_variance(name):
    x0, noise, t = rows_over_time()
    x = process(name).diffuse(x0, noise, t)
    sigma = column(process(name).sigma(t, torch.float64))
    torch.testing.assert_close(x * (1 + sigma**2).sqrt(), x0 + sigma * noise)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float64, 1e-10)])
def test_the_clean_image_comes_back_from_a_perfect_output(name, dtype, tolerance):
    made = process(name)
    x0, noise, t = rows_over_time(dtype=dtype)
    back = made.to_x0(made.target(x0, noise, t), made.diffuse(x0, noise, t), t)
    assert back.dtype == dtype
    # At the last level of 50 the signal is 4e-3 of the noise, so float32 has few digits of it.
    torch.testing.assert_close(back, x0, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_the_denoiser_of_the_optimal_network_is_the_posterior_mean(name):
    made = process(name)
    x0, noise, t = rows_over_time()
    x0 = MEAN + STD * x0
    y = torch.zeros(len(t), dtype=torch.int64)
    x = made.diffuse(x0, noise, t)
    sigma = column(made.sigma(t, torch.float64))
    expected = posterior_mean(x0 + sigma * noise, sigma)
    found = made.denoiser(GaussianOracle(name, made), y)(x, t)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def loss_of(made, net, t):
    """The exact expected loss over the Gaussian law at a timestep.

    The loss is quadratic in (x0, noise), so that the four points at one standard deviation from the
    mean, which have the law's first two moments, have its expectation.
    """
    signs = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    x0, noise = (column(points) for points in (MEAN + STD * signs[:, 0], signs[:, 1]))
    y = torch.zeros(4, dtype=torch.int64)
    loss = made.row_loss(net)(x0, noise, torch.full((4,), t, dtype=torch.float64), y)
    shown, _ = made.network_input(made.diffuse(x0, noise, torch.full((4,), t)), torch.full((4,), t))
    return float(loss.mean()), float(shown.square().mean()), float(shown.mean())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t", [0.0, 1.0, 13.5, 31.0, 48.75, 49.0])
def test_nothing_beats_the_optimal_network(name, t):
    """An error of a + b x in its output costs E[(a + b x)^2], to first order nothing."""
    made = process(name)
    least, square, mean = loss_of(made, GaussianOracle(name, made), t)
    for a, b in [(0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1), (0.2, 0.3)]:
        found, _, _ = loss_of(made, GaussianOracle(name, made, (a, b)), t)
        cost = a**2 + 2 * a * b * mean + b**2 * square
        assert found - least == pytest.approx(cost, rel=1e-4, abs=1e-9) and cost > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_weighs_the_error_of_the_image(name):
    """1/sigma^2 for noise, 1 + 1/sigma^2 for velocity, 1 for the image, lambda(sigma) for EDM."""
    net, made = tiny_net(), process(name)
    x0, noise, t = rows_over_time(dtype=torch.float32)
    # At the highest levels float32 has too few digits of an image that was divided out again.
    t = t * 0.6
    y = torch.arange(7) % 4
    with torch.no_grad():
        loss = made.row_loss(net)(x0, noise, t, y).double()
        error = (made.denoiser(net, y)(made.diffuse(x0, noise, t), t) - x0).double()
    sigma = made.sigma(t.double(), torch.float64)
    if name in PREDICTIONS:
        weight = {"eps": sigma**-2, "v": 1 + sigma**-2, "x0": sigma**0}[name]
    else:
        data = made.sigma_data
        weight = (sigma**2 + data**2) / (sigma * data) ** 2
    expected = weight * error.square().flatten(1).mean(1)
    assert loss.shape == (7,) and (loss > 0).all()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_each_row_is_its_own(name):
    """Against a loop that sees one row at a time."""
    net, made = tiny_net(), process(name)
    x0, noise, t = rows_over_time(dtype=torch.float32)
    y = torch.arange(7) % 4
    together = made.row_loss(net)(x0, noise, t, y)
    rows = [slice(i, i + 1) for i in range(7)]
    alone = [made.row_loss(net)(x0[row], noise[row], t[row], y[row]) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)


class Constant(nn.Module):
    """A network whose output is its label everywhere."""

    def forward(self, x, t, class_labels, return_dict):
        return (class_labels.view(-1, 1, 1, 1).to(x.dtype).expand_as(x),)


def test_the_denoiser_binds_labels_and_does_not_clamp():
    x0 = process("x0").denoiser(Constant(), torch.tensor([0, 1, 5]))(
        torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2])
    )
    assert x0[:, 0, 0, 0].tolist() == [0, 1, 5]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_denoises_alike_in_a_plain_loop_of_diffusers(name, tmp_path):
    """The loop that any reader of diffusers' manual would write."""
    made, run = process(name), Run(tmp_path)
    run.save_model(tiny_net(), made, ("a", "b", "c"))
    pipeline = DDPMPipeline.from_pretrained(run.model_dir)
    net, scheduler = UNet2DModel.from_pretrained(run.model_dir), pipeline.scheduler
    assert isinstance(scheduler, type(made.pipeline_scheduler()))
    y = torch.tensor([0, 1, 2, 3])
    ours = made.denoiser(net, y)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(4, 1, 4, 4, generator=generator) * scheduler.init_noise_sigma
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            shown = scheduler.scale_model_input(sample, t)
            output = pipeline.unet(shown, t, class_labels=y).sample
            step = scheduler.step(output, t, sample, generator=generator)
            if name in PREDICTIONS:  # DDPM's own rule clips
                x0 = ours(sample, t.expand(4)).clamp(-1, 1)
            else:
                sigma = scheduler.sigmas[i]
                x0 = ours(sample / (1 + sigma**2).sqrt(), made.timestep(sigma).expand(4))
            torch.testing.assert_close(step.pred_original_sample, x0, rtol=1e-3, atol=1e-3)
            sample = step.prev_sample
    assert i == 9 and np.isfinite(sample.numpy()).all()
