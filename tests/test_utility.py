"""Utility: what is trained on what, seeds and ensembles, baselines, and the query that one is."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from toy_images import PLACES, mislabelled, toy

from dp_synth import evaluate
from dp_synth.data.folder import read_image_folder, write_image_folder
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.answers import Answers
from dp_synth.metrics.classifier_networks import SmallCNN
from dp_synth.metrics.evidence import Evidence
from dp_synth.metrics.names import split_accuracies
from dp_synth.metrics.private_classifier import PrivateClassifier
from dp_synth.metrics.record import Metrics
from dp_synth.metrics.utility import Utility
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.sample import fresh_samples

TEST = toy(83, 4)


class Noisy(nn.Module):
    """Knows the bars' places, and errs now and then as its seed has it."""

    def __init__(self, seed: int, error: float) -> None:
        super().__init__()
        self.seed, self.error = seed, nn.Parameter(torch.tensor(error))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = 20 * x.mean(dim=(1, 3)).unflatten(1, (PLACES, -1)).mean(dim=2)
        wrong = np.random.default_rng(self.seed).random(len(x)) < self.error.item()
        return torch.where(torch.from_numpy(wrong)[:, None], logits.roll(1, dims=1), logits)


class Trainer:
    """Stands in for ``train_classifier`` and remembers what it was given."""

    def __init__(self, error: float = 0.1) -> None:
        self.error = error
        self.calls: list[tuple[Images, dict[str, Any]]] = []

    def __call__(self, images: Images, **options: Any) -> nn.Module:
        self.calls.append((images, options))
        return Noisy(options["seed"], options.get("network", lambda: self.error)())


def measure(utility: Utility, trainer: Trainer | None = None, **changed: Any) -> Metrics:
    options: dict[str, Any] = {
        "synthetic": toy(200, 1),
        "real_train": toy(120, 3),
        "real_test": TEST,
        "train_classifier": trainer or Trainer(),
    }
    metrics = Metrics()
    utility(Evidence(**(options | changed)).matched(), metrics)
    assert set(metrics.values) == set(metrics.meta)
    return metrics


def error_of(*seeds: int) -> float:
    right = [np.random.default_rng(seed).random(83) < 0.1 for seed in seeds]
    return float(np.mean(right))


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_accuracy_is_the_mean_over_seeds(seeds: int) -> None:
    metrics = measure(Utility(validation_fraction=0, seeds=seeds), seed=7)
    expected = 1 - error_of(*range(7, 7 + seeds))
    for name in ("utility/accuracy", "utility/accuracy.real"):
        assert metrics.values[name] == pytest.approx(expected)
        assert metrics.values[f"{name}.ci_low"] < expected < metrics.values[f"{name}.ci_high"]
        assert metrics.meta[name]["n"] == 83
        assert ("mean over" in metrics.meta[name]["what"]) is (seeds > 1)
    assert ("utility/accuracy.ensemble" in metrics.values) is (seeds > 1)


def test_an_ensemble_outvotes_its_members() -> None:
    metrics = measure(Utility(validation_fraction=0, seeds=5))
    assert metrics.values["utility/accuracy.ensemble"] > metrics.values["utility/accuracy"] + 0.05
    assert "5 classifiers" in metrics.meta["utility/accuracy.ensemble"]["what"]


def test_an_ensemble_averages_probabilities() -> None:
    images = Images(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1]), ("a", "b"))
    sure, unsure = [[0.9, 0.1], [0.6, 0.4]], [[0.4, 0.6], [0.1, 0.9]]
    answers = Answers(images, {"one": np.array([sure, unsure, unsure], np.float32)})
    assert answers.num_classifiers == 3
    assert answers.ensemble().value == 1.0
    assert answers.accuracy().value == pytest.approx(0.5)
    assert answers.recall()["b"].value == pytest.approx(2 / 3)


def test_each_network_has_a_metric_and_the_accuracy_is_their_mean() -> None:
    networks = {"good": lambda: 0.0, "bad": lambda: 1.0}
    trainer = Trainer()
    metrics = measure(Utility(validation_fraction=0.1, seeds=2, networks=networks), trainer)  # type: ignore[arg-type]
    assert metrics.values["utility/accuracy.classifier.good"] == 1
    assert metrics.values["utility/accuracy.classifier.bad"] == 0
    assert metrics.values["utility/accuracy"] == 0.5
    assert metrics.values["utility/accuracy.synthetic_validation"] == 0.5
    assert metrics.values["utility/recall.a"] == 0.5
    assert "good and bad" in metrics.meta["utility/accuracy"]["what"]
    assert len(trainer.calls) == 2 * 2 * 2
    assert split_accuracies(metrics.values) == {}


