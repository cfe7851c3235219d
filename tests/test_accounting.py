"""Accounting against a second library, closed forms and published noise multipliers."""

import math
import random

import pytest

from dp_synth.errors import UserError
from dp_synth.privacy import accounting
from dp_synth.privacy.accounting import composition, prv

DELTA = 1e-5


def pld_epsilon(noise_multiplier, sample_rate, steps, delta):
    """The oracle: privacy loss distributions of Google's dp-accounting, finely discretised."""
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    rough = accounting.epsilon(
        noise_multiplier=noise_multiplier,
        sample_rate=sample_rate,
        steps=steps,
        delta=delta,
        accountant="rdp",
    )
    interval = min(1e-3, max(1e-5, 1e-3 * rough / math.sqrt(steps)))
    one = pld.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=interval
    )
    return one.self_compose(steps).get_epsilon_for_delta(delta)


def assert_tight(noise_multiplier, sample_rate, steps, delta):
    mechanism = {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate, "steps": steps}
    ours = accounting.epsilon(**mechanism, delta=delta)
    exact = pld_epsilon(**mechanism, delta=delta)
    assert 0.999 * exact <= ours <= 1.01 * exact
    assert ours <= accounting.epsilon(**mechanism, delta=delta, accountant="rdp") * (1 + 1e-9)


@pytest.mark.parametrize(
    ("noise_multiplier", "sample_rate", "steps"),
    [
        (30.8, 1.0, 1),
        (35.4, 1.0, 5000),
        (0.441, 0.33, 1),
        (27.3, 0.33, 7),
        (1.16, 0.33, 200),
        (11.7, 0.33, 5000),
        (6.39, 0.9, 200),
        (1.92, 0.05, 5000),
        (0.43, 1e-3, 1),
        (0.15, 1e-3, 1),
        (0.3, 1e-3, 5000),
    ],
)
def test_epsilon_is_tight_over_the_range(noise_multiplier, sample_rate, steps):
    assert_tight(noise_multiplier, sample_rate, steps, DELTA)


@pytest.mark.parametrize("seed", range(8))
def test_epsilon_is_tight_on_random_plans(seed):
    """200 plans with q in 0.001 .. 1, up to 1000 steps, delta in 1e-7 .. 1e-4, Renyi eps in 0.3 .. 35."""
    draw = random.Random(seed)
    checked = 0
    while checked < 25:
        sample_rate = 10 ** draw.uniform(-3, 0)
        steps = int(10 ** draw.uniform(0, 3))
        delta = 10 ** draw.uniform(-7, -4)
        noise_multiplier = max(0.4, sample_rate * math.sqrt(steps)) * 10 ** draw.uniform(0, 0.8)
        mechanism = {
            "noise_multiplier": noise_multiplier,
            "sample_rate": sample_rate,
            "steps": steps,
        }
        if 0.3 <= accounting.epsilon(**mechanism, delta=delta, accountant="rdp") <= 35:
            assert_tight(**mechanism, delta=delta)
            checked += 1


@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("noise_multiplier", [0.5, 3.7, 40.0])
def test_full_batches_are_the_analytic_gaussian(noise_multiplier, steps):
    special = pytest.importorskip("scipy.special")
    eps = accounting.epsilon(
        noise_multiplier=noise_multiplier, sample_rate=1, steps=steps, delta=DELTA
    )
    scale = noise_multiplier / math.sqrt(steps)
    delta = special.ndtr(0.5 / scale - eps * scale) - math.exp(
        eps + special.log_ndtr(-0.5 / scale - eps * scale)
    )
    assert delta == pytest.approx(DELTA, rel=1e-4)


# Noise multipliers found with privacy loss distributions for the method's usual settings.
@pytest.mark.parametrize(
    ("num_examples", "batch_size", "steps", "delta", "eps", "noise_multiplier"),
    [
        (50_000, 16_384, 200, 1e-5, 1, 17.39),
        (50_000, 16_384, 200, 1e-5, 10, 2.45),
        (50_000, 16_384, 200, 1e-5, 32, 1.11),
        (302_436, 16_384, 200, 3e-6, 10, 0.764),
        (60_000, 4_096, 4_000, 1e-5, 5, 3.94),
    ],
)
def test_calibration_matches_published_settings(
    num_examples, batch_size, steps, delta, eps, noise_multiplier
):
    found = accounting.calibrate(
        eps=eps, delta=delta, sample_rate=batch_size / num_examples, steps=steps
    )
    assert found == pytest.approx(noise_multiplier, rel=4e-3)


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.parametrize("eps", [0.5, 3, 10, 30])
@pytest.mark.parametrize(("sample_rate", "steps"), [(1.0, 3), (0.13, 101), (0.004, 1)])
def test_calibration_never_exceeds_the_target(eps, sample_rate, steps, accountant):
    plan = {"delta": DELTA, "sample_rate": sample_rate, "steps": steps, "accountant": accountant}
    noise_multiplier = accounting.calibrate(eps=eps, **plan)
    spent = accounting.epsilon(noise_multiplier=noise_multiplier, **plan)
    assert 0.999 * eps <= spent <= eps


