"""EDM's parameterisation: ladder, training law, its relation to velocity, published models, refusals."""

import json
import math

import pytest
import torch
from conftest import SHORT, compose, refusal, tiny_diffusion, tiny_net, weights_of
from diffusers import EDMEulerScheduler
from processes import column, rows_over_time, tiny_edm
from scipy import stats

from dp_synth import train
from dp_synth.building import build_diffusion, build_network
from dp_synth.cli import conf_dir
from dp_synth.edm import EDM
from dp_synth.errors import UserError
from dp_synth.networks import carry_over
from dp_synth.pretraining import cache_key
from dp_synth.published import PublishedModel
from dp_synth.runs import Run

MODELS = sorted(path.stem for path in conf_dir().glob("model/*.yaml"))
PROCESSES = sorted(path.stem for path in conf_dir().glob("model/diffusion/*.yaml"))


@pytest.mark.parametrize("num_timesteps", [2, 3, 18, 1000])
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_the_ladder_is_that_of_diffusers(num_timesteps, rho):
    theirs = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, rho=rho)
    theirs.set_timesteps(num_timesteps)
    ours = tiny_edm(sigma_min=0.01, sigma_max=50.0, rho=rho, num_timesteps=num_timesteps)
    found = ours.sigma(torch.arange(num_timesteps))
    torch.testing.assert_close(found, theirs.sigmas[:-1].flip(0).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("p_mean", "p_std"), [(-1.2, 1.2), (0.4, 1.0), (0.0, 0.1)])
def test_levels_in_training_are_log_normal(p_mean, p_std):
    process = tiny_edm(p_mean=p_mean, p_std=p_std, sigma_min=1e-3, sigma_max=1e3)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = process.draw_t(uniform)
    log_sigma = process.sigma(t).log().numpy()
    assert stats.kstest(log_sigma, stats.norm(p_mean, p_std).cdf).pvalue > 1e-4
    # Not only the law: each uniform is its own quantile.
    expected = stats.norm(p_mean, p_std).ppf(uniform.numpy())
    assert log_sigma == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_uniforms_are_the_ends_of_the_ladder(dtype):
    process = tiny_edm(p_std=5.0)
    nearly_one = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    t = process.draw_t(torch.stack([torch.zeros((), dtype=dtype), nearly_one, nearly_one / 2]))
    assert t[:2].tolist() == [0, 49] and 0 < t[2] < 49
    assert t.dtype == torch.float32 and len(process.draw_t(torch.zeros(0))) == 0


def test_with_data_of_unit_variance_it_predicts_the_negative_velocity():
    """Salimans and Ho 2022, appendix D: both are then the same rotation of image and noise."""
    edm, velocity = tiny_edm(sigma_data=1.0), tiny_diffusion("v")
    x0, noise, t = rows_over_time()
    # The levels of one process as timesteps of the other, as far as both have them.
    sigma = edm.sigma(t, torch.float64).clamp(0.05, 20)
    ours, theirs = edm.timestep(sigma), velocity.timestep(sigma)
    x = edm.diffuse(x0, noise, ours)
    torch.testing.assert_close(x, velocity.diffuse(x0, noise, theirs))
    v = velocity.target(x0, noise, theirs)
    torch.testing.assert_close(edm.target(x0, noise, ours), -v)
    torch.testing.assert_close(edm.to_x0(-v, x, ours), velocity.to_x0(v, x, theirs))
    torch.testing.assert_close(edm.network_input(x, ours)[0], x)


