"""The classes' shares: sensitivity, noise, cost, and what samplers make of them."""

import numpy as np
import pytest
import torch
from conftest import SHORT, compose, refusal
from scipy import stats

from dp_synth import train
from dp_synth.data.images import Images
from dp_synth.declaration import declare
from dp_synth.privacy.accounting import composed
from dp_synth.privacy.label_histogram import SENSITIVITY, label_histogram, noised_shares, shares
from dp_synth.privacy.noise import GeneratorNoise
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.runs import Run
from dp_synth.sampling.labels import apportion

PLAN = PrivacyPlan(eps=2, delta=1e-3, max_grad_norm=1, batch_size=7, steps=11, num_examples=101)
CLASSES = ("a", "b", "c", "d", "e")


def labelled(labels, units=None):
    """Images of given labels; their pixels do not matter."""
    labels = np.asarray(labels, dtype=np.int64)
    pixels = np.zeros((len(labels), 1, 1, 1), np.uint8)
    return Images(pixels, labels, CLASSES, units)


@pytest.mark.parametrize("n", [0, 1, 2, 101])
def test_the_histogram_of_examples_counts_them(n):
    labels = np.random.default_rng(n).integers(len(CLASSES), size=n)
    counted = [np.sum(labels == k) for k in range(len(CLASSES))]
    assert label_histogram(labelled(labels)).tolist() == counted


@pytest.mark.parametrize("seed", range(5))
def test_leaving_one_unit_out_moves_the_histogram_by_at_most_the_sensitivity(seed):
    rng = np.random.default_rng(seed)
    labels, units = rng.integers(len(CLASSES), size=97), rng.integers(-3, 20, size=97)
    whole = label_histogram(labelled(labels, units))
    for unit in np.unique(units):
        rest = label_histogram(labelled(labels[units != unit], units[units != unit]))
        moved = np.linalg.norm(whole - rest)
        assert moved <= SENSITIVITY * (1 + 1e-12)
        if len(np.unique(labels[units == unit])) == 1:
            assert moved == pytest.approx(SENSITIVITY)
    assert whole.sum() == pytest.approx(len(np.unique(units)))


def test_noise_has_the_stated_deviation():
    images = labelled([0] * 400 + [1] * 400)
    deviation = 7.0
    noise = GeneratorNoise(deviation, torch.Generator().manual_seed(1))
    counts = label_histogram(images)
    moved = [noised_shares(images, noise)[:2] * 800 - counts[:2] for _ in range(500)]
    # The three empty classes' noise above zero and the normalisation shift shares a little.
    spread = np.std([first - second for first, second in moved])
    assert spread == pytest.approx(deviation * 2**0.5, rel=0.15)


@pytest.mark.parametrize(
    "noised", [[-3.0, 5, 0, 2, 3], [-1.0] * 5, [0.0] * 5, [1e-300, 0, 0, 0, 0]]
)
def test_shares_are_a_distribution(noised):
    result = shares(np.array(noised))
    assert result.sum() == pytest.approx(1) and (result >= 0).all()
    if max(noised) <= 0:
        assert (result == 0.2).all()


@pytest.mark.parametrize("total", [0, 1, 7, 1000])
def test_apportioning_keeps_the_sum_and_is_within_one(total):
    rng = np.random.default_rng(total)
    for size in (1, 2, 13):
        exact = rng.dirichlet(np.ones(size))
        counts = apportion(total, exact)
        assert sum(counts) == total
        assert np.abs(np.array(counts) - total * exact).max() < 1


def test_histogram_and_training_together_keep_eps():
    alone = PLAN.calibrate()
    plan = PrivacyPlan(**{**PLAN.to_dict(), "label_histogram_eps": 0.5}).calibrate()
    assert plan.noise_multiplier > alone.noise_multiplier
    mechanisms = plan.mechanisms()
    assert list(mechanisms) == ["label_histogram", "dp_sgd"]
    both = composed(mechanisms.values(), delta=PLAN.delta).eps
    assert 0.998 * PLAN.eps < both <= PLAN.eps
    assert composed([mechanisms["label_histogram"]], delta=PLAN.delta).eps <= 0.5
    assert composed([mechanisms["dp_sgd"]], delta=PLAN.delta).eps < PLAN.eps
    statement = plan.statement(11, "finished")
    assert statement["eps"] == both
    assert [query["query"] for query in statement["queries"]] == list(mechanisms)


def test_a_histogram_that_leaves_nothing_is_refused():
    assert "label_histogram_eps" in refusal(
        PrivacyPlan, **{**PLAN.to_dict(), "label_histogram_eps": 2}
    )


def test_a_sampler_that_asks_for_shares_gets_a_twentieth_of_eps():
    cfg = compose("sampler.labels=dp_histogram", "privacy.eps=4")
    declare(cfg)
    assert cfg.privacy.label_histogram_eps == pytest.approx(0.2)
    cfg = compose("sampler.labels=dp_histogram", "privacy=none")
    assert "sampler.labels=uniform" in refusal(declare, cfg)


def test_a_run_draws_its_labels_by_the_shares_it_asked_for(command, tmp_path):
    outcome = command(
        train,
        *SHORT[:1],
        "evaluator=none",
        "sampler.labels=dp_histogram",
        "privacy.label_histogram_eps=9",
        f"run_dir={tmp_path / 'run'}",
    )
    assert outcome.code == 0, outcome.err
    run = Run(tmp_path / "run")
    found = run.label_shares()
    drawn = {name: len(list((run.samples_dir / name).iterdir())) for name in found}
    expected = dict(zip(found, apportion(sum(drawn.values()), list(found.values())), strict=True))
    assert drawn == expected
    # Digits are about equally frequent, and noise of a fraction of a count hardly moves them.
    counts = np.array(list(found.values()))
    assert stats.chisquare(counts * 100).pvalue > 0.5
    assert run.statement()["eps"] <= 10


def test_samples_by_shares_need_a_run_that_asked_for_them(command, run_copy):
    from dp_synth import sample

    outcome = command(sample, f"run={run_copy.path}", "sampler.labels=dp_histogram")
    assert outcome.code == 2
    assert "label_histogram_eps" in outcome.err
