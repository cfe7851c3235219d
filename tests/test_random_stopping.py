"""Random stopping against brute force, closed forms of its paper and a second library."""

import json
import math
from itertools import islice

import numpy as np
import pytest

from dp_synth.errors import UserError
from dp_synth.privacy import accounting
from dp_synth.privacy.accounting import (
    PoissonRuns,
    RandomStopping,
    SubsampledGaussian,
    TruncatedNegativeBinomialRuns,
    renyi,
)
from dp_synth.privacy.accounting.random_stopping import number_of_runs

DELTA = 1e-6
CANDIDATE = (SubsampledGaussian(2.1, 0.07, 90), SubsampledGaussian(25.0, 1.0, 1))
LAWS = [
    TruncatedNegativeBinomialRuns(-0.7, 0.2),
    TruncatedNegativeBinomialRuns(0, 0.03),
    TruncatedNegativeBinomialRuns(0, 0.9),
    TruncatedNegativeBinomialRuns(0.5, 0.1),
    TruncatedNegativeBinomialRuns(1, 0.25),
    TruncatedNegativeBinomialRuns(3, 0.4),
    PoissonRuns(0.3),
    PoissonRuns(1),
    PoissonRuns(17.0),
]


def generating_function(law, z):
    """E[z^K] as the paper gives it."""
    if isinstance(law, PoissonRuns):
        return math.exp(law.expected * (z - 1))
    if law.eta == 0:
        return math.log(1 - (1 - law.gamma) * z) / math.log(law.gamma)
    return ((1 - (1 - law.gamma) * z) ** -law.eta - 1) / (law.gamma**-law.eta - 1)


def best_of(law, candidate):
    """The law of the best outcome, outcomes standing in order of their score; first: no run."""
    below = np.concatenate([[0.0], np.cumsum(candidate)])
    at_most = [generating_function(law, min(z, 1.0)) for z in below]
    return np.concatenate([[at_most[0]], np.diff(at_most)])


def divergence(order, p, q):
    """The Renyi divergence of two laws on the same few outcomes, zeros in both at once only."""
    log_p, log_q = np.log(p[p > 0]), np.log(q[q > 0])
    return float(np.logaddexp.reduce(order * log_p + (1 - order) * log_q)) / (order - 1)


def symmetric_divergence(order, p, q):
    return max(divergence(order, p, q), divergence(order, q, p))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_the_bound_holds_for_every_small_mechanism(law):
    """Exact Renyi divergences of the selected outcome, over candidates of two to six outcomes."""
    draw = np.random.default_rng(3)
    cost_more_than_one_run = 0
    for _ in range(60):
        outcomes = draw.integers(2, 7)
        p = draw.dirichlet(np.full(outcomes, draw.choice([0.5, 1, 10])))
        q = p * np.exp(draw.normal(0, draw.choice([0.01, 0.3, 1.5]), outcomes))
        p, q = p + 1e-9, q + 1e-9
        p, q = p / p.sum(), q / q.sum()

        def candidate(order, p=p, q=q):
            return symmetric_divergence(order, p, q)

        bound = law.selection(candidate)
        for order in (1.01, 1.5, 2.0, 5.0, 20.0):
            exact = symmetric_divergence(order, best_of(law, p), best_of(law, q))
            assert exact <= bound(order) + 1e-9
            cost_more_than_one_run += exact > candidate(order)
    # Else the bound of a single run would have passed as well. It does where most often none is.
    assert cost_more_than_one_run > 0 or law.expected < 1


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_chances_are_those_of_the_generating_function(law):
    chances = list(islice(law.chances(), 5000))
    assert sum(chance for _, chance in chances) == pytest.approx(1, abs=1e-9)
    assert sum(runs * chance for runs, chance in chances) == pytest.approx(law.expected, rel=1e-6)
    for z in (0.0, 0.4, 0.93):
        total = sum(chance * z**runs for runs, chance in chances)
        assert total == pytest.approx(generating_function(law, z), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_inversion_follows_the_law(law):
    draws = 4001
    drawn = [number_of_runs(law, (index + 0.5) / draws) for index in range(draws)]
    assert drawn == sorted(drawn)
    for runs, chance in islice(law.chances(), 12):
        assert drawn.count(runs) / draws == pytest.approx(chance, abs=1.5 / draws)
    assert number_of_runs(law, 0.0) == next(law.chances())[0]
    assert number_of_runs(law, 1 - 2**-53) >= drawn[-1]
    for outside in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="uniform"):
            number_of_runs(law, outside)


@pytest.mark.parametrize("eta", [-0.5, 0, 0.5, 1, 4])
@pytest.mark.parametrize("runs", [1.001, 2, 10, 1000])
def test_gamma_for_an_expected_number_of_runs(eta, runs):
    assert TruncatedNegativeBinomialRuns.expecting(runs, eta=eta).expected == pytest.approx(runs)


