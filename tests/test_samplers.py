"""The sampler: the same seed gives the same images, described by what decides them."""

import json
from functools import cache

import numpy as np
import pytest
import torch
import yaml
from conftest import compose, refusal, tiny_diffusion, tiny_net
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dp_synth.cli import conf_dir
from dp_synth.sampling import Sampler
from dp_synth.sampling.labels import apportion
from dp_synth.sampling.rules import RULES
from dp_synth.sampling.streams import NUM_STREAMS

CLASSES = ("a", "b", "c")
NAMES = ("ddpm", "ddim", "dpm_solver", "unipc", "heun")


def sampler_of(name, **settings):
    """A sampler as its option configures it, of few steps and images."""
    return Sampler(**(option(name) | {"steps": 3, "num_images": 7} | settings))


@cache
def option(name):
    """The keys and values of an option of ``sampler``."""
    cfg = OmegaConf.to_container(compose(f"sampler={name}").sampler)
    del cfg["_target_"]
    return cfg


@pytest.fixture(scope="module")
def model():
    return tiny_net(), tiny_diffusion()


def test_the_seed_decides(model):
    sampler = sampler_of("ddpm")
    one, again, other = (sampler(*model, CLASSES, seed, None).pixels for seed in (3, 3, 4))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    torch.manual_seed(99)
    assert np.array_equal(one, sampler(*model, CLASSES, 3, None).pixels)


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddim", {"guidance": 1}), ("ddpm", {}), ("heun", {"churn": 2})],
)
@pytest.mark.parametrize("batch_size", [1, 3, 7, 500])
def test_pixels_are_the_same_in_any_batch(model, name, options, batch_size):
    settings = {"num_images": 53, "steps": 4, **options}
    reference = sampler_of(name, batch_size=53, **settings)(*model, CLASSES, 0, None)
    images = sampler_of(name, batch_size=batch_size, **settings)(*model, CLASSES, 0, None)
    assert np.array_equal(images.labels, reference.labels)
    difference = np.abs(images.pixels.astype(int) - reference.pixels)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.001
    assert len(np.unique(images.pixels, axis=0)) == 53


def test_an_image_is_the_same_in_a_larger_data_set(model):
    net, process = model
    sampler = sampler_of("ddpm", num_images=30)
    images = sampler(net, process, CLASSES, 5, None)
    labels = sampler.labels_of(3)[10:20]
    pixels = sampler.draw(net, process, labels, first=10, seed=5)
    assert np.abs(pixels.astype(int) - images.pixels[10:20]).max() <= 1
    assert pixels.dtype == np.uint8 and pixels.shape == (10, 4, 4, 1)


@pytest.mark.parametrize(("count", "batch_size"), [(1, 500), (7, 3), (9, 3), (10, 1), (2, 7)])
def test_classes_are_drawn_equally_often_whatever_the_batches(model, count, batch_size):
    sampler = sampler_of("unipc", num_images=count, batch_size=batch_size)
    images = sampler(*model, CLASSES, 0, None)
    assert images.pixels.shape == (count, 4, 4, 1) and images.classes == CLASSES
    assert images.labels.tolist() == [i % 3 for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 97, 1000])
def test_labels_by_shares_are_apportioned_and_mixed(count):
    shares = [0.5, 0.3, 0.15, 0.05, 0]
    labels = sampler_of("ddim", num_images=count).labels_of(5, shares)
    assert labels.dtype == torch.int64 and labels.shape == (count,)
    assert np.bincount(labels, minlength=5).tolist() == apportion(count, shares)
    assert torch.equal(labels, sampler_of("ddim", num_images=count).labels_of(5, shares))
    if count == 1000:  # each tenth holds about its share of the most frequent class
        assert all(35 <= (part == 0).sum() <= 65 for part in labels.split(100))


def test_sampling_leaves_the_network_as_it_was(model):
    net, process = model
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for mode in (True, False):
        net.train(mode)
        sampler_of("dpm_solver", guidance=1)(net, process, CLASSES, 0, None)
        assert net.training is mode
    net.eval()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_labels_decide_what_is_drawn(model):
    net, process = model
    sampler = sampler_of("dpm_solver", num_images=1)
    one, other = (sampler.draw(net, process, torch.tensor([y]), 0, 0) for y in (0, 1))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_network_calls_are_those_that_are_made(model, name, steps):
    net, process = model
    net.eval()
    calls = []

    def counted(module, *rest):
        calls.append(module)

    handle = net.register_forward_hook(counted)
    for guidance, interval in [(0, None), (1, None), (1, [0.5, 5])]:
        options = {"guidance": guidance, "guidance_interval": interval}
        sampler = sampler_of(name, steps=steps, spacing="log_snr", **options)
        calls.clear()
        sampler.draw(net, process, torch.tensor([0, 1]), first=0, seed=0)
        if interval is None:
            assert len(calls) == sampler.network_calls
        else:
            assert sampler.network_calls / 2 <= len(calls) < max(sampler.network_calls, 2)
    handle.remove()


