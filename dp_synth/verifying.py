"""Recomputes a run's record: the statement, the config, the checkpoints and the ledger must agree."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from json import JSONDecodeError
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dp_synth.checkpoints import SafeCheckpointIO, newest_first, read_progress
from dp_synth.errors import UserError
from dp_synth.privacy.accounting import Mechanism, RandomStopping, SubsampledGaussian, composed
from dp_synth.privacy.ledger import Held, Ledger
from dp_synth.privacy.private_search import QUERY as SEARCH
from dp_synth.privacy.statement import OF_THE_MODEL, mechanism_of
from dp_synth.privacy.wording import EXAMPLE, eps_at_delta, is_void, round_up
from dp_synth.runs import Run
from dp_synth.settling import held_of_run

# Versions of the numerical libraries may differ in the last digits of what they compute.
_TOLERANCE = 1e-3


_STATED = {  # key of the config's privacy block: key of the statement
    "eps": "eps_planned",
    "delta": "delta",
    "max_grad_norm": "max_grad_norm",
    "batch_size": "batch_size",
    "steps": "steps_planned",
    "num_examples": "num_examples",
    "multiplicity": "multiplicity",
    "clipping": "clipping",
    "secure_noise": "secure_noise",
    "label_histogram_eps": "label_histogram_eps",
}


class _Wrong(Exception):
    """What is wrong, in a sentence without a full stop."""


@dataclass(frozen=True)
class _Record:
    """All that was written down about a run."""

    run: Run
    cfg: DictConfig
    statement: dict[str, Any]
    held: list[Held]

    @property
    def mechanisms(self) -> dict[str, Mechanism]:
        """What the statement lists, under the names that the ledger has for it."""
        found = {}
        for number, entry in enumerate(self.statement["queries"], start=1):
            name = entry["query"]
            found[name if name in OF_THE_MODEL else f"{name} {number}"] = mechanism_of(entry)
        return found

    def cost(self, mechanisms: list[Mechanism], accountant: str | None = None) -> float:
        """eps of some mechanisms at the statement's delta."""
        accountant = accountant or self.cfg.privacy.accountant
        return composed(mechanisms, delta=self.statement["delta"], accountant=accountant).eps

    @property
    def own(self) -> dict[str, Mechanism]:
        """The run's own queries by name; the best of a search is one of the search's candidates."""
        search = self.mechanisms.get(SEARCH)
        if not isinstance(search, RandomStopping):
            return self.mechanisms
        names = ("label_histogram", "dp_sgd")[-len(search.candidate) :]
        return dict(zip(names, search.candidate, strict=True))

    def of_the_model(self) -> list[Mechanism]:
        return [one for name, one in self.mechanisms.items() if name in OF_THE_MODEL]


def verify_run(run: Run, ledger: Ledger) -> list[dict[str, Any]]:
    """Recompute what a run's record says.

    Opens no private image. A checkpoint is read as data only.

    Args:
        run: begun, at least.
        ledger: its chain is checked, too.

    Returns:
        A dict per check: "check", "ok" and "found", which says what is right or what is wrong.

    Raises:
        UserError: there is no statement, it is damaged, or the ledger cannot be read.
    """
    statement = _statement(run)
    record = _Record(run, run.config(), statement, held_of_run(run, ledger))
    return [_result(name, check, record) for name, check in _checks(statement)]


def _statement(run: Run) -> dict[str, Any]:
    try:
        statement = run.statement()
    except JSONDecodeError:
        statement = None
    if not isinstance(statement, dict):
        raise UserError(f"{run.privacy_path} is no statement of this program: it is damaged.")
    return statement


def _checks(statement: dict[str, Any]) -> Iterator[tuple[str, Callable[[_Record], str]]]:
    if statement.get("private"):
        yield "sampling rate", _sampling_rate
        yield "mechanism", _mechanism
        yield "noise keeps the plan", _noise
        yield "eps", _eps
        yield "eps by RDP", _eps_rdp
        yield "eps of each query", _each_eps
        yield "eps of all queries", _all_eps
        yield "steps", _steps
        yield "checkpoint", _checkpoint
        yield "config", _config
        yield "queries in the ledger", _in_ledger
    else:
        yield "no promise", _no_promise
    yield "looks in the ledger", _looks
    yield "data set in the ledger", _data_set


