"""Verdicts from trials, on mechanisms whose leak is known exactly."""

import math

import numpy as np
import pytest
from scipy import stats

from dp_synth.privacy.accounting import SubsampledGaussian
from dp_synth.privacy.audit.trials import TradeOff, eps_lower_bound, judge

RATES = np.array([0.0, 1e-4, 0.01, 0.07, 0.3, 0.45, 0.8, 1.0])


def gaussian_points(mu):
    """Exact (eps, delta) of two normals that lie mu apart (Balle and Wang 2018), on a grid of eps."""
    eps = np.linspace(0, 5 * mu + mu**2, 80)
    return zip(
        eps,
        stats.norm.cdf(mu / 2 - eps / mu) - np.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu),
        strict=True,
    )


def trials(rng, n, mu):
    """Scores of n trials with and n without a canary that moves a standard normal by mu."""
    return rng.normal(mu, 1, n), rng.normal(0, 1, n)


# ---------------------------------------------------------------------------------- trade-off curve


@pytest.mark.parametrize("mu", [0.1, 0.27, 1.0, 3.0])
def test_the_curve_of_a_gaussian_is_that_of_the_best_test(mu):
    """By Neyman and Pearson the best test of two normals is a threshold."""
    best = stats.norm.cdf(stats.norm.ppf(RATES) + mu)
    np.testing.assert_allclose(TradeOff(gaussian_points(mu)).power(RATES), best, atol=1e-3)
    # From the accountant, at a few points: never below.
    claimed = TradeOff.claimed([SubsampledGaussian(1 / mu, 1, 1)]).power(RATES)
    assert (claimed >= best - 1e-9).all()
    assert (claimed <= best + 0.01).all()


def test_the_curve_of_a_subsampled_gaussian_bounds_the_best_tests_of_both_directions():
    """Of one step, whose best tests are thresholds: "there" above one, "not there" below it."""
    noise_multiplier, q = 0.8, 0.3
    threshold = np.linspace(-8, 10, 3000) * noise_multiplier
    without = stats.norm.sf(threshold, scale=noise_multiplier)
    with_it = (1 - q) * without + q * stats.norm.sf(threshold, 1, noise_multiplier)
    points = [
        (eps, max((p - math.exp(eps) * r).max() for p, r in directions))
        for eps in np.linspace(0, 5, 200)
        for directions in [((with_it, without), (1 - without, 1 - with_it))]
    ]
    claimed = TradeOff.claimed([SubsampledGaussian(noise_multiplier, q, 1)])
    slack = claimed.power(RATES) - TradeOff(points).power(RATES)
    assert (slack >= -1e-4).all() and (slack <= 0.01).all()
    assert (claimed.power(without) >= with_it - 1e-4).all()
    assert (claimed.power(1 - with_it) >= 1 - without - 1e-4).all()


def test_several_mechanisms_are_composed():
    one = TradeOff.claimed([SubsampledGaussian(2.0, 1, 1)] * 4)
    np.testing.assert_allclose(
        one.power(RATES), TradeOff.claimed([SubsampledGaussian(1.0, 1, 1)]).power(RATES)
    )


def test_a_claim_of_nothing_allows_everything():
    for points in ([], [(math.inf, 1e-5)], [(0.0, 1.0)]):
        assert (TradeOff(points).power(RATES) == 1).all()
    np.testing.assert_allclose(TradeOff([(0.0, 0.0)]).power(RATES), RATES)


# -------------------------------------------------------------------------------- verdict on a claim


@pytest.mark.parametrize("size", [2, 7, 400])
def test_a_claim_that_is_exactly_met_is_refuted_less_often_than_stated(size):
    """Over many audits; for Gaussians far less often than 5 %."""
    rng = np.random.default_rng(0)
    mu, audits = 0.27, 2000
    claim = TradeOff(gaussian_points(mu))
    refuted = sum(judge(*trials(rng, size, mu), claim).refuted for _ in range(audits))
    assert refuted <= 0.005 * audits


def test_so_is_one_of_a_mechanism_with_two_outputs():
    """Randomised response meets its eps with equality, at the only threshold there is."""
    rng = np.random.default_rng(1)
    eps, audits = 1.0, 1000
    honest = 1 / (1 + math.exp(-eps))
    claim = TradeOff([(eps, 0.0)])
    refuted = sum(
        judge(rng.random(150) < honest, rng.random(90) > honest, claim).refuted
        for _ in range(audits)
    )
    assert refuted <= 0.05 * audits


