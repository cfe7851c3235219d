"""A search for hyper-parameters whose whole cost is known: the best of a secret number of runs.

Papernot and Steinke 2022, "Hyperparameter tuning with Renyi differential privacy" (arXiv 2110.03620):
each run draws its hyper-parameters afresh, how many runs there are is drawn from a law that is
public, and nothing leaves but the best run.
"""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dp_synth.checks import positive
from dp_synth.errors import UserError
from dp_synth.privacy.accounting import RandomStopping, Spent, composed
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.statement import query_entry
from dp_synth.privacy.wording import GUARANTEE

QUERY = "private_search"  # its name in the ledger and in privacy.json
WHAT = "The best of a secret number of fine-tuning runs."

MAY_LEAVE = "The best run alone: its model, samples, settings and score."
SECRET = (
    "The number of runs, every other run's model and score, and how long the search took: "
    "the guarantee holds while these stay unknown."
)

# Begins as the statement of a void run does: until a run is chosen, no eps speaks for it.
_NOT_CHOSEN = "void: a run of a private search, which promises something for its best run alone"
_SEARCH_SENTENCE = "Hyper-parameter search:"
_COVERED = (
    "Hyper-parameter search: eps covers the search that found this run, while nothing else of it "
    "leaves: not the number of its runs, nor another run's model or score, nor how long it took. "
    "Further searches and runs on the same private data spend eps of their own (the ledger composes "
    "them)."
)

_UNIFORM_BITS = 53
_LEAST_SHARE = 1e-3  # of the whole budget, for one run
_TOLERANCE = 2e-3  # relative, of one run's eps


def search_mechanism(plan: PrivacyPlan, expected_runs: float, eta: float) -> RandomStopping:
    """The best of ``expected_runs`` runs of a calibrated plan, on average.

    Args:
        plan: of one run; every run of the search must have these mechanisms.
        expected_runs: above 1.
        eta: shape of the truncated negative binomial law, above -1; see ``RandomStopping``.

    Raises:
        UserError: a value out of range.
    """
    if not positive("search.expected_runs", expected_runs) > 1:
        raise UserError(
            f"search.expected_runs={expected_runs} must be above 1: one run at least is always made."
        )
    candidate = tuple(plan.mechanisms().values())
    return RandomStopping.expecting(expected_runs, candidate, eta)


def search_cost(mechanism: RandomStopping, plan: PrivacyPlan) -> Spent:
    """What the whole search costs, at the plan's delta."""
    return composed([mechanism], delta=plan.delta, accountant=plan.accountant)


def draw_number_of_runs(mechanism: RandomStopping) -> int:
    """The number of runs, at least 1, from the operating system's entropy: it must stay secret."""
    return mechanism.number_of_runs(secrets.randbits(_UNIFORM_BITS) / 2**_UNIFORM_BITS)


def draw_choices(choices: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A value for each key, each uniform and on its own, from the operating system's entropy."""
    return {key: secrets.choice(values) for key, values in choices.items()}


def eps_of_one_run(total: float, cost: Callable[[float], float]) -> float:
    """The largest eps of one run with which the whole search keeps ``total``, to within 0.2 %.

    Args:
        total: eps of the whole search.
        cost: from one run's eps to the whole search's, at the same delta; never falling.

    Raises:
        UserError: even a thousandth of ``total`` for one run is too much.
    """
    low, high = total * _LEAST_SHARE, total
    if cost(low) > total:
        raise UserError(
            f"search.eps={total:g} is not kept even by runs of eps={low:.2g}; ask for a larger "
            "search.eps, or a smaller search.expected_runs."
        )
    while high / low > 1 + _TOLERANCE:
        middle = math.sqrt(low * high)
        if cost(middle) <= total:
            low = middle
        else:
            high = middle
    return low


def statement_in_search(
    statement: Mapping[str, Any], mechanism: RandomStopping, accountant: str
) -> dict[str, Any]:
    """The statement of a run of a search: it states the search's eps, and holds for no run yet.

    Args:
        statement: of the run by itself.
        mechanism: of the search, as the ledger holds it.
        accountant: "prv" or "rdp".
    """
    delta = statement["delta"]
    spent = composed([mechanism], delta=delta, accountant=accountant)
    return {
        **statement,
        "guarantee": _NOT_CHOSEN,
        "eps": spent.eps,
        "eps_rdp": composed([mechanism], delta=delta, accountant="rdp").eps,
        "accountant": spent.accountant,
        "search": {
            "expected_runs": mechanism.runs.expected,
            "eps_of_one_run": statement["eps"],
            "may_leave": MAY_LEAVE,
            "secret": SECRET,
        },
        "queries": [
            query_entry(QUERY, mechanism, delta=delta, accountant=accountant, released=MAY_LEAVE)
        ],
        "not_covered": [
            _COVERED if sentence.startswith(_SEARCH_SENTENCE) else sentence
            for sentence in statement["not_covered"]
        ],
    }


def statement_of_best(statement: Mapping[str, Any]) -> dict[str, Any]:
    """The statement of the run that a search has chosen: now its eps holds."""
    return {**statement, "guarantee": GUARANTEE}
