"""Composition of unlike mechanisms against a second library, closed forms and plain integration."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from dp_synth.errors import UserError
from dp_synth.privacy import accounting
from dp_synth.privacy.accounting import RandomStopping, SubsampledGaussian, prv

DELTA = 1e-5
HISTOGRAM = SubsampledGaussian(12.0, 1.0, 1)
TRAINING = SubsampledGaussian(1.9, 0.11, 60)
CLASSIFIER = SubsampledGaussian(0.9, 0.013, 101)


def spent(*mechanisms, delta=DELTA, accountant="prv"):
    return accounting.composed(mechanisms, delta=delta, accountant=accountant)


def pld_of(mechanisms):
    """The oracle: privacy loss distributions of Google's dp-accounting, finely discretised."""
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    rough = spent(*mechanisms, accountant="rdp").eps
    steps = sum(mechanism.steps for mechanism in mechanisms)
    interval = min(1e-3, max(2e-5, 1e-3 * rough / math.sqrt(steps)))
    whole = None
    for mechanism in mechanisms:
        one = pld.from_gaussian_mechanism(
            mechanism.noise_multiplier,
            sampling_prob=mechanism.sample_rate,
            value_discretization_interval=interval,
        ).self_compose(mechanism.steps)
        whole = one if whole is None else whole.compose(one)
    return whole


def random_mechanism(draw, members):
    sample_rate = draw.choice([1.0, 10 ** draw.uniform(-3, 0), 10 ** draw.uniform(-2, 0)])
    steps = int(10 ** draw.uniform(0, 2.5 if sample_rate < 1 else 1))
    least = max(0.5, sample_rate * math.sqrt(steps * members))
    return SubsampledGaussian(least * 10 ** draw.uniform(0, 0.6), sample_rate, steps)


@pytest.mark.parametrize("seed", range(20))
def test_unlike_mechanisms_are_tight(seed):
    draw = random.Random(seed)
    members = draw.randint(2, 5)
    mechanisms = [random_mechanism(draw, members) for _ in range(members)]
    delta = 10 ** draw.uniform(-7, -4)
    exact = pld_of(mechanisms).get_epsilon_for_delta(delta)
    ours = spent(*mechanisms, delta=delta).eps
    assert 0.999 * exact <= ours <= 1.01 * exact
    assert ours <= spent(*mechanisms, delta=delta, accountant="rdp").eps * (1 + 1e-9)


def test_more_members_than_are_composed_at_once():
    mechanisms = [SubsampledGaussian(2 + k / 7, 0.03 + k / 300, 5 + k) for k in range(19)]
    exact = pld_of(mechanisms).get_epsilon_for_delta(DELTA)
    ours = spent(*mechanisms)
    assert ours.accountant == "prv" and 0.999 * exact <= ours.eps <= 1.01 * exact


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
def test_equal_runs_are_one_run_of_all_their_steps(accountant):
    many = spent(*[TRAINING] * 100, accountant=accountant)
    assert many == spent(SubsampledGaussian(1.9, 0.11, 6000), accountant=accountant)


def test_plain_gaussians_are_one_gaussian():
    mechanisms = [SubsampledGaussian(noise, 1.0, steps) for noise, steps in ((7, 3), (31, 1))]
    together = 1 / math.sqrt(3 / 7**2 + 1 / 31**2)
    found = spent(*mechanisms)
    assert found.accountant == "gaussian"
    expected = accounting.epsilon(noise_multiplier=together, sample_rate=1, steps=1, delta=DELTA)
    assert found.eps == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