@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 1.0])
def test_input_and_target_have_unit_variance_whatever_the_noise(sigma_data):
    """What the preconditioning is for (Karras et al. 2022, appendix B.6)."""
    process = tiny_edm(sigma_data=sigma_data)
    generator = torch.Generator().manual_seed(0)
    x0 = sigma_data * torch.randn(9, 1, 100, 100, generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.linspace(0, 49, 9)
    shown, _ = process.network_input(process.diffuse(x0, noise, t), t)
    for images in (shown, process.target(x0, noise, t)):
        deviations = images.flatten(1).std(1)
        torch.testing.assert_close(deviations, torch.ones(9), rtol=0.03, atol=0)


def test_little_noise_is_taken_off_exactly():
    """At sigma = 0.002 an abar in float32 has lost what 1 - abar = 4e-6 says."""
    process = tiny_edm(num_timesteps=1000)
    x0, noise, _ = rows_over_time(dtype=torch.float32)
    t = torch.tensor([0.0, 0.25, 1.0, 2.5, 7.0, 50.0, 100.0])
    output = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    x = process.diffuse(x0, noise, t)
    sigma, data = column(process.sigma(t.double(), torch.float64)), process.sigma_data
    noisy = x.double() * (1 + sigma**2).sqrt()
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (sigma**2 + data**2).sqrt()
    expected = c_skip * noisy + c_out * output.double()
    found = process.to_x0(output, x, t)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("option", PROCESSES)
def test_every_model_takes_every_process(model, option):
    cfg = compose(f"model={model}", f"model/diffusion={option}")
    process = build_diffusion(cfg)
    assert process.num_timesteps == 1000
    t = process.draw_t(torch.linspace(0, 0.99, 100))
    assert t.min() >= 0 and t.max() <= 999 and len(t.unique()) > 90
    assert (cache_key(cfg) == cache_key(compose(f"model={model}"))) is (option == "ddpm")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sigma_data": 0}, "sigma_data=0 must be"),
        ({"sigma_min": -1}, "sigma_min=-1 must be"),
        ({"sigma_min": 1e-4}, "sigma_min=0.0001 with num_timesteps=50 is finer"),
        ({"num_timesteps": 10_000}, "sigma_min=0.002 with num_timesteps=10000 is finer"),
        ({"sigma_min": 90}, "sigma_min=90 must be below model.diffusion.sigma_max=80"),
        ({"sigma_max": math.inf}, "sigma_max=inf must be"),
        ({"p_mean": math.nan}, "p_mean=nan must be"),
        ({"p_mean": "low"}, "p_mean='low' must be"),
        ({"p_std": 0}, "p_std=0 must be"),
        ({"rho": 0}, "rho=0 must be"),
        ({"num_timesteps": 1}, "num_timesteps=1 is too few"),
        ({"num_timesteps": 2.5}, "num_timesteps=2.5 must be a whole number"),
    ],
)
def test_values_out_of_range_are_refused_by_their_key(wrong, words):
    assert f"model.diffusion.{words}" in refusal(tiny_edm, **wrong)


def saved(directory, process):
    """A model as a run leaves it."""
    run = Run(directory)
    directory.mkdir()
    run.save_model(tiny_net(), process, ("a", "b", "c"))
    return PublishedModel(str(run.model_dir))


def test_a_model_of_edm_is_a_public_prior_for_edm(tmp_path):
    model = saved(tmp_path / "run", tiny_edm())
    model.refuse_other_process(tiny_edm(p_mean=0.0, p_std=1.0, num_timesteps=7, rho=3.0))
    net = model((1, 4, 4), 3)
    carry_over(*model.load(), net, ("a", "b", "c"))
    assert torch.equal(weights_of(net), weights_of(tiny_net()))


@pytest.mark.parametrize(
    ("trained", "used", "words"),
    [
        (tiny_edm(), tiny_edm(sigma_data=0.6), "set model.diffusion.sigma_data=0.5."),
        (tiny_edm(), tiny_edm(sigma_max=70), "set model.diffusion.sigma_max=80.0."),
        (
            tiny_edm(),
            tiny_diffusion(),
            "set model/diffusion=edm model.diffusion.sigma_data=0.5 model.diffusion.sigma_min=0.002",
        ),
        (
            tiny_diffusion(),
            tiny_edm(),
            "model/diffusion=ddpm model.diffusion.prediction=v model.diffusion.beta_schedule=squared",
        ),
    ],
)
def test_another_parameterisation_is_refused_with_what_would_work(trained, used, words, tmp_path):
    assert words in refusal(saved(tmp_path / "run", trained).refuse_other_process, used)


def test_a_network_of_the_other_sign_is_refused(tmp_path):
    model = saved(tmp_path / "run", tiny_edm())
    file = tmp_path / "run" / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(UserError, match="prediction_type=v_prediction; one with epsilon"):
        model.refuse_other_process(tiny_edm())


def test_the_whole_program_runs_with_it(command, tmp_path):
    """Privately from a published model of EDM; the engine checks itself on its rows."""
    architecture = build_network(compose(), (1, 8, 8), 10)
    public = Run(tmp_path)
    cfg = compose("model/diffusion=edm")
    public.save_model(architecture, build_diffusion(cfg), tuple("0123456789"))
    arguments = ("public=checkpoint", f"public.path={public.model_dir}", *SHORT)
    refused = command(train, *arguments, f"run_dir={tmp_path / 'other'}")
    assert refused.code == 2 and "set model/diffusion=edm" in refused.err
    run = Run(tmp_path / "run")
    outcome = command(train, *arguments, "model/diffusion=edm", f"run_dir={run.path}")
    assert outcome.code == 0, outcome.err
    assert run.statement()["steps"] == 3
    assert isinstance(build_diffusion(run.config()), EDM)
    moved = weights_of(run.load_model()[0]) - weights_of(architecture)
    assert 0 < moved.abs().max() < 0.1