def test_every_set_is_trained_on_in_the_same_way() -> None:
    trainer = Trainer()
    options = {"public_only": mislabelled(toy(150, 2)), "seed": 3}
    measure(Utility(validation_fraction=0.1, seeds=2), trainer, **options)
    settings = [{k: v for k, v in call.items() if k != "caption"} for _, call in trainer.calls]
    assert settings == 3 * [{"seed": 3}, {"seed": 4}]
    assert [len(images) for images, _ in trainer.calls] == [180, 180, 135, 135, 120, 120]


def test_validation_images_are_never_trained_on() -> None:
    trainer = Trainer()
    metrics = measure(Utility(validation_fraction=0.3, sizes=[140]), trainer)
    assert metrics.meta["utility/accuracy.synthetic_validation"]["n"] == 60
    (first, _), (second, _), _ = trainer.calls
    assert sorted(map(bytes, first.pixels)) == sorted(map(bytes, second.pixels))
    everything = sorted(map(bytes, toy(200, 1).pixels))
    assert len(first) == 140 and set(map(bytes, first.pixels)) < set(everything)


def test_a_curve_over_sizes_has_nested_sets_and_no_point_beyond_them() -> None:
    trainer = Trainer()
    metrics = measure(Utility(validation_fraction=0.1, sizes=[1, 17, 180, 181]), trainer)
    sizes = [name for name in metrics.values if ".size." in name and "ci_" not in name]
    assert sizes == [f"utility/accuracy.size.{n}" for n in (1, 17, 180)]
    _, one, some, all_of_them, _ = (list(map(bytes, images.pixels)) for images, _ in trainer.calls)
    assert one == some[:1] and some == all_of_them[:17]
    assert split_accuracies(metrics.values) == {}


def test_a_non_private_generator_is_a_baseline(tmp_path: Path) -> None:
    write_image_folder(mislabelled(toy(90, 6)), tmp_path)
    trainer = Trainer()
    utility = Utility(validation_fraction=0.1, non_private_samples=tmp_path)
    metrics = measure(utility, trainer)
    assert len(trainer.calls[-1][0]) == 81
    name = "utility/accuracy.non_private_generator"
    assert metrics.meta[name]["private"] and "without privacy" in metrics.meta[name]["what"]


