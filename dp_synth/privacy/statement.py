"""The privacy statement, ``privacy.json``: what a plan guarantees, how, and what it does not cover."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dp_synth.privacy.accounting import Mechanism, composed, mechanism_from_dict
from dp_synth.privacy.wording import (
    ASSUMPTIONS,
    EXAMPLE,
    GUARANTEE,
    MANY_IMAGES,
    MANY_UNITS,
    NO_GUARANTEE,
    VOID,
    not_covered,
)

if TYPE_CHECKING:
    from dp_synth.privacy.plan import PrivacyPlan, PublicPlan

OF_THE_MODEL = ("label_histogram", "dp_sgd", "private_search")
"""Queries whose output is the model and its samples; what comes later has an eps of its own."""

_RELEASED = {
    "dp_sgd": "The trained model, and with it every sample.",
    "label_histogram": "The share of each class, noised: how many samples of each are drawn.",
}


# The keys of an entry of queries that do not belong to its mechanism.
_ABOUT_QUERY = ("query", "eps", "delta", "released")


def private_statement(plan: PrivacyPlan, steps_taken: int, status: str) -> dict[str, Any]:
    """The statement of a calibrated plan of which ``steps_taken`` steps are taken.

    Args:
        plan: calibrated.
        steps_taken: at most ``plan.steps``.
        status: "running", "interrupted" or "finished"; until it is "finished", the eps of the whole
            plan is stated.
    """
    steps = steps_taken if status == "finished" else plan.steps
    spent = plan.spent(steps)
    void = plan.unsafe_repeatable_randomness is not None
    return {
        "private": True,
        "guarantee": VOID if void else GUARANTEE,
        "status": status,
        "eps": spent.eps,
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "steps": steps,
        "max_grad_norm": plan.max_grad_norm,
        "clipping": plan.clipping,
        "eps_planned": plan.eps,
        "eps_rdp": plan.rdp_epsilon(steps),
        "accountant": spent.accountant,
        # While it runs, nobody keeps this file up to date.
        "steps_taken": None if status == "running" else steps_taken,
        "steps_planned": plan.steps,
        "steps_abandoned": plan.abandoned_steps,
        "batch_size": plan.batch_size,
        "multiplicity": plan.multiplicity,
        "num_examples": plan.num_examples,
        "engine": plan.engine,
        "secure_noise": plan.secure_noise,
        "label_histogram_eps": plan.label_histogram_eps,
        **ASSUMPTIONS,
        "unit": plan.unit or EXAMPLE,
        "queries": [
            query_entry(
                query,
                mechanism,
                delta=plan.delta,
                accountant=plan.accountant,
                released=_RELEASED[query],
            )
            for query, mechanism in plan.mechanisms(steps).items()
        ],
        "unaccounted_looks": [],
        "not_covered": [
            MANY_UNITS if plan.unit else MANY_IMAGES,
            *not_covered(secure_noise=plan.secure_noise),
        ],
    }


def public_statement(plan: PublicPlan, steps_taken: int, status: str) -> dict[str, Any]:
    """The statement that there is no guarantee: its eps is null."""
    return {
        "private": False,
        "guarantee": NO_GUARANTEE,
        "status": status,
        "eps": None,
        "steps_taken": steps_taken,
        "steps_planned": plan.steps,
        "batch_size": plan.batch_size,
        "multiplicity": plan.multiplicity,
        "num_examples": plan.num_examples,
        "sampling": "epochs",
        "queries": [],
        "unaccounted_looks": [],
        "not_covered": ["The training data: nothing is promised about them."],
    }


def query_entry(
    query: str, mechanism: Mechanism, *, delta: float, accountant: str, released: str
) -> dict[str, Any]:
    """An entry of ``queries``: one use of private images and what it costs by itself.

    Args:
        query: its name.
        mechanism: what looked at them.
        delta: at which ``eps`` is given.
        accountant: "prv" or "rdp".
        released: a sentence: what of it may be published at this price.
    """
    eps = composed([mechanism], delta=delta, accountant=accountant).eps
    return {"query": query, **mechanism.to_dict(), "eps": eps, "delta": delta, "released": released}


def with_query(statement: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """A statement with one more query, whose output is no part of what ``eps`` speaks of.

    ``eps_all_queries`` is what all of them cost together at the statement's delta.
    """
    queries = [*statement["queries"], dict(entry)]
    accountant = "rdp" if statement["accountant"] == "rdp" else "prv"
    everything = composed(
        map(mechanism_of, queries), delta=statement["delta"], accountant=accountant
    )
    return {**statement, "queries": queries, "eps_all_queries": everything.eps}


def further_queries(statement: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The queries whose output is no part of the model, in the order in which they were entered."""
    return [query for query in statement.get("queries", []) if query["query"] not in OF_THE_MODEL]


def mechanism_of(entry: Mapping[str, Any]) -> Mechanism:
    """What an entry of ``queries`` says of its mechanism.

    Raises:
        UserError: it does not name one.
    """
    return mechanism_from_dict({k: value for k, value in entry.items() if k not in _ABOUT_QUERY})
