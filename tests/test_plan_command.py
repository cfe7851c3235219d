"""``plan`` tells the price of a run from declared facts alone, in numbers that agree."""

import json

import pytest
import torch
from conftest import compose, files_below

from dp_synth import plan
from dp_synth.building import build_network
from dp_synth.data import digits, font_digits
from dp_synth.data.images import Images
from dp_synth.privacy import accounting


@pytest.fixture
def no_data(monkeypatch):
    """A machine on which there is no image to open."""

    def missing(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(digits, "load", missing)
    monkeypatch.setattr(font_digits, "load", missing)
    monkeypatch.setattr(Images, "__post_init__", missing)


@pytest.fixture
def priced(command, no_data, tmp_path):
    """A function: overrides -> (what was printed, what was written)."""

    def price(*overrides):
        out = tmp_path / "price.json"
        outcome = command(plan, "experiment=smoke", f"plan.out={out}", *overrides)
        assert outcome.code == 0 and outcome.err == "", outcome
        assert set(files_below(tmp_path)) == {"price.json"}
        return outcome.out, json.loads(out.read_text())

    return price


def test_the_numbers_agree_with_each_other_and_with_the_config(
    priced, tmp_path_factory, monkeypatch
):
    # With a cache of its own: a public model that is there costs no hours.
    monkeypatch.setenv("DP_SYNTH_CACHE", str(tmp_path_factory.mktemp("cache")))
    printed, price = priced()
    cfg = compose("experiment=smoke")
    assert price["dataset"] == "digits" and price["num_examples"] == cfg.dataset.num_examples
    assert price["sample_rate"] == cfg.privacy.batch_size / cfg.dataset.num_examples
    for key in ("steps", "batch_size", "multiplicity", "max_grad_norm", "delta"):
        assert price[key] == cfg.privacy[key]
    assert price["eps"] <= cfg.privacy.eps and price["eps"] == pytest.approx(10, rel=2e-3)
    assert price["eps"] <= price["eps_rdp"]
    again = accounting.epsilon(
        noise_multiplier=price["noise_multiplier"],
        sample_rate=price["sample_rate"],
        steps=price["steps"],
        delta=price["delta"],
    )
    assert price["eps"] == again

    steps, curve = zip(*price["eps_curve"], strict=True)
    assert steps[0] == 0 and curve[0] == 0
    assert steps[-1] == price["steps"] and curve[-1] == price["eps"]
    assert sorted(set(steps)) == list(steps) and sorted(curve) == list(curve)

    net = build_network(cfg, tuple(cfg.dataset.image_shape), cfg.dataset.num_classes)
    assert price["parameters"] == sum(p.numel() for p in net.parameters())
    assert price["trainable_parameters"] == price["parameters"]
    assert price["sampled_images"] == cfg.sampler.num_images
    hours = [price[f"hours_{phase}"] for phase in ("pretraining", "fine_tuning", "sampling")]
    assert all(0 < h < 1 for h in hours) and price["memory_mib"] > 0
    assert price["adjacency"] == "zero_out" and price["unit"] == "example"

    for number in (f"{price['noise_multiplier']:.4f}", "1,437", f"{price['parameters']:,}"):
        assert number in printed
    assert "no image was opened" in printed


def test_what_is_switched_off_costs_nothing(priced):
    _, price = priced("public=none", "sampler=none", "model.trainable=attention")
    assert price["hours_pretraining"] == price["hours_sampling"] == price["sampled_images"] == 0
    assert 0 < price["trainable_parameters"] < price["parameters"]


def test_a_run_without_privacy_has_no_eps(priced):
    printed, price = priced("privacy=none")
    assert price["eps"] is None and "eps_curve" not in price
    assert "Privacy             none" in printed


def test_a_smaller_budget_takes_more_noise(priced):
    noise = [priced(f"privacy.eps={eps}", "public=none")[1]["noise_multiplier"] for eps in (1, 10)]
    assert noise[0] > noise[1]


def test_the_plan_is_what_the_run_then_states(priced, finished_run):
    _, price = priced("public=none")
    statement = finished_run.statement()
    shared = set(price) & set(statement)
    assert {"eps", "noise_multiplier", "sample_rate", "steps", "delta"} <= shared
    assert {key: price[key] for key in shared} == {key: statement[key] for key in shared}


def test_planning_leaves_global_randomness_to_training(no_data):
    """The network that plan builds is the one that train builds: same public seed, same weights."""
    cfg = compose("experiment=smoke")
    nets = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        nets.append(build_network(cfg, (1, 8, 8), 10))
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one, other)
