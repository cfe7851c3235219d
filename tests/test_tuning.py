"""Tuning on synthetic data: correlations against SciPy, regret by hand, grids with a known answer."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import compose
from hydra.utils import instantiate
from torch import nn

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.classifiers import train_classifier
from dp_synth.metrics.evaluator import Evaluator
from dp_synth.metrics.evidence import Evidence
from dp_synth.metrics.rank_correlation import bootstrap_interval, kendall, spearman
from dp_synth.metrics.record import Metrics
from dp_synth.metrics.tuning import Tuning, regret

SCIPY = {spearman: scipy.stats.spearmanr, kendall: scipy.stats.kendalltau}
CORRELATIONS = pytest.mark.parametrize("correlation", SCIPY)


# --- rank correlations -------------------------------------------------------------------------


@CORRELATIONS
@pytest.mark.parametrize("n", [2, 3, 7, 24])
@pytest.mark.parametrize("values", [2, 4, 1000])  # few of them tie
def test_correlations_are_scipys(correlation, n: int, values: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        x, y = rng.integers(values, size=(2, n)).astype(float)
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            assert np.isnan(correlation(x, y))
        else:
            assert correlation(x, y) == pytest.approx(SCIPY[correlation](x, y).statistic)


@CORRELATIONS
def test_many_correlations_at_once_are_those_one_by_one(correlation) -> None:
    x, y = np.random.default_rng(0).integers(5, size=(2, 11, 6)).astype(float)
    np.testing.assert_allclose(
        correlation(x, y), [correlation(*pair) for pair in zip(x, y, strict=True)]
    )


@CORRELATIONS
def test_correlations_see_only_ranks(correlation) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 13))
    assert correlation(np.exp(x), 3 * y - 1) == pytest.approx(correlation(x, y))
    assert correlation(x, -y) == pytest.approx(-correlation(x, y))


@CORRELATIONS
def test_bootstrap_interval_is_scipys(correlation) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=16)
    y = x + rng.normal(size=16)
    theirs = scipy.stats.bootstrap(
        (x, y),
        lambda a, b: SCIPY[correlation](a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1500,
        method="percentile",
        random_state=0,
    ).confidence_interval
    ours = bootstrap_interval(correlation, x, y, seed=0)
    np.testing.assert_allclose(ours, [theirs.low, theirs.high], atol=0.07)


@CORRELATIONS
def test_no_interval_of_few_points_or_of_a_constant(correlation) -> None:
    x = np.arange(7.0)
    assert bootstrap_interval(correlation, x[:4], x[:4], seed=0) is None
    assert bootstrap_interval(correlation, x, np.ones(7), seed=0) is None
    assert bootstrap_interval(correlation, x, x, seed=0) == pytest.approx((1, 1))


# --- regret ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen_by", "expected"),
    [([0.1, 0.9, 0.3], 0.3), ([0.9, 0.1, 0.3], 0.0), ([0.5, 0.5, 0.2], 0.15), ([1, 1, 1], 0.4)],
)
def test_regret_by_hand(chosen_by: list[float], expected: float) -> None:
    real = np.array([0.9, 0.6, 0.0])
    assert regret(np.array(chosen_by), real) == pytest.approx(expected)


# --- the part, with classifiers whose accuracy is known -----------------------------------------

REAL, SYNTHETIC = 40, 200  # pixel values that tell the two apart


class RightFor(nn.Module):
    """Right for a given share of the images, which are numbered by their second pixel."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = ((x[:, 0, 0, 1] + 1) * 127.5).round()
        right = (number < 100 * self.share).long()
        return nn.functional.one_hot(1 - right, 2).float()


def images(n: int, kind: int) -> Images:
    pixels = np.full((n, 8, 8, 1), kind, np.uint8)
    pixels[:, 0, 1, 0] = np.arange(n) * 100 // n
    return Images(pixels, np.zeros(n, np.int64), ("a", "b"))


