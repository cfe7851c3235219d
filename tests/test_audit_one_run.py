"""The one-run audit holds its confidence, agrees with the paper, and never sees what is not there."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from dp_synth.privacy import accounting
from dp_synth.privacy.audit.one_run import (
    eps_lower_bound,
    guesses_a_side,
    one_run_bound,
    p_value,
)

CANARIES = 200
REPETITIONS = 400


def enumerated(canaries, guesses, right, chance, delta):
    """The corollary's p-value for a success probability that is a fraction, exactly."""
    mass = [
        math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k)
        for k in range(guesses + 1)
    ]
    tail = sum(mass[right:])
    alpha = max(
        (sum(mass[max(right - i, 0) : right]) / i for i in range(1, canaries + 1)), default=0
    )
    return min(Fraction(1), tail + 2 * canaries * delta * alpha)


@pytest.mark.parametrize("canaries", [1, 2, 3, 7, 13])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 1000), Fraction(1, 3)])
@pytest.mark.parametrize("odds", [1, 3, 50])
def test_the_p_value_is_the_corollarys(canaries, delta, odds):
    for guesses in {0, 1, canaries // 2, canaries}:
        for right in range(guesses + 1):
            exact = enumerated(canaries, guesses, right, Fraction(odds, 1 + odds), delta)
            found = p_value(canaries, guesses, right, eps=math.log(odds), delta=float(delta))
            assert found == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(
    ("canaries", "guesses", "right", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
    ids=["appendix D", "section 7"],
)
def test_the_bound_is_the_one_that_the_paper_prints(canaries, guesses, right, delta, published):
    found = eps_lower_bound(canaries, guesses, right, delta=delta, confidence=0.95)
    assert found == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize(("guesses", "right"), [(1, 1), (10, 9), (100, 60), (100, 100), (900, 700)])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_the_p_value_grows_with_eps_while_it_can_reject(guesses, right, delta):
    """Else the largest rejected eps would not be where bisection finds it."""
    curve = [p_value(1000, guesses, right, eps=eps, delta=delta) for eps in np.arange(0, 10, 0.05)]
    first_high = next(place for place, value in enumerate(curve) if value >= 0.5)
    assert (np.diff(curve[: first_high + 1]) >= -1e-12).all()


def test_the_bound_lies_where_the_p_value_crosses_the_error():
    bound = eps_lower_bound(500, 100, 80, delta=1e-4, confidence=0.9)
    assert p_value(500, 100, 80, eps=bound, delta=1e-4) < 0.1
    assert p_value(500, 100, 80, eps=bound + 2e-4, delta=1e-4) > 0.1


def test_the_bound_grows_with_right_guesses_and_falls_with_confidence_and_delta():
    by_right = [eps_lower_bound(100, 50, right, delta=1e-4) for right in range(51)]
    assert (np.diff(by_right) >= 0).all() and by_right[25] == 0 < by_right[50]
    by_confidence = [
        eps_lower_bound(100, 50, 45, delta=1e-4, confidence=c) for c in (0.8, 0.95, 0.999)
    ]
    by_delta = [eps_lower_bound(100, 50, 45, delta=delta) for delta in (0, 1e-4, 1e-3, 1e-2)]
    for falling in (by_confidence, by_delta):
        assert (np.diff(falling) < 0).all()


def test_the_ceiling_grows_with_the_canaries_and_no_scores_pass_it():
    ceilings = []
    for canaries in (10, 31, 100, 1000):
        coins = np.arange(canaries) % 2 == 0
        bound = one_run_bound(coins.astype(float), coins, delta=1e-6)
        assert bound.eps_lower == bound.ceiling and bound.right == bound.guesses
        ceilings.append(bound.ceiling)
    assert (np.diff(ceilings) > 0).all()


def releases(eps, rng, coins):
    """Randomised response: each coin is told truly with probability e^eps / (1 + e^eps)."""
    return np.where(rng.random(len(coins)) < 1 / (1 + math.exp(-eps)), coins, ~coins).astype(float)


def failures(eps, delta, release):
    """How many of many audits say more than eps, and their mean bound."""
    rng = np.random.default_rng(0)
    bounds = []
    for _ in range(REPETITIONS):
        coins = rng.random(CANARIES) < 0.5
        bounds.append(one_run_bound(release(rng, coins), coins, delta=delta).eps_lower)
    return sum(bound > eps for bound in bounds), float(np.mean(bounds))


# More failures than this come by chance in one of a million such tests of an exact 95 %.
ALLOWED = int(stats.binom.isf(1e-6, REPETITIONS, 0.05))


@pytest.mark.parametrize("eps", [0.0, 0.5, 1.0, 2.0])
def test_the_stated_confidence_holds_for_randomised_response(eps):
    failed, mean = failures(eps, 0.0, lambda rng, coins: releases(eps, rng, coins))
    assert failed <= ALLOWED
    assert mean > 0.5 * eps - 0.1  # and it says something


@pytest.mark.parametrize("noise_multiplier", [0.7, 1.5, 5.0])
def test_the_stated_confidence_holds_for_the_gaussian_mechanism(noise_multiplier):
    delta = 1e-4
    eps = accounting.epsilon(
        noise_multiplier=noise_multiplier, sample_rate=1.0, steps=1, delta=delta
    )
    failed, mean = failures(
        eps, delta, lambda rng, coins: coins + noise_multiplier * rng.normal(size=len(coins))
    )
    assert failed <= ALLOWED
    assert (mean > 0.2 * eps) == (noise_multiplier < 2)


def right(ranked, k):
    return int((~ranked[:k]).sum() + ranked[-k:].sum())


def test_three_rules_together_keep_the_confidence():
    """Each at the whole error would fail more often, with scores that tell nothing."""
    rng = np.random.default_rng(0)
    corrected, uncorrected, trials = 0, 0, 1500
    for _ in range(trials):
        coins = rng.random(CANARIES) < 0.5
        order = rng.permutation(CANARIES)
        corrected += one_run_bound(order.astype(float), coins, delta=0.0).eps_lower > 0
        ranked = coins[np.argsort(order)]
        uncorrected += any(
            p_value(CANARIES, 2 * k, right(ranked, k), eps=0, delta=0) < 0.05
            for k in guesses_a_side(CANARIES)
        )
    assert corrected <= stats.binom.isf(1e-6, trials, 0.05) < uncorrected


@pytest.mark.parametrize(
    "scores",
    [np.zeros(CANARIES), np.full(CANARIES, np.nan), -np.arange(CANARIES, dtype=float)],
    ids=["equal", "nan", "order"],
)
def test_scores_without_information_show_nothing(scores):
    coins = np.random.default_rng(3).random(CANARIES) < 0.5
    bound = one_run_bound(scores, coins, delta=1e-5)
    assert bound.eps_lower == 0 < bound.ceiling


@pytest.mark.parametrize("canaries", [0, 1, 2])
def test_too_few_canaries_show_nothing(canaries):
    coins = np.ones(canaries, dtype=bool)
    bound = one_run_bound(coins.astype(float), coins, delta=1e-5)
    assert bound.eps_lower == bound.ceiling == 0 and bound.canaries == canaries


@pytest.mark.parametrize(
    "call",
    [
        lambda: p_value(10, 11, 5, eps=1, delta=0),
        lambda: p_value(10, 5, 6, eps=1, delta=0),
        lambda: p_value(10, 5, 5, eps=-1, delta=0),
        lambda: p_value(10, 5, 5, eps=1, delta=2),
        lambda: eps_lower_bound(10, 5, 5, delta=0, confidence=0.4),
        lambda: one_run_bound(np.zeros(3), np.ones(4, dtype=bool), delta=0),
    ],
)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError):
        call()
