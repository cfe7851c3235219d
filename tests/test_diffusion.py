"""DDPM's parameterisation against diffusers' own arithmetic; what it refuses."""

import pytest
import torch
from conftest import refusal, tiny_diffusion
from processes import PREDICTIONS, rows_over_time

from dp_synth.diffusion import Diffusion
from dp_synth.timestep_law import TimestepLaw

THEIRS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def rows():
    """Images, noise, whole timesteps."""
    x0, noise, t = rows_over_time()
    return x0, noise, t.long()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_diffusion_agrees_with_diffusers(prediction):
    diffusion = tiny_diffusion(prediction)
    x0, noise, t = rows()
    x = diffusion.diffuse(x0, noise, t)
    torch.testing.assert_close(x, diffusion.schedule.add_noise(x0, noise, t))
    assert diffusion.schedule.config.prediction_type == THEIRS[prediction]
    if prediction == "v":
        expected = diffusion.schedule.get_velocity(x0, noise, t)
        torch.testing.assert_close(diffusion.target(x0, noise, t), expected)


def test_velocity_is_a_rotation_of_image_and_noise():
    """Salimans and Ho 2022: |x|^2 + |v|^2 = |x0|^2 + |noise|^2, and x cos - v sin is the image."""
    diffusion = tiny_diffusion("v")
    x0, noise, t = rows()
    x, v = diffusion.diffuse(x0, noise, t), diffusion.target(x0, noise, t)
    before, after = x0.square() + noise.square(), x.square() + v.square()
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    abar = diffusion.schedule.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    torch.testing.assert_close((1 - abar).sqrt() * x + abar.sqrt() * v, noise, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("word", ["epsilon", "v_prediction", "sample", "noise", None])
def test_an_unknown_prediction_is_refused_with_those_there_are(word):
    message = refusal(Diffusion, word, TimestepLaw([0, 5], [1]))
    assert f"model.diffusion.prediction={word!r}" in message and "eps or v or x0" in message


def test_an_unknown_schedule_is_refused_with_those_there_are():
    message = refusal(Diffusion, "v", TimestepLaw([0, 5], [1]), "cosine")
    assert "model.diffusion.beta_schedule='cosine'" in message and "squaredcos_cap_v2" in message


def test_one_timestep_is_too_few():
    message = refusal(Diffusion, "v", TimestepLaw([0, 1], [1]))
    assert "model.diffusion.timestep_law.bounds=[0, 1]" in message