def _result(name: str, check: Callable[[_Record], str], record: _Record) -> dict[str, Any]:
    try:
        return {"check": name, "ok": True, "found": check(record)}
    except _Wrong as wrong:
        return {"check": name, "ok": False, "found": str(wrong)}
    except UserError as error:
        return {"check": name, "ok": False, "found": str(error).removesuffix(".")}
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        found = f"the record cannot be read here ({type(error).__name__}: {error})"
        return {"check": name, "ok": False, "found": found}


def _sampling_rate(record: _Record) -> str:
    said = record.statement
    exact = said["batch_size"] / said["num_examples"]
    _same("sample_rate", said["sample_rate"], exact)
    return f"q = {said['batch_size']} / {said['num_examples']}"


def _mechanism(record: _Record) -> str:
    said = record.statement
    dp_sgd = record.own["dp_sgd"]
    if not isinstance(dp_sgd, SubsampledGaussian):
        raise _Wrong(f"query dp_sgd is {dp_sgd}")
    _same("noise_multiplier of query dp_sgd", dp_sgd.noise_multiplier, said["noise_multiplier"])
    _same("sample_rate of query dp_sgd", dp_sgd.sample_rate, said["sample_rate"])
    _same("steps of query dp_sgd", dp_sgd.steps, said["steps"] + said["steps_abandoned"])
    return f"noise multiplier {dp_sgd.noise_multiplier:.4g}, {dp_sgd.steps} steps"


def _noise(record: _Record) -> str:
    said = record.statement
    steps = said["steps_planned"] + said["steps_abandoned"]
    whole = SubsampledGaussian(said["noise_multiplier"], said["sample_rate"], steps)
    others = [one for name, one in record.own.items() if name == "label_histogram"]
    eps = record.cost([*others, whole])
    if eps > said["eps_planned"] * (1 + _TOLERANCE):
        raise _Wrong(f"the whole plan costs {round_up(eps)}, above {said['eps_planned']:g}")
    return f"the whole plan costs {round_up(eps)}, within {said['eps_planned']:g}"


def _eps(record: _Record) -> str:
    eps = record.cost(record.of_the_model())
    _close("eps", record.statement["eps"], eps)
    if is_void(record.statement):
        return f"{eps_at_delta(eps, record.statement['delta'])} would hold, and does not: the run is void"
    return eps_at_delta(eps, record.statement["delta"])


def _eps_rdp(record: _Record) -> str:
    eps = record.cost(record.of_the_model(), "rdp")
    _close("eps_rdp", record.statement["eps_rdp"], eps)
    return round_up(eps)


def _each_eps(record: _Record) -> str:
    for entry in record.statement["queries"]:
        eps = composed(
            [mechanism_of(entry)], delta=entry["delta"], accountant=record.cfg.privacy.accountant
        ).eps
        _close(f"eps of query {entry['query']}", entry["eps"], eps)
    return ", ".join(
        f"{entry['query']} {round_up(entry['eps'])}" for entry in record.statement["queries"]
    )


def _all_eps(record: _Record) -> str:
    eps = record.cost(list(record.mechanisms.values()), "prv")
    stated = record.statement.get("eps_all_queries")
    if stated is None:
        if set(record.mechanisms) - set(OF_THE_MODEL):
            raise _Wrong("eps_all_queries is missing")
        return "no query but those of the model"
    _close("eps_all_queries", stated, eps)
    return round_up(eps)


def _steps(record: _Record) -> str:
    said, progress = record.statement, read_progress(record.run.checkpoints_dir)
    if said["status"] == "finished":
        _same("steps of a finished run", said["steps"], said["steps_taken"])
    else:
        _same("steps of an unfinished run", said["steps"], said["steps_planned"])
        if record.run.has_model():
            raise _Wrong(f"status={said['status']}, but the run has a model/")
    if progress.steps > said["steps"]:
        raise _Wrong(
            f"checkpoints come to {progress.steps} steps, beyond the {said['steps']} stated"
        )
    _same("steps_abandoned", said["steps_abandoned"], progress.abandoned)
    return f"{said['steps']} stated, {progress.steps} in checkpoints"


