"""What the entries of a ledger cost together, for whom, and what a budget still holds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dp_synth.checks import positive
from dp_synth.errors import UserError
from dp_synth.privacy.accounting import Mechanism, Spent, SubsampledGaussian, calibrate, composed
from dp_synth.privacy.ledger.entries import Held, Query
from dp_synth.privacy.wording import EXAMPLE, eps_at_delta, round_up


@dataclass(frozen=True)
class Composition:
    """All queries on a data set together, for one unit of privacy.

    Attributes:
        unit: who is protected: "example", or a named unit such as "patient".
        delta: of ``prv`` and ``rdp``; None where nothing is composed.
        queries: how many are composed.
        prv, rdp: upper bounds on their eps.
        unbounded: queries that have an eps for examples alone, or for another unit. They give this
            one no bound, so that where there are any, ``prv`` is not what this unit is promised.
        looks: queries that no finite eps covers. They are in no sum.
    """

    unit: str
    delta: float | None
    queries: int
    prv: Spent
    rdp: Spent
    unbounded: int
    looks: int


def compose(
    queries: Iterable[Query], unit: str = EXAMPLE, delta: float | None = None
) -> Composition:
    """Compose what the queries on one data set cost one unit.

    For examples all queries compose. What is compared is the world as it is with one in which, in
    every query, the contribution that an example has a part in is zero: its own where the query
    counts examples, its whole patient's where it counts patients. So the bound is about whether the
    example and those who contribute together with it took part. Of hiding one image of a patient
    whose others stay it says less: that moves the patient's contribution from one value to another,
    by up to twice the clipping bound.

    For a named unit only the queries that count this unit compose. The others bound what one example
    adds, and a patient may have any number of these.

    The mechanisms are composed as if they had been settled beforehand. Somebody who chooses the next
    run's eps or steps in view of an earlier run's results leaves what the accountants assume.

    Args:
        queries: on one data set, as they count now.
        unit: "example" or a unit that queries name.
        delta: by default the smallest that any of the queries declares, so that units compare.
    """
    queries = list(queries)
    finite = [query for query in queries if query.mechanism is not None]
    counted = [query for query in finite if unit in (EXAMPLE, query.unit)]
    mechanisms = _mechanisms(counted)
    delta = common_delta(finite, delta)
    return Composition(
        unit=unit,
        delta=delta if counted else None,
        queries=len(counted),
        prv=_composed(mechanisms, delta, "prv"),
        rdp=_composed(mechanisms, delta, "rdp"),
        unbounded=len(finite) - len(counted),
        looks=len(queries) - len(finite),
    )


def counted_queries(held: Iterable[Held]) -> list[Query]:
    """The queries that read private data, or may have."""
    return [one.query for one in held if one.status != "unused"]


def common_delta(queries: Iterable[Query], delta: float | None = None) -> float | None:
    """The delta at which queries are composed: the given one, else the smallest that they declare.

    Raises:
        UserError: the given one is not between 0 and 1.
    """
    if delta is None:
        return min((query.delta for query in queries if query.delta is not None), default=None)
    if positive("ledger.delta", delta) >= 1:
        raise UserError(f"ledger.delta={delta} must lie strictly between 0 and 1.")
    return delta


def check_budget(
    before: Sequence[Query], asked: Sequence[Query], max_eps: float, delta: float | None = None
) -> None:
    """Refuse queries with which a data set would cost more than its budget.

    The budget is for examples, for whom everything counts; with `max_eps` kept for them, the queries
    that count another unit keep it for that unit, too. Looks have no eps and pass.

    Args:
        before: what counts already on the data set.
        asked: what a run wants to do, on the same data set.
        max_eps: the budget.
        delta: see ``compose``.

    Raises:
        UserError: naming what is spent, what was asked for and what would still fit.
    """
    max_eps = positive("ledger.max_eps", max_eps)
    asked_mechanisms = _mechanisms(asked)
    delta = common_delta([*before, *asked], delta)
    if not asked_mechanisms or delta is None:
        return
    spent = _composed(_mechanisms(before), delta).eps
    together = _composed([*_mechanisms(before), *asked_mechanisms], delta).eps
    if together <= max_eps:
        return
    fits = what_fits(before, asked, max_eps, delta)
    remedy = (
        "nothing more fits"
        if fits is None
        else f"with the same batch size and steps, eps = {_round_down(fits)} at delta = "
        f"{_own_delta(asked):g} would still fit"
    )
    looks = len(before) - len(_mechanisms(before))
    aside = f" (looks that have no eps, and are in no sum: {looks})" if looks else ""
    raise UserError(
        f"ledger.max_eps={max_eps:g} is not kept: on dataset.name={asked[0].dataset} "
        f"{eps_at_delta(spent, delta)} is spent or reserved{aside}, this run asks for "
        f"{round_up(_composed(asked_mechanisms, delta).eps)}, and both together come to "
        f"{round_up(together)}; {remedy}."
    )


def what_fits(
    before: Sequence[Query], asked: Sequence[Query], max_eps: float, delta: float
) -> float | None:
    """The largest eps, at their own delta, that queries with more noise could have in a budget.

    The noise of the query with most steps is raised; its steps and sampling rate, and the other
    queries, stay as they are. None where no noise is enough, or no query has steps.
    """
    mechanisms = _mechanisms(asked)
    stepping = [one for one in mechanisms if isinstance(one, SubsampledGaussian)]
    if not stepping:
        return None
    main = max(stepping, key=lambda one: one.steps)
    rest = list(mechanisms)
    rest.remove(main)
    try:
        noise_multiplier = calibrate(
            eps=max_eps,
            delta=delta,
            sample_rate=main.sample_rate,
            steps=main.steps,
            others=[*_mechanisms(before), *rest],
        )
    except UserError:
        return None
    fitting = replace(main, noise_multiplier=noise_multiplier)
    return _composed([fitting, *rest], _own_delta(asked)).eps


def _mechanisms(queries: Iterable[Query]) -> list[Mechanism]:
    return [query.mechanism for query in queries if query.mechanism is not None]


def _composed(
    mechanisms: Sequence[Mechanism], delta: float | None, accountant: str = "prv"
) -> Spent:
    if delta is None:
        return Spent(0.0, accountant)
    return composed(mechanisms, delta=delta, accountant=accountant)


def _own_delta(asked: Sequence[Query]) -> float:
    delta = common_delta(asked)
    assert delta is not None  # some of them have a mechanism, and with it a delta
    return delta


def _round_down(eps: float) -> str:
    """eps with 4 significant digits, never above its value, so that it can be typed."""
    step = 10.0 ** (math.floor(math.log10(eps)) - 3)
    return f"{math.floor(eps / step + 1e-9) * step:.4g}"