def test_epsilon_grows_with_steps_and_falls_with_noise():
    plan = {"sample_rate": 0.1, "delta": DELTA}
    by_steps = [
        accounting.epsilon(noise_multiplier=1.5, steps=steps, **plan) for steps in (0, 1, 2, 50, 51)
    ]
    assert by_steps == sorted(set(by_steps))
    by_noise = [
        accounting.epsilon(noise_multiplier=noise, steps=50, **plan) for noise in (8, 2, 1, 0.6, 0)
    ]
    assert by_noise == sorted(set(by_noise))


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
def test_edges(accountant):
    plan = {"sample_rate": 0.1, "delta": DELTA, "accountant": accountant}
    assert accounting.epsilon(noise_multiplier=1, steps=0, **plan) == 0
    assert accounting.epsilon(noise_multiplier=0, steps=1, **plan) == math.inf


def refuse(*args, **kwargs):
    raise RuntimeError("Discrete mean differs")


class WrongEpsilon:
    def __init__(self, eps):
        self.eps = eps

    def compute_epsilon(self, *args):
        return self.eps, self.eps, self.eps


@pytest.mark.parametrize(
    ("name", "replacement", "reason"),
    [
        ("discretize", refuse, "Discrete mean differs"),
        ("compose_heterogeneous", lambda *args: WrongEpsilon(math.nan), "nan"),
        ("compose_heterogeneous", lambda *args: WrongEpsilon(-0.2), "-0.2"),
    ],
)
def test_failing_prv_falls_back_to_rdp_and_says_so(monkeypatch, name, replacement, reason):
    plan = {"noise_multiplier": 1.2, "sample_rate": 0.1, "steps": 20, "delta": DELTA}
    composition._spent.cache_clear()
    monkeypatch.setattr(prv, name, replacement)
    spent = accounting.spent(**plan)
    composition._spent.cache_clear()
    assert spent.eps == accounting.epsilon(**plan, accountant="rdp")
    assert spent.accountant.startswith("rdp (prv failed") and reason in spent.accountant
    monkeypatch.undo()
    assert accounting.spent(**plan).accountant == "prv"


@pytest.mark.parametrize(
    "hard",
    [
        {
            "noise_multiplier": 0.02,
            "sample_rate": 0.5,
            "steps": 10,
            "delta": DELTA,
        },  # losses overflow
        {
            "noise_multiplier": 3.0,
            "sample_rate": 0.05,
            "steps": 1000,
            "delta": 1e-14,
        },  # delta too small
    ],
)
def test_hard_regimes_get_the_rdp_bound(hard):
    spent = accounting.spent(**hard)
    assert spent.accountant.startswith("rdp (prv failed")
    assert spent.eps == accounting.epsilon(**hard, accountant="rdp")
    assert math.isfinite(spent.eps)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": -1},
        {"noise_multiplier": math.nan},
        {"sample_rate": 1.5},
        {"steps": -1},
        {"steps": 1.5},
        {"delta": 0},
        {"delta": 1},
        {"accountant": "gdp"},
    ],
)
def test_wrong_values_are_named(wrong):
    good = {
        "noise_multiplier": 1,
        "sample_rate": 0.1,
        "steps": 1,
        "delta": DELTA,
        "accountant": "prv",
    }
    with pytest.raises(UserError, match=next(iter(wrong))):
        accounting.epsilon(**(good | wrong))


def test_impossible_targets_are_refused():
    with pytest.raises(UserError, match=r"privacy\.eps=1e-12 cannot be met"):
        accounting.calibrate(eps=1e-12, delta=1e-9, sample_rate=0.5, steps=10, accountant="rdp")
    with pytest.raises(UserError, match=r"privacy\.eps"):
        accounting.calibrate(eps=0, delta=DELTA, sample_rate=0.5, steps=10)
