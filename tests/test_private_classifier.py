"""The DP-SGD baseline: what it states, how far one example moves it, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from toy_images import PLACES, toy

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.classifier_networks import SmallCNN
from dp_synth.metrics.classifiers import predict
from dp_synth.metrics.estimates import accuracy
from dp_synth.metrics.private_classifier import PrivateClassifier, _offsets
from dp_synth.privacy.clipping import ClippingEngine
from dp_synth.privacy.plan import PrivacyPlan

classifier = partial(
    PrivateClassifier,
    network=partial(SmallCNN, width=4, norm="group"),
    steps=3,
    multiplicity=2,
    max_grad_norm=0.5,
    lr=0.3,
    ema_decay=0.9,
    device="cpu",
)


def run_plan(n: int, **changed: object) -> PrivacyPlan:
    options = {
        "eps": 8.0,
        "delta": 1e-5,
        "max_grad_norm": 1.0,
        "batch_size": max(1, n // 3),
        "steps": 50,
        "num_examples": n,
        "accountant": "rdp",  # the faster one
    }
    return PrivacyPlan(**(options | changed))  # type: ignore[arg-type]


def repeatable(trainer: PrivateClassifier, n: int, **changed: object) -> PrivacyPlan:
    return replace(trainer.plan(run_plan(n, **changed)), unsafe_repeatable_randomness=0)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_the_plan_keeps_the_runs_promise_with_steps_of_its_own(batch_size: int | None) -> None:
    run = run_plan(61, unit="patient", accountant="prv")
    plan = classifier(batch_size=batch_size).plan(run)
    assert (plan.delta, plan.num_examples) == (run.delta, run.num_examples)
    assert (plan.unit, plan.accountant) == ("patient", "prv")
    assert (plan.steps, plan.multiplicity, plan.max_grad_norm) == (3, 2, 0.5)
    assert plan.batch_size == (batch_size or run.batch_size)
    assert plan.noise_multiplier is not None
    assert plan.epsilon() <= run.eps * (1 + 1e-6) and plan.epsilon() > 0.9 * run.eps
    (query,) = plan.statement(plan.steps, "finished")["queries"]
    assert query["eps"] == plan.epsilon() and query["sample_rate"] == plan.batch_size / 61


def test_a_runs_calibrated_noise_is_not_taken_over() -> None:
    run = run_plan(61).calibrate()
    assert classifier().plan(run) == classifier().plan(run_plan(61))


def test_it_learns_at_a_large_eps() -> None:
    trainer = classifier(steps=60, multiplicity=1, max_grad_norm=1.0)
    model = trainer.train(toy(300, 1), trainer.plan(run_plan(300, eps=5000)), seed=0)
    assert not model.training
    assert accuracy(predict(model, toy(200, 2)), toy(200, 2)).value > 0.9


def test_it_learns_nothing_at_a_tiny_eps() -> None:
    trainer = classifier(steps=20, multiplicity=1, max_grad_norm=1.0)
    accuracies = []
    for seed in range(5):
        # Four classes apart: one network of pure noise may tell them by luck, five may not.
        plan = replace(trainer.plan(run_plan(300, eps=0.005)), unsafe_repeatable_randomness=seed)
        model = trainer.train(toy(300, 1), plan, seed=0)
        accuracies.append(accuracy(predict(model, toy(900, 2)), toy(900, 2)).value)
    assert np.mean(accuracies) < 0.5


def first_sum(images: Images, monkeypatch: pytest.MonkeyPatch, **changed: object) -> torch.Tensor:
    """The sum that the engine hands to the noise in the first step of repeatable training."""
    sums: list[torch.Tensor] = []
    accumulate = ClippingEngine.accumulate

    def spy(engine: ClippingEngine, loss, rows, multiplicity: int = 1) -> None:
        accumulate(engine, loss, rows, multiplicity)
        sums.append(torch.cat([p.grad.flatten().clone() for p in engine.net.parameters()]))

    trainer = classifier(steps=1)
    plan = repeatable(trainer, images.num_examples, **changed)
    with monkeypatch.context() as patch:
        patch.setattr(ClippingEngine, "accumulate", spy)
        patch.setattr(trainer, "_check", lambda *_: None)
        trainer.train(images, plan, flip=True, seed=0)
    (total,) = sums
    return total


def with_units(images: Images, units: np.ndarray) -> Images:
    return Images(images.pixels, images.labels, images.classes, units)


@pytest.mark.parametrize("changed", [0, 5, 12])
def test_a_changed_example_moves_the_sum_by_at_most_twice_the_bound(
    changed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = toy(13, 0)
    pixels, labels = images.pixels.copy(), images.labels.copy()
    pixels[changed] = 255 - pixels[changed]
    labels[changed] = (labels[changed] + 1) % PLACES
    neighbour = Images(pixels, labels, images.classes)
    # A batch of all examples: each is in it.
    sums = [first_sum(data, monkeypatch, batch_size=13) for data in (images, neighbour)]
    moved = float((sums[0] - sums[1]).norm())
    assert 0 < moved <= 2 * 0.5 * (1 + 1e-4)


@pytest.mark.parametrize("units", [None, np.arange(13) // 3])
def test_a_removed_example_moves_the_sum_by_at_most_the_bound(
    units: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last example (unit) could not be read: it counts in N and contributes nothing."""
    images = toy(13, 0) if units is None else with_units(toy(13, 0), units)
    last = np.arange(13) == 12
    without = replace(images.select(~last), missing=1)
    n = images.num_examples
    assert without.num_examples == n
    sums = [first_sum(data, monkeypatch, batch_size=n) for data in (images, without)]
    moved = float((sums[0] - sums[1]).norm())
    assert 0 < moved <= 0.5 * (1 + 1e-4)


