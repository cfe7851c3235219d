"""Plans: validation that names the key, calibration, statements, and the public twin."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
from conftest import refusal

from dp_synth.errors import UserError
from dp_synth.privacy.batches import EpochBatches, PoissonBatches
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.privacy.randomness import (
    PrivateRandomness,
    PublicRandomness,
    RepeatablePrivateRandomness,
)

GOOD = {
    "eps": 3,
    "delta": 1e-5,
    "max_grad_norm": 1.0,
    "batch_size": 97,
    "steps": 41,
    "num_examples": 1009,
}
PUBLIC = {"batch_size": 7, "steps": 5, "num_examples": 23}


@pytest.fixture(scope="module")
def plan():
    return PrivacyPlan(**GOOD).calibrate()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("privacy.eps", [0, -1, math.nan, math.inf, "3", True, None]),
        ("privacy.delta", [0, -1e-5, 1, 2, math.nan, "1e-5"]),
        ("privacy.max_grad_norm", [0, -1, math.inf, math.nan, True]),
        ("privacy.batch_size", [0, -1, 1.5, 1010, True, "97", math.nan, math.inf]),
        ("privacy.steps", [0, -1, 0.5, False, "41", math.inf]),
        ("privacy.multiplicity", [0, -3, 1.5, True]),
        ("dataset.num_examples", [0, -1, 2.5, "1009"]),
        ("privacy.accountant", ["gdp", None, 1]),
        ("privacy.engine", ["ghost", None]),
        ("privacy.clipping", ["per_layer", None, 1]),
        ("privacy.noise_multiplier", [0, -1, math.nan, "1"]),
        ("privacy.unsafe_repeatable_randomness", [-1, 0.5, True, "0"]),
    ],
)
def test_a_wrong_value_is_named_as_the_user_types_it(name, values):
    for value in values:
        with pytest.raises(UserError, match=name.replace(".", r"\.") + "="):
            PrivacyPlan(**(GOOD | {name.split(".")[1]: value}))


def test_a_batch_larger_than_the_data_says_what_works():
    message = r"privacy\.batch_size=1010 is larger than the N=1009 examples.*at most 1009 works"
    with pytest.raises(UserError, match=message):
        PrivacyPlan(**(GOOD | {"batch_size": 1010}))


def test_opacus_is_refused_with_several_draws():
    for multiplicity in (2, 128):
        with pytest.raises(
            UserError, match=r"privacy\.multiplicity=1 or privacy\.engine=auto would"
        ):
            PrivacyPlan(**GOOD, engine="opacus", multiplicity=multiplicity)
    assert PrivacyPlan(**GOOD, engine="opacus", multiplicity=1).engine == "opacus"


@pytest.mark.parametrize(("delta", "warned"), [(1 / 1009, True), (0.5, True), (9e-4, False)])
def test_a_delta_that_allows_publishing_records_warns(delta, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PrivacyPlan(**(GOOD | {"delta": delta}))
    assert [("1/N" in str(warning.message)) for warning in caught] == [True] * warned


def test_whole_floats_and_numpy_numbers_become_plain():
    plan = PrivacyPlan(**(GOOD | {"steps": 41.0, "batch_size": np.int64(97), "eps": np.float64(3)}))
    assert plan == PrivacyPlan(**GOOD)
    assert type(plan.steps) is int and type(plan.batch_size) is int and type(plan.eps) is float


def test_plans_are_frozen():
    for frozen in (PrivacyPlan(**GOOD), PublicPlan(**PUBLIC)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.steps = 2


@pytest.mark.parametrize(
    ("batch_size", "num_examples"), [(1, 1), (1, 3), (97, 1009), (4096, 60000)]
)
def test_sample_rate_is_not_rounded(batch_size, num_examples):
    sizes = {"batch_size": batch_size, "num_examples": num_examples}
    plan = PrivacyPlan(**(GOOD | sizes | {"delta": 1e-7}))
    assert plan.sample_rate == batch_size / num_examples
    assert plan.batches(PrivateRandomness()).sample_rate == plan.sample_rate


def test_calibration_keeps_the_promise_and_happens_once(plan):
    assert PrivacyPlan(**GOOD).noise_multiplier is None
    assert plan.calibrate() is plan
    assert 0.999 * plan.eps <= plan.epsilon() <= plan.eps
    assert PrivacyPlan(**GOOD).epsilon() == plan.epsilon()
    assert plan.epsilon(0) == 0 < plan.epsilon(1) < plan.epsilon(40) < plan.epsilon(41)
    assert plan.rdp_epsilon() >= plan.epsilon()
    with pytest.raises(UserError, match=r"privacy\.steps=41"):
        plan.epsilon(42)


def test_the_curve_rises_from_nothing_to_the_promise(plan):
    curve = plan.epsilon_curve(5)
    assert curve[0] == (0, 0) and curve[-1] == (41, plan.epsilon())
    assert len(curve) == 5 and curve == sorted(curve)
    assert [eps for _, eps in curve] == sorted(eps for _, eps in curve)
    assert len(dataclasses.replace(plan, steps=2).epsilon_curve(20)) == 3


def test_randomness_is_secret_unless_a_test_says_otherwise(plan):
    assert isinstance(plan.randomness(seed=1), PrivateRandomness)
    unsafe = dataclasses.replace(plan, unsafe_repeatable_randomness=5)
    for seed in (1, 2):  # the public seed has no say
        source = unsafe.randomness(seed)
        assert isinstance(source, RepeatablePrivateRandomness) and source.seed == 5
    assert "void" in unsafe.statement(41, "finished")["guarantee"]
    assert "void" not in plan.statement(41, "finished")["guarantee"]


def test_batches_are_poisson_and_resume(plan):
    batches = plan.batches(PrivateRandomness(), first_step=40)
    assert isinstance(batches, PoissonBatches) and len(list(batches)) == 1


def test_a_changed_mechanism_is_named(plan):
    assert plan.same_mechanism(PrivacyPlan(**GOOD)) == []
    for engine in ("loop", "opacus"):
        assert plan.same_mechanism(dataclasses.replace(plan, engine=engine)) == []
    assert plan.same_mechanism(dataclasses.replace(plan, clipping="automatic")) == ["clipping"]
    changed = dataclasses.replace(plan, max_grad_norm=2.0, multiplicity=4)
    assert plan.same_mechanism(changed) == ["max_grad_norm", "multiplicity"]
    assert "noise_multiplier" in plan.same_mechanism(PrivacyPlan(**(GOOD | {"steps": 42})))
    assert plan.same_mechanism(PublicPlan(**PUBLIC)) == ["private"]
    assert PublicPlan(**PUBLIC).same_mechanism(plan) == ["private"]


@pytest.mark.parametrize("kind", [PrivacyPlan, PublicPlan])
def test_plans_survive_json(kind):
    plan = kind(**(GOOD if kind is PrivacyPlan else PUBLIC)).calibrate()
    assert kind.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(UserError, match="surprise"):
        kind.from_dict(plan.to_dict() | {"surprise": 1})


def test_a_running_statement_never_understates(plan):
    running, stopped = plan.statement(0, "running"), plan.statement(3, "interrupted")
    for statement in (running, stopped):
        assert statement["eps"] == plan.epsilon() and statement["steps"] == 41
        assert statement["steps_planned"] == 41
    assert running["steps_taken"] is None and stopped["steps_taken"] == 3
    finished = plan.statement(3, "finished")
    assert finished["eps"] == plan.epsilon(3) and finished["steps"] == 3
    with pytest.raises(UserError):
        plan.statement(42, "finished")


def test_a_noise_multiplier_that_does_not_keep_eps_is_refused(plan):
    enough = plan.calibrate().noise_multiplier
    assert (
        dataclasses.replace(plan, noise_multiplier=2 * enough).calibrate().noise_multiplier
        == 2 * enough
    )
    with pytest.raises(UserError, match="privacy.noise_multiplier"):
        dataclasses.replace(plan, noise_multiplier=0.9 * enough).calibrate()


def test_the_way_of_clipping_is_stated_and_costs_no_noise(plan):
    automatic = PrivacyPlan(**GOOD, clipping="automatic").calibrate()
    assert automatic.noise_multiplier == plan.noise_multiplier
    for each in (plan, automatic):
        statement = each.statement(41, "finished")
        assert statement["clipping"] == each.clipping


def test_the_statement_holds_the_whole_mechanism(plan):
    statement = json.loads(json.dumps(plan.statement(41, "finished")))
    for name in ("batch_size", "max_grad_norm", "multiplicity", "num_examples", "delta"):
        assert statement[name] == getattr(plan, name)
    assert statement["noise_multiplier"] == plan.noise_multiplier
    assert statement["sample_rate"] == 97 / 1009
    assert statement["adjacency"] == "zero_out" and statement["sampling"] == "poisson"
    assert statement["accountant"] == "prv" and statement["eps_rdp"] >= statement["eps"]
    assert [query["steps"] for query in statement["queries"]] == [41]
    assert statement["unaccounted_looks"] == []
    for topic in ("Hyper-parameter", "Floating point", "test split", "num_examples"):
        assert any(topic in sentence for sentence in statement["not_covered"])


def test_the_public_plan_promises_nothing():
    plan = PublicPlan(**(PUBLIC | {"batch_size": 100})).calibrate()
    assert plan.batch_size == 23 and not plan.private
    assert plan.epsilon() == math.inf
    randomness = plan.randomness(4)
    assert isinstance(randomness, PublicRandomness) and randomness.seed == 4
    batches = plan.batches(randomness, first_step=2)
    assert isinstance(batches, EpochBatches) and [len(batch) for batch in batches] == [23] * 3
    statement = json.loads(json.dumps(plan.statement(5, "finished"), allow_nan=False))
    assert statement["eps"] is None and "none" in statement["guarantee"]


@pytest.mark.parametrize("name", ["batch_size", "steps", "num_examples", "multiplicity"])
def test_the_public_plan_checks_its_counts(name):
    with pytest.raises(UserError, match=name):
        PublicPlan(**(PUBLIC | {name: 0}))


def test_abandoned_steps_count_at_the_noise_that_the_run_began_with():
    plan = PrivacyPlan(**GOOD, noise_multiplier=2.0)
    later = plan.after_abandoning(5)
    assert later.noise_multiplier == plan.noise_multiplier and later.steps == plan.steps
    longer = PrivacyPlan(**{**GOOD, "steps": GOOD["steps"] + 5}, noise_multiplier=2.0)
    assert later.epsilon() == longer.epsilon() > plan.epsilon()
    assert later.epsilon(3) == longer.epsilon(8)
    assert later.statement(plan.steps, "finished")["eps"] == longer.epsilon()
    assert not plan.same_mechanism(later)


def test_a_plan_whose_eps_is_used_up_holds_no_abandoned_step():
    plan = PrivacyPlan(**GOOD)
    assert plan.after_abandoning(0) == plan.calibrate()
    assert "older checkpoint" in refusal(plan.after_abandoning, 5)
