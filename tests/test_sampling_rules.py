"""Step rules recover a law whose perfect denoiser is known, to their order, as diffusers' own do."""

import itertools
import math

import pytest
import torch
from conftest import compose, tiny_diffusion, tiny_net
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from gaussian_toy import correlated_law, drawn_law
from hydra.utils import instantiate

from dp_synth.building import build_diffusion
from dp_synth.sampling.heun import Heun
from dp_synth.sampling.levels import Levels
from dp_synth.sampling.rules import RULES, make_rule
from dp_synth.sampling.spacing import EVEN_IN, Spacing
from dp_synth.sampling.streams import noise_streams

PROCESSES = ("ddpm", "ddpm_linear", "edm")


@pytest.fixture(scope="module")
def processes():
    """As the options configure them."""
    return {name: build_diffusion(compose(f"model/diffusion={name}")) for name in PROCESSES}


def configured(name, *overrides):
    """A sampler as its option configures it."""
    return instantiate(compose(f"sampler={name}", *overrides).sampler)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("dpm_solver", 0.03),
        ("unipc", 0.03),
        ("heun", 0.03),
        ("ddim", 0.042),  # of first order
    ],
)
def test_deterministic_samplers_as_configured_recover_mean_and_covariance(
    processes, process, name, tolerance
):
    assert_recovered(configured(name), processes[process], tolerance)


@pytest.mark.parametrize("process", ["ddpm", "edm"])
@pytest.mark.parametrize(
    ("name", "overrides", "tolerance"),
    [
        ("ddpm", (), 0.06),
        ("ddim", ("sampler.eta=1", "sampler.steps=300"), 0.035),
        ("dpm_solver", ("sampler.algorithm=sde-dpmsolver++", "sampler.steps=50"), 0.03),
        ("heun", ("sampler.churn=10", "sampler.steps=70"), 0.04),
        (
            "heun",
            ("sampler.churn=10", "sampler.churn_interval=[0.05,50]", "sampler.steps=70"),
            0.04,
        ),
    ],
)
def test_stochastic_samplers_recover_mean_and_covariance(
    processes, process, name, overrides, tolerance
):
    """Errors hold chance of about 0.7 %."""
    assert_recovered(configured(name, *overrides), processes[process], tolerance)


def assert_recovered(sampler, process, tolerance):
    """The error of every standard deviation is below the tolerance, a share of it."""
    law = correlated_law()
    mean, covariance = drawn_law(law, sampler, process)
    scaled = covariance / torch.outer(law.stds, law.stds)
    assert (scaled.diagonal().sqrt() - 1).abs().max() < tolerance
    # What is independent stays so; 10,000 images of a stochastic rule tell it to 1 %.
    assert (scaled - scaled.diagonal().diag()).abs().max() < 0.03
    assert (mean - law.mean).abs().max() < 0.015


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("dpm_solver", 2), ("unipc", 2), ("heun", 2)]
)
def test_errors_fall_with_the_step_at_the_order_of_the_rule(processes, process, name, order):
    law, process = correlated_law(), processes[process]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 1, 2, 2, dtype=torch.float64, generator=generator)

    def error(steps):
        sampler = configured(name, f"sampler.steps={steps}")
        timesteps = sampler.spacing.timesteps(process, steps)
        x = sampler.rule(law.denoiser(process), noise, process, timesteps, [])
        highest, lowest = process.sigma(timesteps[[0, -1]], torch.float64).tolist()
        start = highest if name == "heun" else math.hypot(1, highest)
        limit = law.limit(start * noise.flatten(1), highest, lowest)
        return float((x.flatten(1) - limit).abs().mean())

    errors = [error(steps) for steps in (25, 50, 100)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) > order - 0.2


@pytest.mark.parametrize(
    ("name", "options", "scheduler", "step_options", "spacing"),
    [
        ("ddpm", {}, DDPMScheduler, {}, "leading"),
        ("ddim", {"eta": 0.5}, DDIMScheduler, {"eta": 0.5}, "leading"),
        ("dpm_solver", {}, DPMSolverMultistepScheduler, {}, "trailing"),
        (
            "dpm_solver",
            {"algorithm": "sde-dpmsolver++"},
            DPMSolverMultistepScheduler,
            {},
            "trailing",
        ),
        ("unipc", {}, UniPCMultistepScheduler, {}, "trailing"),
    ],
)
@pytest.mark.parametrize("steps", [5, 25])
def test_a_plain_loop_of_diffusers_gives_the_same(
    name, options, scheduler, step_options, spacing, steps
):
    """Where diffusers visits the same levels: spaced in t, a whole number of timesteps apart."""
    net, process = tiny_net().eval(), tiny_diffusion("v")
    denoise = process.denoiser(net, torch.tensor([0, 1, 3]))

    def start():
        streams = noise_streams(0, range(3))
        return torch.cat([torch.randn(1, 1, 4, 4, generator=stream) for stream in streams]), streams

    settings = {"prediction_type": "sample", "timestep_spacing": spacing}
    if name in ("ddpm", "ddim"):
        settings["clip_sample"] = False
    if name == "dpm_solver":
        settings["algorithm_type"] = options.get("algorithm", "dpmsolver++")
    theirs = scheduler.from_config(process.schedule.config, **settings)
    theirs.set_timesteps(steps)
    x, streams = start()
    if name in ("ddpm", "ddim") or options:
        step_options = {**step_options, "generator": streams}
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(denoise(x, t.expand(3)), t, x, **step_options).prev_sample
        noise, streams = start()
        timesteps = Spacing(spacing).timesteps(process, steps)
        assert torch.equal(timesteps.round().long(), theirs.timesteps)
        ours = make_rule(name, options)(denoise, noise, process, timesteps, streams)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_heun_without_churn_is_that_of_diffusers(processes, steps):
    process, law = processes["edm"], correlated_law()
    denoise = law.denoiser(process)
    theirs = HeunDiscreteScheduler.from_config(
        process.schedule.config, prediction_type="epsilon", use_karras_sigmas=True
    )
    theirs.set_timesteps(steps)
    noise = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    x = noise * theirs.sigmas[0]
    for i, t in enumerate(theirs.timesteps):
        sigma = theirs.sigmas[i].double()
        x0 = denoise(x / (1 + sigma**2).sqrt(), process.timestep(sigma).expand(5))
        x = theirs.step((x - x0) / sigma, t, x).prev_sample
    timesteps = Spacing("karras").timesteps(process, steps)
    ours = Heun()(denoise, noise, process, timesteps, [])
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-3)


