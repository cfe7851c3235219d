"""Samplers recover a law whose perfect denoiser is known, and repeat themselves from a seed."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import compose, tiny_diffusion, tiny_net
from diffusers import DDIMScheduler
from hydra.utils import instantiate

from dp_synth.building import build_diffusion
from dp_synth.errors import UserError
from dp_synth.samplers import Sampler, integrate

MEAN, STD = 0.2, 0.15
CLASSES = ("a", "b", "c")


def gaussian_denoiser(diffusion):
    """E[x0 | x] where every pixel of x0 is N(MEAN, STD^2): linear in x."""
    alpha_bars = diffusion.schedule.alphas_cumprod

    def denoise(x, t):
        abar = alpha_bars[t].view(-1, 1, 1, 1).to(x.dtype)
        gain = abar.sqrt() * STD**2 / (abar * STD**2 + 1 - abar)
        return MEAN + gain * (x - abar.sqrt() * MEAN)

    return denoise


@pytest.mark.parametrize(
    ("name", "steps", "tolerance"),
    [
        ("ddpm", 1000, 0.03),
        ("ddim", 200, 0.03),
        ("dpm_solver", 200, 0.03),
        ("unipc", 200, 0.03),
        # As configured: few steps lose variance in the last one, which ends in a posterior mean.
        ("ddim", 50, 0.1),
        ("dpm_solver", 20, 0.16),
        ("unipc", 20, 0.16),
    ],
)
def test_every_sampler_recovers_mean_and_variance(name, steps, tolerance):
    cfg = compose(f"sampler={name}", f"sampler.steps={steps}")
    diffusion, sampler = build_diffusion(cfg), instantiate(cfg.sampler)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5000, 1, 2, 2, generator=generator)
    scheduler = sampler.scheduler(diffusion.schedule.config, prediction_type="sample")
    x = integrate(gaussian_denoiser(diffusion), noise, scheduler, sampler.steps, generator)
    # Standard errors: STD / sqrt(20000) = 0.001 of the mean, 0.5 % of the deviation.
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.006)
    assert float(x.std()) == pytest.approx(STD, rel=tolerance)
    # Pixels are independent, as in the law.
    correlation = np.corrcoef(x.flatten(1).T.numpy())
    assert np.abs(correlation - np.eye(4)).max() < 0.06


@pytest.mark.parametrize("name", ["ddim", "dpm_solver", "unipc"])
def test_more_steps_come_closer(name):
    """A deterministic sampler is an integrator: its error falls with the step."""
    cfg = compose(f"sampler={name}")
    diffusion, sampler = build_diffusion(cfg), instantiate(cfg.sampler)
    noise = torch.linspace(-2, 2, 400).view(100, 1, 2, 2)

    def after(steps):
        scheduler = sampler.scheduler(diffusion.schedule.config, prediction_type="sample")
        denoise = gaussian_denoiser(diffusion)
        return integrate(denoise, noise, scheduler, steps, torch.Generator().manual_seed(0))

    exact = MEAN + STD * noise
    errors = [float((after(steps) - exact).abs().mean()) for steps in (4, 40)]
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.03


def ddim(**options):
    settings = {"scheduler": partial(DDIMScheduler.from_config), "steps": 2, "num_images": 7}
    return Sampler(**(settings | options))


@pytest.fixture(scope="module")
def model():
    return tiny_net(), tiny_diffusion()


def test_the_seed_decides(model):
    one, again, other = (ddim()(*model, CLASSES, seed=seed).pixels for seed in (3, 3, 4))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    torch.manual_seed(99)
    assert np.array_equal(one, ddim()(*model, CLASSES, seed=3).pixels)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 500), (7, 3), (9, 3), (10, 1), (2, 7)])
def test_classes_are_drawn_equally_often_whatever_the_batches(model, count, batch_size):
    images = ddim(num_images=count, batch_size=batch_size)(*model, CLASSES, seed=0)
    assert images.pixels.shape == (count, 4, 4, 1) and images.classes == CLASSES
    counts = np.bincount(images.labels, minlength=3)
    assert counts.max() - counts.min() <= 1 and counts.sum() == count
    if count > 1:
        assert len(np.unique(images.pixels, axis=0)) == count


def test_sampling_leaves_the_network_as_it_was(model):
    net, diffusion = model
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for mode in (True, False):
        net.train(mode)
        ddim(guidance=1.0)(net, diffusion, CLASSES, seed=0)
        assert net.training is mode
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_guidance_changes_the_images(model):
    plain = ddim()(*model, CLASSES, seed=0).pixels
    assert not np.array_equal(plain, ddim(guidance=3.0)(*model, CLASSES, seed=0).pixels)


@pytest.mark.parametrize("key", ["steps", "num_images", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_wrong_counts_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"sampler.{key}={value}"):
        ddim(**{key: value})


def test_private_label_proportions_are_refused():
    with pytest.raises(UserError, match="sampler.labels='empirical'"):
        ddim(labels="empirical")