def test_a_non_private_generator_of_other_images_is_refused(tmp_path: Path) -> None:
    write_image_folder(toy(9, 6, side=16), tmp_path)
    with pytest.raises(UserError, match="evaluator.utility.non_private_samples holds images"):
        measure(Utility(validation_fraction=0.1, non_private_samples=tmp_path))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seeds": 0}, "evaluator.utility.seeds=0"),
        ({"sizes": [5, 0]}, "evaluator.utility.sizes=0"),
        ({"fresh_epochs": -1}, "evaluator.utility.fresh_epochs=-1"),
        ({"non_private_samples": "nowhere"}, "evaluator.utility.non_private_samples=nowhere"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Utility(validation_fraction=0.1, **setting)


# --- images without end ----------------------------------------------------------------------


def test_fresh_images_are_as_many_as_the_training_images_and_no_two_sets_alike() -> None:
    trainer, asked = Trainer(), []

    def draw(num_images: int, seed: int) -> Images:
        asked.append((num_images, seed))
        return toy(num_images, seed)

    utility = Utility(validation_fraction=0.1, seeds=2, fresh_epochs=3)
    metrics = measure(utility, trainer, fresh=draw, seed=5)
    assert not asked  # that is for the training to do, as far as its steps go
    calls = [(images, options) for images, options in trainer.calls if "fresh" in options]
    assert [options["seed"] for _, options in calls] == [5, 6]
    assert all(np.array_equal(images.pixels, trainer.calls[0][0].pixels) for images, _ in calls)
    sets = [draw_set() for _, options in calls for draw_set in options["fresh"]]
    assert [len(images) for images in sets] == 6 * [180]
    assert len({seed for _, seed in asked}) == 6 and min(seed for _, seed in asked) > 1000
    estimate = [metrics.values[f"utility/accuracy.fresh{e}"] for e in (".ci_low", "", ".ci_high")]
    assert estimate == sorted(estimate) and estimate[0] < estimate[2]
    entry = metrics.meta["utility/accuracy.fresh"]
    assert entry["private"] and entry["n"] == 83 and "drawn anew" in entry["what"]
    assert split_accuracies(metrics.values) == {}


def test_classes_of_fresh_images_are_matched_by_name() -> None:
    def draw(num_images: int, seed: int) -> Images:
        images = toy(num_images, seed)
        return Images(images.pixels, 3 - images.labels, images.classes[::-1])

    trainer = Trainer()
    measure(Utility(validation_fraction=0.1, fresh_epochs=1), trainer, fresh=draw)
    (options,) = (options for _, options in trainer.calls if "fresh" in options)
    images = options["fresh"][0]()
    assert list(images.classes) == list("abcd")
    heights = images.pixels[..., 0].mean(axis=2).reshape(180, PLACES, -1).mean(axis=2)
    np.testing.assert_array_equal(heights.argmax(axis=1), images.labels)


@pytest.mark.parametrize(("epochs", "fresh"), [(0, toy), (3, None)])
def test_no_fresh_images_no_such_metric(epochs: int, fresh: Any) -> None:
    metrics = measure(Utility(validation_fraction=0.1, fresh_epochs=epochs), fresh=fresh)
    assert "utility/accuracy.fresh" not in metrics.values


def test_fresh_images_are_drawn_as_the_runs_own(run_copy) -> None:
    draw = fresh_samples(run_copy)
    one, same, other = draw(13, 0), draw(13, 0), draw(13, 7)
    assert len(one) == 13 and one.shape == (1, 8, 8)
    np.testing.assert_array_equal(one.pixels, same.pixels)
    assert not np.array_equal(one.pixels, other.pixels)
    # The run's seed, number and sampler give the run's samples.
    own = read_image_folder(run_copy.samples_dir)
    again = draw(len(own), run_copy.config().seed)
    assert sorted(map(bytes, again.pixels)) == sorted(map(bytes, own.pixels))


def test_without_a_sampler_or_a_model_nothing_is_drawn(run_copy) -> None:
    cfg = run_copy.config()
    cfg.sampler = {}
    OmegaConf.save(cfg, run_copy.config_path)
    assert fresh_samples(run_copy) is None
    shutil.rmtree(run_copy.model_dir)
    assert fresh_samples(run_copy) is None


def test_only_the_runs_own_samples_are_continued(command, run_copy) -> None:
    shutil.copytree(run_copy.samples_dir, run_copy.path / "others")
    briefly = ("evaluator.classifier.steps=2", "evaluator.utility.fresh_epochs=1")
    arguments = (f"run={run_copy.path}", "evaluator.memorization=null", *briefly)
    outcome = command(evaluate, *arguments, f"samples={run_copy.path / 'others'}")
    assert outcome.code == 0 and "utility/accuracy.fresh" not in outcome.out
    outcome = command(evaluate, *arguments)
    assert outcome.code == 0, outcome.err
    assert 0 <= run_copy.metrics()["utility/accuracy.fresh"] <= 1
    assert "sampling" not in outcome.err


# --- calibration -----------------------------------------------------------------------------


def test_calibration_error_is_that_of_the_classifier() -> None:
    sure = measure(Utility(validation_fraction=0), Trainer(error=0.0))
    wrong = measure(Utility(validation_fraction=0), Trainer(error=1.0))
    name = "utility/calibration_error"
    assert sure.values[name] < 0.01 and wrong.values[name] > 0.99
    assert sure.meta[name]["private"] and sure.meta[name]["n"] == 83


# --- the DP-SGD baseline ---------------------------------------------------------------------

dp_classifier = PrivateClassifier(
    network=functools.partial(SmallCNN, width=4, norm="group"),
    steps=2,
    multiplicity=1,
    max_grad_norm=1.0,
    lr=0.3,
    ema_decay=0.9,
    device="cpu",
)
PLAN = PrivacyPlan(
    eps=3, delta=1e-4, max_grad_norm=0.5, batch_size=40, steps=9, num_examples=120, accountant="rdp"
)


def test_a_dp_classifier_is_recorded_before_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    train = PrivateClassifier.train

    def spy(self: PrivateClassifier, *args: Any, **options: Any) -> nn.Module:
        events.append(options["flip"])
        return train(self, *args, **options)

    monkeypatch.setattr(PrivateClassifier, "train", spy)
    utility = Utility(validation_fraction=0.1, dp_classifier=dp_classifier)
    metrics = measure(utility, plan=PLAN, flip=True, record_query=events.append)
    query, flip = events
    assert flip is True
    assert query["query"] == "dp_sgd_classifier"
    assert 0 < query["eps"] <= PLAN.eps and query["delta"] == PLAN.delta
    assert (query["steps"], query["sample_rate"]) == (2, 40 / 120)
    entry = metrics.meta["utility/accuracy.dp_classifier"]
    assert entry["private"] and entry["n"] == 83
    for words in ("DP-SGD", "delta = 0.0001", "a private query of its own"):
        assert words in entry["what"]


def test_without_a_private_run_there_is_no_dp_classifier() -> None:
    events: list[Any] = []
    utility = Utility(validation_fraction=0.1, dp_classifier=dp_classifier)
    metrics = measure(utility, plan=None, record_query=events.append)
    assert "utility/accuracy.dp_classifier" not in metrics.values and not events


def test_units_and_unread_examples_reach_the_dp_classifier() -> None:
    images = toy(120, 3)
    units = Images(images.pixels, images.labels, images.classes, np.arange(120) // 5, missing=2)
    utility = Utility(validation_fraction=0.1, dp_classifier=dp_classifier)
    plan = PrivacyPlan(
        eps=3,
        delta=1e-4,
        max_grad_norm=1,
        batch_size=7,
        steps=9,
        num_examples=24 + 2,
        unit="patient",
        accountant="rdp",
    )
    assert "utility/accuracy.dp_classifier" in measure(utility, real_train=units, plan=plan).values


# --- the protocols ---------------------------------------------------------------------------

BRIEFLY = (
    "evaluator.classifier.steps=2",
    "evaluator.classifier.batch_size=4",
    "evaluator.classifier.width=1",
    "evaluator.feature_classifier.steps=2",
    "evaluator.fidelity=null",
)


def test_the_papers_protocol_runs_and_its_query_is_in_the_statement(command, run_copy) -> None:
    (before,) = run_copy.statement()["queries"]
    outcome = command(
        evaluate,
        f"run={run_copy.path}",
        "evaluator=paper",
        *BRIEFLY,
        "evaluator.utility.seeds=2",
        "evaluator.utility.sizes=[10]",
        "evaluator.utility.fresh_epochs=1",
        "evaluator.utility.dp_classifier.steps=1",
        "evaluator.utility.dp_classifier.multiplicity=2",
        "evaluator.utility.dp_classifier.batch_size=16",
        "evaluator.utility.dp_classifier.network.depth=10",
        "+evaluator.utility.dp_classifier.network.width=1",
    )
    assert outcome.code == 0, outcome.err
    metrics, statement = run_copy.metrics(), run_copy.statement()
    for name in ("", ".ensemble", ".size.10", ".fresh", ".dp_classifier", ".real", ".public_only"):
        assert 0 <= metrics[f"utility/accuracy{name}"] <= 1
    same, query = statement["queries"]
    assert same == before
    assert query["query"] == "dp_sgd_classifier" and query["steps"] == 1
    assert query["delta"] == statement["delta"] and 0 < query["eps"] <= statement["eps_planned"]
    assert len(statement["unaccounted_looks"]) == 2


@pytest.mark.parametrize(
    ("option", "millions"),
    [
        ("dpimagebench", {"resnet": 1.7, "wrn": 8.9, "resnext": 34.4}),
        ("dpimagebench_cifar", {"resnet": 2.6, "wrn": 36.5, "resnext": 40.6}),
    ],
)
def test_dpimagebenchs_networks_have_its_sizes(option: str, millions: dict[str, float]) -> None:
    evaluator = instantiate(compose(f"evaluator={option}", "evaluator.fidelity=null").evaluator)
    networks = evaluator.parts["utility"].networks
    with torch.device("meta"):
        models = {name: network((3, 32, 32), 10) for name, network in networks.items()}
    found = {name: sum(p.numel() for p in m.parameters()) / 1e6 for name, m in models.items()}
    assert {name: round(count, 1) for name, count in found.items()} == millions


@pytest.mark.parametrize("option", ["paper", "dpimagebench", "dpimagebench_cifar"])
def test_a_protocol_takes_over_no_setting_of_the_quick_one(option: str) -> None:
    quick, other = (compose(f"evaluator={name}").evaluator.classifier for name in ("quick", option))
    same = {key for key in quick if quick[key] == other.get(key)}
    assert same <= {"_target_", "_partial_", "batch_size"}