def test_order_has_no_say_and_every_mechanism_counts(accountant):
    mechanisms = [HISTOGRAM, TRAINING, CLASSIFIER]
    whole = spent(*mechanisms, accountant=accountant)
    assert whole == spent(*reversed(mechanisms), accountant=accountant)
    growing = [spent(*mechanisms[:count], accountant=accountant).eps for count in range(4)]
    assert growing[0] == 0 and all(less < more for less, more in pairwise(growing))


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.parametrize("others", [(), (TRAINING,), (HISTOGRAM, CLASSIFIER)])
def test_what_costs_nothing_and_what_costs_all(others, accountant):
    free = [SubsampledGaussian(0, 0.5, 0), SubsampledGaussian(0, 0, 10)]
    assert spent(*others, *free, accountant=accountant) == spent(*others, accountant=accountant)
    naked = SubsampledGaussian(0, 0.1, 1)
    stopped = RandomStopping.expecting(3, (HISTOGRAM, naked))
    for unprotected in (naked, stopped):
        assert spent(*others, unprotected, accountant=accountant).eps == math.inf
        assert accounting.delta_spent([*others, unprotected], eps=5, accountant=accountant) == 1


@pytest.mark.parametrize(
    "mechanisms",
    [
        [SubsampledGaussian(0.05, 1, 1), TRAINING],  # eps of hundreds
        [SubsampledGaussian(0.02, 0.5, 3), HISTOGRAM],  # losses overflow
        [SubsampledGaussian(1e-200, 1, 1), TRAINING],
        [SubsampledGaussian(1e-7, 1, 1)],
        [SubsampledGaussian(3, 1 - 1e-12, 50), HISTOGRAM],
        [SubsampledGaussian(0.5, 1e-9, 10), CLASSIFIER],
        [SubsampledGaussian(5, 0.5, 10**9), TRAINING],
    ],
)
@pytest.mark.parametrize("delta", [0.5, 1e-5, 1e-12, 1e-300])
def test_hard_regimes_stay_between_their_parts_and_the_renyi_bound(mechanisms, delta):
    whole = spent(*mechanisms, delta=delta).eps
    assert whole <= spent(*mechanisms, delta=delta, accountant="rdp").eps
    # 0.3 %: the error that the bound of a single part may have.
    assert whole >= 0.997 * max(spent(part, delta=delta).eps for part in mechanisms)


@pytest.mark.parametrize(("noise_multiplier", "sample_rate"), [(1e-7, 1), (1e-4, 1), (0.003, 1)])
def test_little_noise_costs_what_the_tail_of_the_gaussian_says(noise_multiplier, sample_rate):
    """Balle and Wang 2018 without its second term, an upper bound next to exact at such eps."""
    special = pytest.importorskip("scipy.special")
    tail = (0.5 / noise_multiplier - special.ndtri(DELTA)) / noise_multiplier
    found = accounting.epsilon(
        noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=1, delta=DELTA
    )
    assert found == pytest.approx(tail, rel=1e-3)


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.parametrize("eps", [0.9, 3.0, 20.0])
@pytest.mark.parametrize(("sample_rate", "steps"), [(0.11, 60), (0.02, 997), (1.0, 1)])
def test_calibrated_beside_others(eps, sample_rate, steps, accountant):
    others = [HISTOGRAM, SubsampledGaussian(6.0, 0.05, 100)]
    noise_multiplier = accounting.calibrate(
        eps=eps,
        delta=DELTA,
        sample_rate=sample_rate,
        steps=steps,
        accountant=accountant,
        others=others,
    )
    new = SubsampledGaussian(noise_multiplier, sample_rate, steps)
    assert 0.999 * eps <= spent(*others, new, accountant=accountant).eps <= eps
    # Beside others it takes more noise than alone.
    alone = accounting.calibrate(
        eps=eps, delta=DELTA, sample_rate=sample_rate, steps=steps, accountant=accountant
    )
    assert noise_multiplier > alone


def test_calibrated_into_a_small_remainder_is_the_smallest_noise():
    eps = 1.02 * spent(TRAINING).eps
    plan = {"sample_rate": 0.05, "steps": 30}
    found = accounting.calibrate(eps=eps, delta=DELTA, others=[TRAINING], **plan)
    assert spent(TRAINING, SubsampledGaussian(found, **plan)).eps <= eps
    assert spent(TRAINING, SubsampledGaussian(0.98 * found, **plan)).eps > eps


def test_a_target_that_others_have_taken_is_refused():
    eps = spent(TRAINING).eps
    for others in ([TRAINING], [SubsampledGaussian(0, 0.1, 1)]):
        with pytest.raises(UserError, match=r"privacy\.eps=.* is taken"):
            accounting.calibrate(eps=eps, delta=DELTA, sample_rate=0.1, steps=1, others=others)


