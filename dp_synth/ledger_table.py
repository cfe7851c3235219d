"""The ledger as a table to read: each query alone, then all on a data set together."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dp_synth.errors import UserError
from dp_synth.privacy.accounting import Mechanism, SubsampledGaussian, composed
from dp_synth.privacy.ledger import Held, Ledger
from dp_synth.privacy.ledger.budget import Composition, compose, counted_queries
from dp_synth.privacy.wording import EXAMPLE, eps_at_delta, round_up
from dp_synth.summary import shown

_COLUMNS = ("when", "run", "data set", "query", "unit", "steps", "eps alone", "at delta", "status")

_NOTES = """\
Looks are uses of private data that no finite eps covers, such as evaluation without noise. They are
in no sum above. All other queries are composed as if their settings had been fixed beforehand, and
only what was entered in this file, under the same data set name, is known.
The chain shows lines that were changed, removed or moved, but not that its last lines were cut off
or that all were rewritten. Note the newest hash down elsewhere; later
    python -m dp_synth.ledger verify expect=HASH
tells whether it still stands in the chain."""


def overview(ledger: Ledger, dataset: str | None, delta: float | None) -> dict[str, Any]:
    """What a ledger says, fit for JSON.

    Args:
        ledger: is checked.
        dataset: the declared name of a data set; None for all.
        delta: at which queries are composed; see ``compose``.

    Raises:
        UserError: the chain is broken; ``dataset`` is in no entry, though others are.
    """
    everything = ledger.queries()
    names = list(dict.fromkeys(one.query.dataset for one in everything))
    if dataset is not None and names and dataset not in names:
        raise UserError(f"dataset={dataset} is in no entry of the ledger; {', '.join(names)} are.")
    chosen = [one for one in everything if dataset in (None, one.query.dataset)]
    return {
        "ledger": str(ledger.path),
        "queries": [_row(one) for one in chosen],
        "data_sets": {
            name: _together([one for one in chosen if one.query.dataset == name], delta)
            for name in names
            if dataset in (None, name)
        },
        "warnings": list(_warnings(everything, chosen, ledger.torn_lines())),
        "newest_hash": ledger.newest_hash(),
    }


def _row(one: Held) -> dict[str, Any]:
    query, mechanism = one.query, one.query.mechanism
    return {
        "written": one.written,
        "run": query.run,
        "started": query.started,
        "dataset": query.dataset,
        "root": query.root,
        "query": query.query,
        "what": query.what,
        "unit": query.unit,
        "num_examples": query.num_examples,
        "status": one.status,
        "mechanism": None if mechanism is None else mechanism.to_dict(),
        "steps": _steps(mechanism),
        "steps_planned": _steps(one.planned),
        "eps": _alone(one),
        "delta": query.delta,
    }


def _steps(mechanism: Mechanism | None) -> int | None:
    return mechanism.steps if isinstance(mechanism, SubsampledGaussian) else None


def _alone(one: Held) -> float | None:
    """eps of a query by itself, at its own delta; None for a look."""
    if one.status == "unused":
        return 0.0
    if one.query.mechanism is None or one.query.delta is None:
        return None
    return composed([one.query.mechanism], delta=one.query.delta).eps


def _together(held: Sequence[Held], delta: float | None) -> list[dict[str, Any]]:
    """A composition for examples, and one for each unit that queries name."""
    queries = counted_queries(held)
    named = {query.unit for query in queries if query.mechanism is not None} - {EXAMPLE}
    return [_sum(compose(queries, unit, delta)) for unit in (EXAMPLE, *sorted(named))]


def _sum(together: Composition) -> dict[str, Any]:
    return {
        "unit": together.unit,
        "delta": together.delta,
        "queries": together.queries,
        "eps": together.prv.eps,
        "accountant": together.prv.accountant,
        "eps_rdp": together.rdp.eps,
        "queries_that_give_this_unit_no_bound": together.unbounded,
        "looks": together.looks,
    }


def _warnings(everything: Sequence[Held], chosen: Sequence[Held], torn: int) -> Iterator[str]:
    names: dict[str, set[str]] = defaultdict(set)
    roots: dict[str, set[str]] = defaultdict(set)
    sizes: dict[tuple[str, str], set[int]] = defaultdict(set)
    for one in everything:
        query = one.query
        if query.root is not None:
            names[query.root].add(query.dataset)
            roots[query.dataset].add(query.root)
        sizes[query.dataset, query.unit].add(query.num_examples)
    here = {one.query.dataset for one in chosen}
    for root, found in names.items():
        if len(found) > 1 and found & here:
            yield (
                f"{root} is entered under {len(found)} names ({_listed(found)}): if that is one "
                "data set, its cost is that of all of them together, which is shown nowhere."
            )
    for name in sorted(here):
        if len(roots[name]) > 1:
            yield (
                f"{name} was read from {len(roots[name])} folders ({_listed(roots[name])}): it is "
                "counted as one data set."
            )
    for (name, unit), found_sizes in sizes.items():
        if len(found_sizes) > 1 and name in here:
            yield f"{name} was declared with different numbers of {unit}s ({_listed(found_sizes)})."
    open_runs = sorted({one.query.run for one in chosen if one.status == "reserved"})
    for run in open_runs:
        yield (
            f"{run} has reserved its plan and not settled it: it is under way, or was killed. It "
            "counts whole. If nobody will resume it, python -m dp_synth.ledger settle run=DIR "
            "lowers it to its furthest checkpoint."
        )
    if torn:
        yield (
            f"Lines that a crash cut off while they were written: {torn}. No run was told that they "
            "stand there, and none went on after one."
        )


def _listed(values: set[Any]) -> str:
    return ", ".join(map(str, sorted(values)))


def print_overview(content: dict[str, Any]) -> None:
    """Print what ``overview`` found."""
    print(f"Privacy ledger  {content['ledger']}")
    if not content["queries"]:
        print("Nothing was entered yet.")
        return
    print()
    _print_table([_COLUMNS, *map(_cells, content["queries"])])
    for name, sums in content["data_sets"].items():
        print(f"\n{name}, all queries together")
        for one in sums:
            _print_sum(one)
    for warning in content["warnings"]:
        print(f"\nWarning: {warning}")
    print(f"\nNewest hash  {content['newest_hash']}\n")
    print(_NOTES)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    steps = "" if row["steps"] is None else f"{row['steps']} of {row['steps_planned']}"
    return (
        row["written"][:16].replace("T", " "),
        str(shown(Path(row["run"]))),
        row["dataset"],
        row["query"],
        row["unit"],
        steps,
        "none" if row["eps"] is None else round_up(row["eps"]),
        "" if row["delta"] is None else f"{row['delta']:g}",
        row["status"],
    )


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _print_sum(one: dict[str, Any]) -> None:
    unit, queries, missing = (
        one["unit"],
        one["queries"],
        one["queries_that_give_this_unit_no_bound"],
    )
    if queries:
        print(
            f"  per {unit}: {eps_at_delta(one['eps'], one['delta'])} ({one['accountant']}; by RDP "
            f"alone {round_up(one['eps_rdp'])}), over {_times(queries, 'query', 'queries')}"
        )
    else:
        print(f"  per {unit}: no query with an eps")
    if missing:
        print(
            f"    {_times(missing, 'more query', 'more queries')} did not count by {unit} and give "
            f"it no bound: for a {unit}, eps is that of the others only"
        )
    if one["looks"]:
        print(f"    and {_times(one['looks'], 'look', 'looks')}, of no finite eps, in no sum")


def _times(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