def _checkpoint(record: _Record) -> str:
    path = next(iter(newest_first(record.run.checkpoints_dir)), None)
    if path is None:
        if record.statement["status"] == "finished":
            return "none is left"
        return "none yet"
    content = SafeCheckpointIO().load_checkpoint(path)
    states = [one for one in content["callbacks"].values() if "accountant" in one]
    if not states:
        raise _Wrong(f"{path.name} has no accountant")
    history = states[0]["accountant"]["history"]
    taken = sum(steps for _, _, steps in history)
    _same(f"steps of {path.name}", taken, int(path.stem.removeprefix("step=")))
    for noise_multiplier, sample_rate, _ in history:
        _same(
            f"noise_multiplier in {path.name}",
            noise_multiplier,
            record.statement["noise_multiplier"],
        )
        _same(f"sample_rate in {path.name}", sample_rate, record.statement["sample_rate"])
    return f"{path.name} counts {taken} steps of this mechanism"


def _config(record: _Record) -> str:
    for key, stated in _STATED.items():
        began_with = OmegaConf.select(record.cfg, f"privacy.{key}")
        if began_with != record.statement[stated]:
            raise _Wrong(
                f"config.yaml has privacy.{key}={began_with}, privacy.json has "
                f"{stated}={record.statement[stated]}"
            )
    unit = OmegaConf.select(record.cfg, "privacy.unit") or EXAMPLE
    _same("unit", record.statement["unit"], unit)
    return f"{len(_STATED) + 1} settings agree"


def _in_ledger(record: _Record) -> str:
    held = {one.query.query: one for one in record.held if one.status != "unused"}
    for name, mechanism in record.mechanisms.items():
        if name not in held:
            raise _Wrong(f"the ledger does not hold query {name}")
        found = held[name]
        if is_void(record.statement) and name in OF_THE_MODEL:
            if found.status != "look":
                raise _Wrong(f"the run is void, and the ledger has an eps for query {name}")
            continue
        _covers(name, found, mechanism, record)
    return f"all {len(record.mechanisms)} of the run"


def _covers(name: str, found: Held, mechanism: Mechanism, record: _Record) -> None:
    """Whether what the ledger holds is what the statement says.

    While a run is not finished its statement says the whole plan, and the ledger may hold the steps
    that were taken.
    """
    entered = found.query.mechanism
    unfinished = record.statement["status"] != "finished" and found.status == "settled"
    if unfinished and name == "dp_sgd":
        entered = found.planned
        progress = read_progress(record.run.checkpoints_dir)
        counted = found.query.mechanism
        if isinstance(counted, SubsampledGaussian):
            taken = progress.steps + progress.abandoned
            if counted.steps < taken:
                raise _Wrong(f"the ledger counts {counted.steps} steps, and {taken} left output")
    if entered != mechanism:
        raise _Wrong(f"the ledger holds {entered} for query {name}, privacy.json {mechanism}")


def _looks(record: _Record) -> str:
    stated = len(record.statement["unaccounted_looks"])
    entered = sum(one.query.query.startswith("look ") for one in record.held)
    if entered < stated:
        raise _Wrong(f"privacy.json lists {stated} looks, the ledger {entered} of this run")
    return f"{entered} entered, {stated} in privacy.json"


def _data_set(record: _Record) -> str:
    if not record.held:
        raise _Wrong("the ledger holds nothing of this run")
    name = str(record.cfg.dataset.name)
    for one in record.held:
        _same("data set in the ledger", one.query.dataset, name)
    statement = record.statement
    for one in record.held:
        _same("num_examples in the ledger", one.query.num_examples, statement["num_examples"])
    return f"{name}, N = {statement['num_examples']}"


def _no_promise(record: _Record) -> str:
    _same("eps of training without privacy", record.statement["eps"], None)
    return record.statement["guarantee"]


def _same(what: str, stated: Any, right: Any) -> None:
    if stated != right:
        raise _Wrong(f"{what} is {stated}, and should be {right}")


def _close(what: str, stated: float, right: float) -> None:
    if not abs(stated - right) <= _TOLERANCE * right:
        raise _Wrong(f"{what} is {stated}, and recomputed {right}")


def print_checks(checks: list[dict[str, Any]]) -> None:
    """A line for each check."""
    width = max(len(one["check"]) for one in checks)
    for one in checks:
        print(f"{'ok   ' if one['ok'] else 'WRONG'}  {one['check']:<{width}}  {one['found']}")


def refuse_wrong(run: Run, checks: list[dict[str, Any]]) -> None:
    """UserError where a check failed."""
    wrong = [one["check"] for one in checks if not one["ok"]]
    if wrong:
        raise UserError(
            f"run={run.path}: {len(wrong)} of {len(checks)} checks failed ({', '.join(wrong)}); the "
            "record does not hold together, so rely on no number of it."
        )