class Trainer:
    """Stands for ``train_classifier``: on real images a setting is as good as ``real`` says."""

    def __init__(self, synthetic: dict[float, float], real: dict[float, float]) -> None:
        self.shares = {SYNTHETIC: synthetic, REAL: real}
        self.calls: list[tuple[int, int, dict]] = []

    def __call__(self, images: Images, *, seed: int, caption: str, lr: float, width: int = 1):
        kind = int(images.pixels[0, 0, 0, 0])
        self.calls.append((kind, seed, {"lr": lr, "width": width}))
        return RightFor(self.shares[kind][lr])


LRS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
RISING = {lr: lr + 0.2 for lr in LRS}
FALLING = {lr: 0.9 - lr for lr in LRS}


def tune(trainer: Trainer, repeats: int = 1, synthetic: int = 1000, **grid) -> Metrics:
    evidence = Evidence(
        synthetic=images(synthetic, SYNTHETIC),
        real_train=images(100, REAL),
        real_test=images(100, REAL),
        train_classifier=trainer,
        seed=7,
    )
    metrics = Metrics()
    Tuning(grid=grid or {"lr": LRS}, repeats=repeats, validation_fraction=0.5)(evidence, metrics)
    return metrics


def test_a_grid_in_which_synthetic_images_rank_as_real_ones() -> None:
    values = tune(Trainer(RISING, RISING)).values
    for name in ("spearman", "kendall"):
        for suffix in ("", ".tested_on_real"):
            for end in ("", ".ci_low", ".ci_high"):
                assert values[f"tuning/{name}{suffix}{end}"] == pytest.approx(1)
    assert values["tuning/regret"] == 0
    assert values["tuning/regret_of_random"] == pytest.approx(0.25, abs=0.011)
    assert values["tuning/chosen"] == 5
    for number, lr in enumerate(LRS):
        assert values[f"tuning/setting.{number}.real"] == pytest.approx(lr + 0.2, abs=0.011)


def test_a_grid_in_which_they_rank_backwards() -> None:
    values = tune(Trainer(FALLING, RISING)).values
    assert values["tuning/spearman"] == pytest.approx(-1)
    assert values["tuning/kendall.ci_high"] == pytest.approx(-1)
    assert values["tuning/regret"] == pytest.approx(0.5, abs=0.011)
    assert values["tuning/regret"] > values["tuning/regret_of_random"]


def test_a_grid_without_any_difference_has_no_correlation_and_no_regret() -> None:
    values = tune(Trainer(dict.fromkeys(LRS, 0.5), RISING)).values
    assert not [name for name in values if "spearman" in name or "kendall" in name]
    assert values["tuning/regret"] == pytest.approx(values["tuning/regret_of_random"])
    assert json.dumps(values, allow_nan=False)


def test_only_what_synthetic_images_tell_is_not_private() -> None:
    metrics = tune(Trainer(RISING, FALLING))
    public = {name for name, entry in metrics.meta.items() if not entry["private"]}
    points = {f"tuning/setting.{i}.synthetic_validation" for i in range(6)}
    assert public == {*points, "tuning/chosen"}
    again = tune(Trainer(RISING, RISING))
    assert all(again.values[name] == metrics.values[name] for name in public)
    assert again.values["tuning/setting.0.real"] != metrics.values["tuning/setting.0.real"]


def test_every_combination_is_trained_on_both_with_the_same_seeds() -> None:
    trainer = Trainer(RISING, RISING)
    metrics = tune(trainer, repeats=3, lr=LRS[:2], width=[1, 2, 5])
    assert sorted(map(str, trainer.calls)) == sorted(
        str((kind, 7 + repeat, {"lr": lr, "width": width}))
        for kind in (REAL, SYNTHETIC)
        for repeat in range(3)
        for lr in LRS[:2]
        for width in (1, 2, 5)
    )
    assert metrics.meta["tuning/setting.4.real"]["what"].endswith("with lr=0.2, width=2.")
    assert "tuning/setting.6.real" not in metrics.values


def test_repeats_are_averaged() -> None:
    class Seeded(Trainer):
        def __call__(self, images, *, seed, **settings):
            shares = {lr: lr + 0.1 * (seed - 7) for lr in LRS}
            self.shares = {REAL: shares, SYNTHETIC: shares}
            return super().__call__(images, seed=seed, **settings)

    values = tune(Seeded({}, {}), repeats=3).values
    assert values["tuning/setting.2.real"] == pytest.approx(0.4, abs=0.011)


