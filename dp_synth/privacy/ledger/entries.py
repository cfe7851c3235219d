"""What an entry of the ledger means: a query on private data, and what of it counts now."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from dp_synth.errors import UserError
from dp_synth.privacy.accounting import Mechanism, SubsampledGaussian, mechanism_from_dict
from dp_synth.privacy.ledger.chain import Entry

Key = tuple[str, str, str]
Status = Literal["reserved", "settled", "unused", "look"]


@dataclass(frozen=True, kw_only=True)
class Query:
    """One use of private data, by a run.

    Attributes:
        dataset: the name that the data set was declared with, under which uses are added up.
        root: its folder, absolute, or None where it has none.
        run: the run's directory, absolute.
        started: ISO time at which the run was begun; with ``run`` it names the run.
        query: such as "dp_sgd"; a run has each name once.
        unit: what one contribution of the query comes from: "example", or a named unit.
        num_examples: how many of these there are, a public number.
        mechanism: None where no finite eps covers it (a look), such as evaluation without noise.
        delta: at which the query alone is accounted for; None for a look.
        what: a sentence.
    """

    dataset: str
    root: str | None
    run: str
    started: str
    query: str
    unit: str
    num_examples: int
    mechanism: Mechanism | None
    delta: float | None
    what: str

    def __post_init__(self) -> None:
        if self.mechanism is not None and self.delta is None:
            raise ValueError(f"{self.query}: a query that has a mechanism needs its delta, too")

    @property
    def key(self) -> Key:
        """The newest entry with this key is the one that counts."""
        return (self.run, self.started, self.query)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What counts now of one query.

    Attributes:
        query: with its mechanism as reserved, or as settled.
        planned: the mechanism as it was last reserved.
        status: "reserved" (the whole plan counts), "settled" (what was done counts), "unused" (it
            never read private data, and counts for nothing) or "look" (no finite eps).
        written: ISO time of its first entry.
        least: the most steps that it was ever settled at: no settlement goes below.
    """

    query: Query
    planned: Mechanism | None
    status: Status
    written: str
    least: int = 0

    def settled(self, steps_taken: int) -> "Held":
        """The same, lowered to what was done; never below what an earlier settlement says.

        Args:
            steps_taken: 0 says that the query never read private data. Otherwise it lowers the
                steps of a subsampled Gaussian, and leaves a mechanism that has none as it is.

        Raises:
            RuntimeError: more than was reserved.
        """
        if not isinstance(self.planned, SubsampledGaussian):
            return replace(self, status=_used(self.planned) if steps_taken else "unused")
        if steps_taken > self.planned.steps:
            raise RuntimeError(
                f"{self.query.query}: {steps_taken} steps were taken and {self.planned.steps} were "
                "reserved"
            )
        steps_taken = max(steps_taken, self.least)
        mechanism = replace(self.planned, steps=steps_taken)
        status: Status = "settled" if steps_taken else "unused"
        query = replace(self.query, mechanism=mechanism)
        return replace(self, query=query, status=status, least=steps_taken)

    def reserved(self, query: Query) -> "Held":
        """The same, raised to what ``query`` asks for.

        Raises:
            UserError: the query is another one, or asks for less than what counts already: the
                newest entry of a key is the only one that counts, so that the difference would be
                lost.
        """
        before = self.query
        if _without_steps(before) != _without_steps(query) or _steps(before) > _steps(query):
            raise UserError(
                f"run={query.run} entered its query {query.query} into the ledger with another "
                "mechanism; a run goes on under the plan that it began with."
            )
        first = reserved(query)
        return replace(first, written=self.written, least=self.least)

    def to_entry(self) -> Entry:
        """JSON values for the file."""
        mechanism = self.query.mechanism
        return {
            "status": self.status,
            "written": _now(),
            **asdict(self.query),
            "mechanism": None if mechanism is None else mechanism.to_dict(),
        }


def reserved(query: Query) -> Held:
    """A query of which nothing was entered before."""
    mechanism = query.mechanism
    status: Status = "look" if mechanism is None else "reserved"
    return Held(query=query, planned=mechanism, status=status, written=_now())


def held(entries: Iterable[Entry]) -> dict[Key, Held]:
    """What counts after all these entries, in the order in which the queries first appeared.

    Raises:
        UserError: an entry that this version of the program does not know.
    """
    found: dict[Key, Held] = {}
    for number, entry in enumerate(entries, start=1):
        try:
            query, status, written = _parse(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"The ledger's entry {number} is not one that this version of the program knows "
                f"({error}); use the version that wrote it."
            ) from error
        before = found.get(query.key)
        is_first = before is None or status in ("reserved", "look")
        found[query.key] = Held(
            query=query,
            planned=query.mechanism if before is None or is_first else before.planned,
            status=status,
            written=written if before is None else before.written,
            least=max(_steps(query) if status == "settled" else 0, before.least if before else 0),
        )
    return found


def _parse(entry: Entry) -> tuple[Query, Status, str]:
    values = dict(entry)
    status, written = values.pop("status"), str(values.pop("written"))
    if status not in ("reserved", "settled", "unused", "look"):
        raise ValueError(f"status {status!r}")
    mechanism = values.pop("mechanism")
    query = Query(mechanism=None if mechanism is None else mechanism_from_dict(mechanism), **values)
    return query, status, written


def _used(mechanism: Mechanism | None) -> Status:
    return "look" if mechanism is None else "settled"


def _without_steps(query: Query) -> Query:
    """What a run may not change; how a query is described in words is not part of it."""
    mechanism = query.mechanism
    if isinstance(mechanism, SubsampledGaussian):
        mechanism = replace(mechanism, steps=0)
    return replace(query, mechanism=mechanism, what="", root=None)


def _steps(query: Query) -> int:
    return query.mechanism.steps if isinstance(query.mechanism, SubsampledGaussian) else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
