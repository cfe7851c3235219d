"""The privacy ledger: every query on a private data set, over all runs, and what may still be spent."""

from collections.abc import Iterable
from pathlib import Path

from dp_synth.errors import UserError
from dp_synth.files import state_folder
from dp_synth.privacy.ledger.budget import check_budget, counted_queries
from dp_synth.privacy.ledger.chain import Chain, Entry
from dp_synth.privacy.ledger.entries import Held, Key, Query, held, reserved

# Fewer digits of a noted hash could stand in a chain by accident.
_FEWEST_DIGITS = 16


def default_path() -> Path:
    """Where the ledger is unless ``ledger.path`` says otherwise: one for all runs of a user."""
    return state_folder() / "ledger.jsonl"


class Ledger:
    """The record of all queries on private data sets that share one file.

    A query is entered before it reads anything, with all that it may do, and lowered afterwards to
    what it did: whenever a process dies, the ledger holds at least what was spent. It holds public
    facts alone: names, paths, times and mechanisms; no count of a batch, no loss.

    How the file survives crashes, how it shows edits and what it cannot show: see ``Chain``. That
    every query on a data set is entered is a matter of using one file and one name for it.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self._chain = Chain(self.path)

    def reserve(
        self, *queries: Query, max_eps: float | None = None, delta: float | None = None
    ) -> None:
        """Enter queries before their first look at private data: all of them, or none.

        What stands already under the same run and name is replaced, so that a run that goes on
        enters its whole plan again. On return the entries are on disk.

        Args:
            queries: with all that they may do.
            max_eps: refuse them if everything on their data set, these included, would cost more.
            delta: at which that is computed; by default the smallest that a query on the data set
                declares.

        Raises:
            UserError: the budget does not hold them, naming what is spent and what would still fit;
                a run enters a query with another mechanism than before; the file cannot be used.
        """

        def decide(entries: list[Entry]) -> list[Entry]:
            found = self._held(entries)
            new = [
                found[query.key].reserved(query) if query.key in found else reserved(query)
                for query in queries
            ]
            if max_eps is not None:
                _check_budgets(found, queries, max_eps, delta)
            return [one.to_entry() for one in new if not _stands(one, found)]

        self._chain.extend(decide)

    def settle(self, query: Query, steps_taken: int) -> None:
        """Lower what is held for a query to what it did.

        Args:
            query: as it was reserved. One that the file does not hold, because somebody replaced the
                file, is entered.
            steps_taken: see ``Held.settled``; 0 gives back all that was reserved.

        Raises:
            RuntimeError: more steps than were reserved.
            UserError: the file cannot be used.
        """

        def decide(entries: list[Entry]) -> list[Entry]:
            found = self._held(entries)
            settled = found.get(query.key, reserved(query)).settled(steps_taken)
            return [] if _stands(settled, found) else [settled.to_entry()]

        self._chain.extend(decide)

    def queries(self, dataset: str | None = None) -> list[Held]:
        """What counts now, per run and query, oldest first.

        Args:
            dataset: the declared name of a data set; None for all.

        Raises:
            UserError: the chain is broken, or the file cannot be read.
        """
        found = self._held(self._chain.read().entries)
        return [one for one in found.values() if dataset in (None, one.query.dataset)]

    def verify(self, expect: str | None = None) -> None:
        """Check every line against the one before.

        Args:
            expect: a hash of the chain that was noted down earlier, or its first 16 digits or more;
                it must still be there. This shows what the chain by itself cannot: that lines were
                cut off its end, or all rewritten.

        Raises:
            UserError: naming the line at which the chain breaks; or the hash is not there.
        """
        hashes = self._chain.read().hashes
        if expect is None:
            return
        if len(expect) < _FEWEST_DIGITS:
            raise UserError(
                f"expect={expect} has too few digits to mean anything; give {_FEWEST_DIGITS} of "
                "the 64, or more."
            )
        if not any(digest.startswith(expect.lower()) for digest in hashes):
            raise UserError(
                f"expect={expect} is not a hash of ledger.path={self.path}: its last lines were cut "
                "off, or it was rewritten, since that hash was noted down; restore it from a backup."
            )

    def newest_hash(self) -> str | None:
        """The hash of the last line, worth noting down elsewhere; None for an empty ledger."""
        hashes = self._chain.read().hashes
        return hashes[-1] if hashes else None

    def torn_lines(self) -> int:
        """Lines that a crash cut off while they were written; no run went on after one."""
        return self._chain.read().torn

    def _held(self, entries: list[Entry]) -> dict[Key, Held]:
        try:
            return held(entries)
        except UserError as error:
            raise UserError(f"ledger.path={self.path}: {error}") from error


def _stands(one: Held, found: dict[Key, Held]) -> bool:
    """Whether the file says so already."""
    before = found.get(one.query.key)
    return before is not None and (before.query, before.status) == (one.query, one.status)


def _check_budgets(
    found: dict[Key, Held], queries: Iterable[Query], max_eps: float, delta: float | None
) -> None:
    """Check the budget of each data set; what a query held before is replaced by what it asks."""
    queries = list(queries)
    asked = {query.key for query in queries}
    others = counted_queries(one for key, one in found.items() if key not in asked)
    for dataset in dict.fromkeys(query.dataset for query in queries):
        check_budget(
            [query for query in others if query.dataset == dataset],
            [query for query in queries if query.dataset == dataset],
            max_eps,
            delta,
        )