@pytest.mark.parametrize(("leak", "size"), [(2.0, 4000), (1.3, 30_000), (1.1, 300_000)])
def test_a_claim_that_is_too_strong_is_refuted_by_enough_trials(leak, size):
    rng = np.random.default_rng(2)
    mu = 0.27
    verdict = judge(*trials(rng, size, leak * mu), TradeOff(gaussian_points(mu)))
    assert verdict.refuted and verdict.power > verdict.allowed >= verdict.false_alarms
    assert not judge(*trials(rng, size, leak * mu), TradeOff(gaussian_points(leak * mu))).refuted


def test_eps_at_a_small_delta_alone_would_not_have_shown_it():
    """Why the whole curve is tested: half the noise at eps = 1 is caught by 4000 + 4000 trials."""
    rng = np.random.default_rng(3)
    found = trials(rng, 4000, 2 / 3.73)
    assert judge(*found, TradeOff.claimed([SubsampledGaussian(3.73, 1, 1)])).refuted
    assert eps_lower_bound(*found, delta=1e-5) < 1.0


def test_rates_are_bounds_with_the_stated_confidence():
    rng = np.random.default_rng(4)
    mu, wrong, audits = 1.0, 0, 1000
    claim = TradeOff(gaussian_points(0.1))
    for _ in range(audits):
        verdict = judge(*trials(rng, 60, mu), claim)
        # Whatever threshold was chosen: no test has more power at these false alarms.
        wrong += verdict.power > stats.norm.cdf(stats.norm.ppf(verdict.false_alarms) + mu)
    assert wrong <= 0.05 * audits


# -------------------------------------------------------------------------------------- bound on eps


@pytest.mark.parametrize(("mu", "delta"), [(0.27, 1e-5), (1.0, 1e-2), (2.0, 0.0)])
def test_the_bound_on_eps_is_rarely_above_eps(mu, delta):
    rng = np.random.default_rng(5)
    points = [(eps, d) for eps, d in gaussian_points(mu) if d <= delta]
    eps = points[0][0] if points else math.inf
    audits = 400
    above = sum(eps_lower_bound(*trials(rng, 500, mu), delta=delta) > eps for _ in range(audits))
    assert above <= 0.05 * audits


def test_the_bound_grows_with_the_trials_and_with_what_they_show():
    rng = np.random.default_rng(6)
    bounds = [eps_lower_bound(*trials(rng, n, 2.0), delta=0) for n in (10, 1000, 100_000)]
    assert bounds == sorted(bounds) and bounds[0] < 1 and bounds[-1] > 4
    leaks = [eps_lower_bound(*trials(rng, 1000, mu), delta=0) for mu in (0.0, 1.0, 3.0)]
    assert leaks == sorted(leaks) and leaks[0] < 0.5


def test_scores_that_part_show_what_the_number_of_trials_can():
    """In closed form, from the three quarters of the trials that are judged."""
    n, delta = 400, 1e-5
    miss = 1 - 0.025 ** (1 / 300)
    expected = math.log((1 - miss - delta) / miss)
    assert eps_lower_bound(np.ones(n), np.zeros(n), delta=delta) == pytest.approx(expected)
    assert expected < math.log(300 / math.log(40)) + 0.01
    assert judge(np.ones(n), np.zeros(n), TradeOff([(4.0, delta)])).refuted
    assert not judge(np.ones(n), np.zeros(n), TradeOff([(5.0, delta)])).refuted


def test_the_bound_is_the_same_for_either_way_round():
    rng = np.random.default_rng(7)
    with_it, without = trials(rng, 700, 1.5)
    one = eps_lower_bound(with_it, without, delta=1e-5)
    assert eps_lower_bound(-without, -with_it, delta=1e-5) == pytest.approx(one)


def test_scores_that_are_all_alike_or_the_wrong_way_round_show_nothing():
    same = np.full(50, 3.0)
    for with_it, without in ((same, same), (np.zeros(50), np.ones(50))):
        assert eps_lower_bound(with_it, without, delta=0.0) == 0.0
        assert not judge(with_it, without, TradeOff([(0.0, 0.0)])).refuted


@pytest.mark.parametrize(
    "scores", [np.zeros(1), np.zeros(0), np.array([0.0, math.nan]), np.zeros((3, 2))], ids=str
)
def test_scores_that_are_no_scores_are_refused(scores):
    for pair in ((scores, np.zeros(9)), (np.zeros(9), scores)):
        with pytest.raises(ValueError, match="finite numbers"):
            judge(*pair, TradeOff([(1.0, 0.0)]))
        with pytest.raises(ValueError, match="finite numbers"):
            eps_lower_bound(*pair, delta=0.0)