def test_geometric_selection_of_a_gaussian_in_closed_form():
    """With Renyi divergence rho * order the best second order is sqrt(log(1 / gamma) / rho)."""
    rho, law = 0.01, TruncatedNegativeBinomialRuns(1, 0.05)
    found = law.selection(lambda order: rho * order)
    for order in (2, 10, 50):
        constant = 2 * (2 * math.sqrt(rho * math.log(1 / law.gamma)) - rho)
        exact = rho * order + constant + math.log(1 / law.gamma) / (order - 1)
        assert exact <= found(order) <= 1.005 * exact


@pytest.mark.parametrize("eta", [-0.5, 0, 1])
def test_pure_privacy_is_multiplied_by_two_and_eta(eta):
    """Corollary of the theorem for large orders: eps becomes (2 + eta) * eps."""
    law = TruncatedNegativeBinomialRuns(eta, 0.01)
    assert law.selection(lambda order: 0.3)(1e9) == pytest.approx((2 + eta) * 0.3, rel=5e-3)


@pytest.mark.parametrize("shape", [0, 0.5, 1, math.inf])
@pytest.mark.parametrize("runs", [10, 60])
def test_eps_is_that_of_a_second_library(shape, runs):
    rdp = pytest.importorskip("dp_accounting.rdp")
    events = pytest.importorskip("dp_accounting.dp_event")
    if shape == math.inf:
        mechanism = RandomStopping(CANDIDATE, PoissonRuns(runs))
    else:
        mechanism = RandomStopping.expecting(runs, CANDIDATE, eta=shape)
    parts = [
        events.SelfComposedDpEvent(
            events.PoissonSampledDpEvent(
                part.sample_rate, events.GaussianDpEvent(part.noise_multiplier)
            ),
            part.steps,
        )
        for part in CANDIDATE
    ]
    event = events.RepeatAndSelectDpEvent(events.ComposedDpEvent(parts), runs, shape)
    accountant = rdp.RdpAccountant([*renyi._ORDERS])
    exact = accountant.compose(event).get_epsilon(DELTA)
    assert accounting.composed([mechanism], delta=DELTA).eps == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("eta", [0, 1])
def test_the_best_of_many_costs_more_than_one_and_less_than_all(eta):
    best = RandomStopping.expecting(100, CANDIDATE, eta=eta)
    found = accounting.composed([best], delta=DELTA)
    assert found.accountant == "rdp (random stopping)"
    one = accounting.composed(CANDIDATE, delta=DELTA).eps
    assert one < found.eps < accounting.composed(CANDIDATE * 100, delta=DELTA).eps
    more = RandomStopping.expecting(1000, CANDIDATE, eta=eta)
    assert accounting.composed([more], delta=DELTA).eps > found.eps


@pytest.mark.parametrize("rest", [SubsampledGaussian(0.6, 0.01, 200), SubsampledGaussian(30, 1, 1)])
def test_random_stopping_beside_others_is_the_smaller_of_two_bounds(rest):
    best = RandomStopping.expecting(8, CANDIDATE)
    found = accounting.composed([rest, best], delta=DELTA)
    together = accounting.composed([rest, best], delta=DELTA, accountant="rdp").eps
    apart = (
        accounting.composed([rest], delta=DELTA / 2).eps
        + accounting.composed([best], delta=DELTA / 2).eps
    )
    assert found.eps == min(together, apart)
    assert "random stopping" in found.accountant
    assert found.eps > accounting.composed([best], delta=DELTA).eps


def test_noise_is_calibrated_beside_random_stopping():
    best = RandomStopping.expecting(3, (SubsampledGaussian(40.0, 0.1, 10),))
    noise_multiplier = accounting.calibrate(
        eps=3, delta=DELTA, sample_rate=0.1, steps=50, others=[best]
    )
    both = [best, SubsampledGaussian(noise_multiplier, 0.1, 50)]
    assert 0.99 * 3 <= accounting.composed(both, delta=DELTA).eps <= 3


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_record_is_read_back_as_it_was(law):
    mechanism = RandomStopping(CANDIDATE, law)
    record = json.loads(json.dumps(mechanism.to_dict()))
    assert accounting.mechanism_from_dict(record) == mechanism


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: TruncatedNegativeBinomialRuns(-1, 0.5),
        lambda: TruncatedNegativeBinomialRuns(math.nan, 0.5),
        lambda: TruncatedNegativeBinomialRuns(0, 0),
        lambda: TruncatedNegativeBinomialRuns(0, 1),
        lambda: TruncatedNegativeBinomialRuns.expecting(1),
        lambda: TruncatedNegativeBinomialRuns.expecting(1e9, eta=-0.99),
        lambda: PoissonRuns(0),
        lambda: RandomStopping.expecting(0.5, CANDIDATE),
    ],
)
def test_laws_that_are_none_are_refused(wrong):
    with pytest.raises(UserError):
        wrong()