def test_validation_images_are_kept_from_training() -> None:
    trainer = Trainer(RISING, RISING)
    seen: list[np.ndarray] = []

    def spy(images: Images, *, seed: int, caption: str, lr: float):
        seen.append(images.pixels)
        return trainer(images, seed=seed, caption=caption, lr=lr)

    synthetic = images(37, SYNTHETIC)
    pixels = synthetic.pixels.copy()
    pixels[:, 7, 7, 0] = np.arange(37)
    evidence = Evidence(
        synthetic=Images(pixels, synthetic.labels, synthetic.classes),
        real_train=images(10, REAL),
        real_test=images(10, REAL),
        train_classifier=spy,
    )
    metrics = Metrics()
    Tuning(grid={"lr": LRS}, repeats=1, validation_fraction=0.3)(evidence, metrics)
    kept = metrics.meta["tuning/setting.0.synthetic_validation"]["n"]
    assert kept == 11
    assert {len(np.unique(rows[:, 7, 7, 0])) for rows in seen[::2]} == {37 - kept}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_synthetic_images(n: int) -> None:
    values = tune(Trainer(RISING, RISING), synthetic=n).values
    assert bool(values) == (n > 1)  # one cannot be both trained on and kept
    assert json.dumps(values, allow_nan=False)


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": {"lr": 0.1}}, r"grid.lr=0.1 must be a list"),
        ({"grid": {"optimizer": "adam"}}, r"grid.optimizer='adam' must be a list"),
        ({"grid": {"lr": [0.1]}}, "has 1 settings"),
        ({"grid": {"lr": [0.1, 0.2], "width": []}}, "has 0 settings"),
        ({"grid": {}}, "has 1 settings"),
        ({"repeats": 0}, "tuning.repeats=0"),
        ({"validation_fraction": 0}, "validation_fraction=0 "),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 "),
    ],
)
def test_mistakes_are_named(options: dict, message: str) -> None:
    sound = {"grid": {"lr": [0.1, 0.2]}, "repeats": 1, "validation_fraction": 0.5}
    with pytest.raises(UserError, match=message):
        Tuning(**(sound | options))


@pytest.mark.parametrize("key", ["learning_rate", "seed", "images"])
def test_a_key_that_is_no_setting_is_named_before_anything_is_trained(key: str) -> None:
    trainer = Trainer(RISING, RISING)
    with pytest.raises(UserError, match=f"tuning.grid.{key} is no setting"):
        tune(trainer, **{key: [1, 2]})
    assert trainer.calls == []


def test_keys_are_checked_through_partial_functions() -> None:
    partial = functools.partial(train_classifier, steps=1, batch_size=1, device="cpu")
    evidence = Evidence(
        synthetic=images(9, SYNTHETIC),
        real_train=images(9, REAL),
        real_test=images(9, REAL),
        train_classifier=functools.partial(partial, flip=False),
    )
    with pytest.raises(UserError, match="grid.learning_rate"):
        Tuning(grid={"learning_rate": [1, 2]}, repeats=1, validation_fraction=0.5)(
            evidence, Metrics()
        )


# --- the config --------------------------------------------------------------------------------


def test_the_configured_grid_is_trained_by_the_configured_classifier(tmp_path: Path) -> None:
    cfg = compose("evaluator=tuning", "evaluator.tuning.grid.steps=[2]").evaluator
    evaluator = instantiate(cfg)
    assert isinstance(evaluator, Evaluator)
    part = evaluator.parts["tuning"]
    assert 12 <= len(part.settings) <= 24
    evidence = Evidence(
        synthetic=images(30, SYNTHETIC),
        real_train=images(20, REAL),
        real_test=images(20, REAL),
        train_classifier=evaluator.classifier,
    )
    metrics = Metrics()
    part(evidence, metrics)
    assert f"tuning/setting.{len(part.settings) - 1}.real" in metrics.values
    assert json.dumps([metrics.values, metrics.meta], allow_nan=False)
