"""Guidance and thresholding: what becomes of the network's prediction before a step is taken."""

import numpy as np
import pytest
import torch
from conftest import refusal, tiny_diffusion

from dp_synth.sampling.guidance import Guidance
from dp_synth.sampling.thresholding import Thresholding


def half(x, t):
    return 0.5 * x


def third(x, t):
    return 0.3 * x


def never(x, t):
    raise AssertionError("not needed")


IMAGES = torch.linspace(-1, 1, 18).view(2, 1, 3, 3)


def test_no_guidance_asks_with_labels_alone():
    assert Guidance(0)(half, never, tiny_diffusion()) is half


@pytest.mark.parametrize("strength", [0.5, 1.0, 30.0])
def test_guidance_extrapolates_and_does_not_clamp(strength):
    denoise = Guidance(strength)(half, third, tiny_diffusion())
    expected = (0.5 + strength * 0.2) * IMAGES
    torch.testing.assert_close(denoise(IMAGES, torch.zeros(2)), expected)


def test_guidance_of_gaussian_classes_is_known():
    """Where classes are N(+-m, s^2) of equal shares, guidance moves x0 by a closed form."""
    process, m, s = tiny_diffusion(), 0.5, 0.1
    t = torch.tensor([30.0, 30.0])
    sigma = process.sigma(t).view(-1, 1, 1, 1)
    seen = IMAGES.double()

    def conditional(x, t):
        return m + s**2 / (s**2 + sigma**2) * (seen - m)

    def unconditional(x, t):
        chance = torch.sigmoid(2 * m * seen / (s**2 + sigma**2))
        return s**2 / (s**2 + sigma**2) * (seen - m * (2 * chance - 1)) + m * (2 * chance - 1)

    denoise = Guidance(2.0)(conditional, unconditional, process)
    other = 1 - torch.sigmoid(2 * m * seen / (s**2 + sigma**2))
    shift = 2 * 2 * m * other * sigma**2 / (s**2 + sigma**2)
    torch.testing.assert_close(denoise(IMAGES, t), conditional(IMAGES, t) + shift)


def test_outside_its_interval_guidance_asks_with_labels_alone():
    process = tiny_diffusion()
    t = torch.arange(50.0)
    sigma = process.sigma(t)
    low, high = float(sigma[10]), float(sigma[20])
    asked = []

    def unconditional(x, t):
        asked.append(float(t[0]))
        return third(x, t)

    denoise = Guidance(2.0, [low, high])(half, unconditional, process)
    for step in t:
        guided = 10 <= step <= 20
        expected = (0.5 + 2 * 0.2 * guided) * IMAGES
        torch.testing.assert_close(denoise(IMAGES, step.expand(2)), expected)
    assert asked == list(range(10, 21))


@pytest.mark.parametrize(
    ("strength", "interval", "named"),
    [
        (-1, None, "sampler.guidance=-1"),
        ("abc", None, "sampler.guidance='abc'"),
        (float("nan"), None, "sampler.guidance=nan"),
        (1, 3, "sampler.guidance_interval=3"),
        (1, "12", "sampler.guidance_interval='12'"),
        (1, [1], "sampler.guidance_interval=[1]"),
        (1, [2, 1], "sampler.guidance_interval=[2, 1]"),
        (1, [1, 1], "sampler.guidance_interval=[1, 1]"),
        (1, [-1, 1], "sampler.guidance_interval[0]=-1"),
        (1, [0, "high"], "sampler.guidance_interval[1]='high'"),
        (0, [1, 2], "sampler.guidance_interval=[1.0, 2.0]"),
    ],
)
def test_wrong_guidance_is_refused_by_key(strength, interval, named):
    assert named in refusal(Guidance, strength, interval)


def test_thresholding_none_leaves_predictions_alone():
    assert Thresholding("none")(half) is half


def test_static_thresholding_clamps():
    x0 = torch.tensor([-3.0, -1.0, 0.2, 1.0, 5.0]).view(1, 1, 1, 5)
    out = Thresholding("static")(lambda x, t: x)(x0, torch.zeros(1))
    assert out.flatten().tolist() == pytest.approx([-1, -1, 0.2, 1, 1])


@pytest.mark.parametrize("percentile", [1e-3, 50, 90, 99.5, 100])
def test_dynamic_thresholding_is_that_of_each_image_alone(percentile):
    """Numpy's percentile is the oracle."""
    scales = torch.tensor([0.1, 1.0, 2.0, 50.0]).view(-1, 1, 1, 1)
    x0 = scales * torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    out = Thresholding("dynamic", percentile)(lambda x, t: x)(x0, torch.zeros(4))
    for image, thresholded in zip(x0.numpy(), out.numpy(), strict=True):
        size = max(1.0, np.percentile(np.abs(image), percentile))
        expected = np.clip(image, -size, size) / size
        np.testing.assert_allclose(thresholded, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(out[0], x0[0])  # inside already
    assert out.abs().max() <= 1


@pytest.mark.parametrize(
    ("how", "percentile", "named"),
    [
        ("clip", None, "sampler.thresholding='clip'"),
        ("static", 99, "sampler.percentile=99"),
        ("none", 99, "sampler.percentile=99"),
        ("dynamic", 0, "sampler.percentile=0"),
        ("dynamic", 101, "sampler.percentile=101"),
        ("dynamic", "high", "sampler.percentile='high'"),
    ],
)
def test_wrong_thresholding_is_refused_by_key(how, percentile, named):
    assert named in refusal(Thresholding, how, percentile)