def test_heun_asks_at_churned_levels_inside_the_interval_alone(processes):
    process, asked = processes["edm"], []

    def denoise(x, t):
        asked.append(float(process.sigma(t[:1].double(), torch.float64)))
        return torch.zeros_like(x)

    timesteps = Spacing("karras").timesteps(process, 10)
    sigmas = process.sigma(timesteps, torch.float64).tolist()
    rule = Heun(churn=2, churn_interval=[0.05, 50])
    rule(denoise, torch.zeros(1, 1, 2, 2), process, timesteps, noise_streams(0, [0]))
    churned = [1.2 * sigma if 0.05 <= sigma <= 50 else sigma for sigma in sigmas]
    assert any(churned[i] == sigmas[i] for i in range(10)) and churned != sigmas
    expected = [level for pair in zip(churned, [*sigmas[1:], None], strict=True) for level in pair]
    assert asked == pytest.approx(expected[:-1], rel=1e-4)


def test_churn_is_bounded_as_the_paper_has_it():
    assert Heun(churn=1e6)._gamma(1.0, steps=10) == math.sqrt(2) - 1
    assert Heun(churn=1)._gamma(1.0, steps=10) == 0.1


def test_more_churn_noise_gives_more_variance(processes):
    law = correlated_law()

    def spread(noise):
        overrides = ("sampler.churn=10", f"sampler.churn_noise={noise}")
        return drawn_law(law, configured("heun", *overrides), processes["ddpm"])[1].trace()

    assert spread(1.1) > 1.05 * spread(1.0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("spacing", EVEN_IN)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 61])
def test_any_number_of_steps_ends_where_the_denoiser_points(processes, name, spacing, steps):
    """Also one step, and more than the 50 timesteps that the process has."""
    for process in (tiny_diffusion("v"), processes["ddpm"]):
        timesteps = Spacing(spacing).timesteps(process, steps)
        assert timesteps.shape == (steps,) and timesteps.dtype == torch.float64
        assert (timesteps.diff() < 0).all()
        assert timesteps.min() >= 0 and timesteps.max() <= process.num_timesteps - 1
        noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        calls = []

        def denoise(x, t, calls=calls):
            calls.append(t)
            assert x.dtype == torch.float32 and torch.isfinite(x).all() and t.shape == (2,)
            return torch.full_like(x, 0.25)

        rule = make_rule(name, {})
        x = rule(denoise, noise, process, timesteps, noise_streams(0, range(2)))
        assert len(calls) == rule.network_calls(steps)
        torch.testing.assert_close(x, torch.full_like(x, 0.25))


def test_spacings_are_even_where_they_say(processes):
    process = processes["ddpm"]

    def levels(name, rho=None):
        timesteps = Spacing(name, rho).timesteps(process, 11)
        return timesteps, process.sigma(timesteps, torch.float64)

    for name, rho, function in [
        ("log_snr", None, torch.log),
        ("karras", None, lambda sigma: sigma ** (1 / 7)),
        ("karras", 3, lambda sigma: sigma ** (1 / 3)),
    ]:
        _, sigma = levels(name, rho)
        assert float(sigma[0]) == pytest.approx(80) and float(sigma[-1]) < 0.01
        gaps = function(sigma).diff()
        torch.testing.assert_close(gaps, gaps.mean().expand(10))
    for name, ends in [
        ("leading", (1000 - 1000 / 11, 0)),
        ("linspace", (999, 0)),
        ("trailing", (999, 1000 / 11 - 1)),
    ]:
        t, _ = levels(name)
        assert t[[0, -1]].tolist() == pytest.approx(ends)
        torch.testing.assert_close(t.diff(), t.diff().mean().expand(10))


def test_an_interval_of_levels_holds_its_ends():
    assert [Levels(1, 2).hold(sigma) for sigma in (0.9, 1, 1.5, 2, 2.1)] == [0, 1, 1, 1, 0]