@pytest.mark.parametrize("mechanisms", [[TRAINING], [HISTOGRAM, TRAINING], [CLASSIFIER, TRAINING]])
@pytest.mark.parametrize("eps", [0.5, 1.7, 4.0])
def test_delta_is_an_upper_bound_and_close(mechanisms, eps):
    exact = pld_of(mechanisms).get_delta_for_epsilon(eps)
    ours = accounting.delta_spent(mechanisms, eps=eps)
    assert 0.999 * exact <= ours <= 1.05 * exact
    assert ours <= accounting.delta_spent(mechanisms, eps=eps, accountant="rdp")


@pytest.mark.parametrize(
    "mechanisms", [[HISTOGRAM], [TRAINING], [RandomStopping.expecting(2, (TRAINING,))]]
)
def test_delta_and_eps_are_two_readings_of_one_renyi_bound(mechanisms):
    eps = accounting.composed(mechanisms, delta=DELTA, accountant="rdp").eps
    again = accounting.delta_spent(mechanisms, eps=eps, accountant="rdp")
    assert again == pytest.approx(DELTA, rel=1e-9)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize(
    ("noise_multiplier", "sample_rate"),
    [(1.0, 0.1), (0.3, 0.9), (0.1, 1.0), (5.0, 1.0), (40.0, 0.3), (0.6, 1e-4), (2.0, 1 - 1e-9)],
)
def test_privacy_losses_by_integration(noise_multiplier, sample_rate, removed):
    """The distribution and the mean of the loss, from the densities of the outcomes themselves."""
    x = np.linspace(-12 * noise_multiplier, 1 + 12 * noise_multiplier, 400_001)
    without, shifted = (
        -((x - mean) ** 2) / 2 / noise_multiplier**2
        - math.log(noise_multiplier * math.sqrt(2 * math.pi))
        for mean in (0, 1)
    )
    rate = np.longdouble(sample_rate)
    with np.errstate(divide="ignore"):
        both = np.logaddexp(np.log(1 - rate) + without, np.log(rate) + shifted)
    loss, density = (both - without, both) if removed else (without - both, without)
    weight = np.exp(density) * (x[1] - x[0])
    found = prv._Loss(noise_multiplier, sample_rate, removed)
    thresholds = np.quantile(loss, [0.1, 0.3, 0.45, 0.5, 0.55, 0.6, 0.8]).astype(float)
    with np.errstate(all="ignore"):  # as where it is used
        mean, below = found.mean(), found.cdf(thresholds)
    assert mean == pytest.approx(float(np.sum(weight * loss)), rel=1e-6, abs=1e-15)
    for threshold, probability in zip(thresholds, below, strict=True):
        assert probability == pytest.approx(float(np.sum(weight[loss <= threshold])), abs=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"mechanism": "laplace"},
        {"mechanism": "poisson_subsampled_gaussian", "sample_rate": 0.1, "steps": 3},
        {**TRAINING.to_dict(), "color": "red"},
        {**TRAINING.to_dict(), "steps": 1.5},
        {**TRAINING.to_dict(), "noise_multiplier": "3"},
        {"mechanism": "random_stopping", "candidate": [TRAINING.to_dict()]},
        {**RandomStopping.expecting(2, (TRAINING,)).to_dict(), "runs": {"distribution": "fixed"}},
        {
            **RandomStopping.expecting(2, (TRAINING,)).to_dict(),
            "candidate": [RandomStopping.expecting(2, (TRAINING,)).to_dict()],
        },
    ],
)
def test_records_of_no_mechanism_are_refused(wrong):
    with pytest.raises(UserError):
        accounting.mechanism_from_dict(wrong)


def test_wrong_values_are_named():
    with pytest.raises(UserError, match="delta"):
        spent(TRAINING, delta=0)
    with pytest.raises(UserError, match="accountant"):
        spent(TRAINING, accountant="gdp")
    with pytest.raises(UserError, match="eps"):
        accounting.delta_spent([TRAINING], eps=-1)