# Another value of every key that decides images, with what gives it a meaning.
DECIDING = {
    "rule": {},
    "steps": {"steps": 4},
    "spacing": {"spacing": "linspace"},
    "rho": {"spacing": "karras", "rho": 3},
    "guidance": {"guidance": 2},
    "guidance_interval": {"guidance": 2, "guidance_interval": [1, 10]},
    "thresholding": {"thresholding": "dynamic"},
    "percentile": {"guidance": 4, "thresholding": "dynamic", "percentile": 90},
    "labels": {"labels": "dp_histogram"},
}
OWN = {
    "ddim": {"eta": {"eta": 1}},
    "dpm_solver": {"algorithm": {"algorithm": "sde-dpmsolver++"}},
    "heun": {
        "churn": {"churn": 1},
        "churn_interval": {"churn": 1, "churn_interval": [0.5, 3]},
        "churn_noise": {"churn": 1, "churn_noise": 1.3},
    },
}
# Those that decide how many there are, and how they are computed and stored.
OTHER = {
    "num_images": 5,
    "batch_size": 2,
    "format": "npz",
    "shard_size": 10,
    "precision": "bf16",
    "compile": False,
    "channels_last": True,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_described_or_decides_no_image(name):
    assert set(option(name)) == {*DECIDING, *OWN.get(name, {}), *OTHER}
    described = sampler_of(name).describe()
    for key, value in OTHER.items():
        assert sampler_of(name, **{key: value}).describe() == described


def test_samplers_of_unlike_images_have_unlike_descriptions(model):
    """Over every sampler and every key; each of them changes the images."""
    shares = [0.7, 0.2, 0.1]
    drawn = {}
    for name in NAMES:
        for settings in ({}, *DECIDING.values(), *OWN.get(name, {}).values()):
            sampler = sampler_of(name, num_images=5, **settings)
            by_shares = shares if sampler.labels == "dp_histogram" else None
            images = sampler(*model, CLASSES, 0, None, by_shares)
            content = images.pixels.tobytes() + images.labels.tobytes()
            drawn.setdefault(json.dumps(sampler.describe()), set()).add(content)
    assert all(len(contents) == 1 for contents in drawn.values())
    contents = [content for (content,) in drawn.values()]
    assert len(set(contents)) == len(contents)


@pytest.mark.parametrize("name", NAMES)
def test_descriptions_are_plain(name):
    settings = {"guidance": 1, "guidance_interval": [0, 1], "thresholding": "dynamic"}
    if name == "heun":
        settings |= {"churn": 3, "churn_interval": [0.5, 2]}
    described = sampler_of(name, **settings).describe()
    assert described["rule"] == name and described["steps"] == 3
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert yaml.safe_load(yaml.safe_dump(described)) == described


@pytest.mark.parametrize("key", ["steps", "num_images", "batch_size", "shard_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many"])
def test_wrong_counts_are_refused_by_key(key, value):
    assert f"sampler.{key}={value!r}" in refusal(sampler_of, "ddim", **{key: value})


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("ddim", {"labels": "empirical"}, "sampler.labels='empirical'"),
        ("ddim", {"num_images": NUM_STREAMS + 1}, f"sampler.num_images={NUM_STREAMS + 1}"),
        ("ddim", {"rule": "euler"}, "sampler.rule='euler'"),
        ("ddim", {"spacing": "even"}, "sampler.spacing='even'"),
        ("ddim", {"rho": 7}, "sampler.rho=7"),
        ("ddim", {"spacing": "karras", "rho": 0}, "sampler.rho=0"),
        ("ddim", {"thresholding": True}, "sampler.thresholding=True"),
        ("ddim", {"guidance_interval": [1, 2]}, "sampler.guidance_interval=[1.0, 2.0]"),
        ("ddim", {"format": "jpg"}, "sampler.format='jpg'"),
        ("ddim", {"precision": "16"}, "sampler.precision='16'"),
        ("ddim", {"compile": "yes"}, "sampler.compile='yes'"),
        ("ddim", {"channels_last": 1}, "sampler.channels_last=1"),
        ("ddim", {"eta": 1.5}, "sampler.eta=1.5"),
        ("ddim", {"eta": "abc"}, "sampler.eta='abc'"),
        ("ddim", {"churn": 1}, "sampler.churn is unknown to sampler=ddim"),
        ("unipc", {"eta": 1}, "sampler.eta is unknown to sampler=unipc"),
        ("ddpm", {"algorithm": "x"}, "sampler.algorithm is unknown to sampler=ddpm"),
        ("dpm_solver", {"algorithm": "dpmsolver"}, "sampler.algorithm='dpmsolver'"),
        ("heun", {"churn": -1}, "sampler.churn=-1"),
        ("heun", {"churn": 1, "churn_noise": 0}, "sampler.churn_noise=0"),
        ("heun", {"churn": 1, "churn_interval": [3, 2]}, "sampler.churn_interval=[3, 2]"),
        ("heun", {"churn_interval": [1, 2]}, "sampler.churn=0"),
        ("heun", {"churn_noise": 1.01}, "sampler.churn=0"),
    ],
)
def test_wrong_settings_are_refused_by_key(name, settings, named):
    assert named in refusal(sampler_of, name, **settings)


def test_lists_of_a_command_line_are_understood():
    """They are Hydra's, which are no lists of Python's."""
    overrides = ("sampler.guidance=1", "sampler.guidance_interval=[0.1,10]")
    sampler = instantiate(compose("sampler=ddim", *overrides).sampler)
    assert sampler.describe()["guidance_interval"] == [0.1, 10.0]
    churned = ("sampler.churn=1", "sampler.churn_interval=[0.1,10]")
    sampler = instantiate(compose("sampler=heun", *churned).sampler)
    assert sampler.describe()["churn_interval"] == [0.1, 10.0]


def test_every_rule_has_an_option():
    options = {path.stem for path in (conf_dir() / "sampler").glob("*.yaml")}
    assert options == {*RULES, "none"} and set(RULES) == set(NAMES)