def test_noise_is_added_once_a_step_of_the_planned_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients of zero, SGD's one step is noise alone: lr * C * multiplier / batch size."""
    trainer = classifier(steps=1, ema_decay=0.0)
    images = toy(30, 0)
    plan = trainer.plan(run_plan(30))
    start = trainer.network(images.shape, PLACES)
    monkeypatch.setattr(trainer, "_check", lambda *_: None)
    monkeypatch.setattr(ClippingEngine, "accumulate", lambda engine, *_: zero_grads(engine.net))
    monkeypatch.setattr("dp_synth.metrics.private_classifier.build", lambda *_: start)
    before = torch.cat([p.detach().flatten().clone() for p in start.parameters()])
    model = trainer.train(images, plan, seed=0)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert plan.noise_multiplier is not None
    expected = 0.3 * 0.5 * plan.noise_multiplier / plan.batch_size
    assert len(moved) > 2000
    assert moved.std().item() == pytest.approx(expected, rel=0.07)


def zero_grads(net: torch.nn.Module) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_two_trainings_differ_whatever_the_seed_and_leave_global_random_state() -> None:
    trainer, images = classifier(), toy(20, 0)
    plan = trainer.plan(run_plan(20))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    first, second = (weights(trainer.train(images, plan, seed=0)) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]


def test_repeatable_randomness_repeats() -> None:
    trainer, images = classifier(), toy(20, 0)
    plan = repeatable(trainer, 20)
    first, second = (weights(trainer.train(images, plan, seed=0)) for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_private_is_shown(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Two data sets of one size and shape leave the same text, whatever is in them."""
    trainer = classifier()
    plan = repeatable(trainer, 40)
    shown = []
    for images in (
        toy(40, 0),
        Images(np.zeros((40, 8, 8, 1), np.uint8), toy(40, 5).labels, tuple("abcd")),
    ):
        caplog.clear()
        trainer.train(images, plan, seed=0)
        shown.append((capfd.readouterr(), caplog.text))
    assert shown[0] == shown[1]
    assert shown[0][0].out == ""


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_examples_and_empty_batches(n: int) -> None:
    trainer = classifier(steps=8, batch_size=1)
    model = trainer.train(toy(n, 0), trainer.plan(run_plan(n)), seed=0)
    assert weights(model).isfinite().all()


def test_a_plan_for_another_number_is_refused() -> None:
    trainer = classifier()
    with pytest.raises(ValueError, match="num_examples=7, not 8"):
        trainer.train(toy(8, 0), trainer.plan(run_plan(7)), seed=0)


def test_batch_normalisation_is_refused() -> None:
    trainer = classifier(network=partial(SmallCNN, width=4))
    with pytest.raises(UserError, match="GroupNorm"):
        trainer.train(toy(8, 0), trainer.plan(run_plan(8)), seed=0)


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 0},
        {"batch_size": 0.5},
        {"multiplicity": 0},
        {"max_grad_norm": -1},
        {"lr": 0},
        {"ema_decay": 1.1},
        {"max_shift": -1},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    (name,) = setting
    with pytest.raises(UserError, match=f"evaluator.utility.dp_classifier.{name}="):
        classifier(**setting)


@pytest.mark.parametrize("most", [0, 1, 2, 7])
def test_offsets_are_uniform_whole_numbers(most: int) -> None:
    just_below_1 = torch.tensor([0.0, 1 - 2**-24])
    assert _offsets(just_below_1, most).tolist() == [-most, most]
    even = (torch.arange(1000 * (2 * most + 1)) + 0.5) / (1000 * (2 * most + 1))
    values, counts = _offsets(even, most).unique(return_counts=True)
    assert values.tolist() == list(range(-most, most + 1))
    assert (counts - 1000).abs().max() <= 1
