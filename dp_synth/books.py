"""What a run enters into the ledger: its plan before the first look, then whatever else it does."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dp_synth.checkpoints import Progress
from dp_synth.errors import UserError
from dp_synth.privacy import private_search
from dp_synth.privacy.accounting import Mechanism, RandomStopping
from dp_synth.privacy.ledger import Held, Ledger, Query, default_path
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.privacy.statement import mechanism_of
from dp_synth.privacy.wording import EXAMPLE, is_void
from dp_synth.reporting.officer import write_privacy_page
from dp_synth.runs import Run

_WHAT = {
    "dp_sgd": "Fine-tuning of a diffusion model.",
    "label_histogram": "The classes' shares, noised.",
}


class Books:
    """Keeps the ledger and ``privacy.json`` of a run in step; the ledger is always written first.

    Args:
        run: a run that has its config, which names data set and ledger.
        cfg: in place of that config: of a sitting, whose ``ledger.max_eps`` may be another.
    """

    def __init__(self, run: Run, cfg: DictConfig | None = None) -> None:
        self.run = run
        cfg = run.config() if cfg is None else cfg
        self.ledger = ledger_of(cfg)
        self._max_eps = OmegaConf.select(cfg, "ledger.max_eps")
        self._search = OmegaConf.select(cfg, "ledger.search")
        self._searches = OmegaConf.select(cfg, "search") is not None
        self._about = about(cfg, run.path, run.started)

    def reserve(self, plan: PrivacyPlan | PublicPlan) -> None:
        """Enter the whole plan, before a private image is read.

        A run of a private search enters nothing: the search has entered all of them.

        Raises:
            UserError: the ledger cannot be written, or ``ledger.max_eps`` does not hold the plan
                beside all that was spent before; or the ledger holds no search for this plan.
        """
        if self._searches:
            self._search_of(plan)
            return
        self.ledger.reserve(*self._planned(plan), max_eps=self._max_eps)

    def settle(self, plan: PrivacyPlan | PublicPlan, steps_taken: int) -> None:
        """Lower what is held for training to what it has done.

        Args:
            plan: as it was reserved.
            steps_taken: on the branch that goes on, or has come to its end.
        """
        if isinstance(plan, PublicPlan) or self._searches:
            return
        counts = {name: part.steps for name, part in plan.mechanisms(steps_taken).items()}
        for query in self._planned(plan):
            if query.mechanism is not None:
                self.ledger.settle(query, counts[query.query])

    def cancel(self, plan: PrivacyPlan | PublicPlan) -> None:
        """Give back what is held for a run that has read nothing."""
        if self._searches:
            return
        for query in self._planned(plan):
            self.ledger.settle(query, 0)

    def statement(
        self, plan: PrivacyPlan | PublicPlan, steps_taken: int, status: str
    ) -> dict[str, Any]:
        """The plan's statement; that of a run of a private search states what the search costs.

        Raises:
            UserError: the ledger holds no search for this plan.
        """
        own = plan.statement(steps_taken, status)
        if not self._searches:
            return own
        mechanism = self._search_of(plan)
        assert isinstance(plan, PrivacyPlan)  # else there is no search for it
        return private_search.statement_in_search(own, mechanism, plan.accountant)

    def record_look(self, what: str, **details: Any) -> None:
        """Enter a look at private images that no eps covers; to be called before it.

        Every look is an entry of its own: the best of twenty measurements is twenty looks.
        """
        number = self._entered("look") + 1
        self.ledger.reserve(self._query(f"look {number}", None, None, what))
        self.run.record_look(what, **details)
        write_privacy_page(self.run)

    def record_query(self, entry: dict[str, Any]) -> None:
        """Enter a query whose output is no part of the model; to be called before it.

        Args:
            entry: as ``query_entry`` makes it.

        Raises:
            UserError: ``ledger.max_eps`` does not hold it beside all that was spent before.
        """
        number = self._entered(entry["query"]) + 1
        void = is_void(self.run.statement())
        self.ledger.reserve(
            self._query(
                f"{entry['query']} {number}",
                None if void else mechanism_of(entry),
                entry["delta"],
                entry["released"],
            ),
            max_eps=self._max_eps,
        )
        self.run.record_query(entry)
        write_privacy_page(self.run)

    def refuse_forgotten(self, progress: Progress) -> None:
        """UserError where the ledger knows of more steps than a run's checkpoints do.

        Checkpoints were removed, or an older copy of the run was put in its place: what was taken
        since would count for nothing.
        """
        taken = progress.steps + progress.abandoned
        for one in self._own():
            if one.query.query == "dp_sgd" and one.least > taken:
                raise UserError(
                    f"run={self.run.path} has checkpoints of {taken} steps, and the ledger knows of "
                    f"{one.least}; restore checkpoints/ or start a new run."
                )

    def _entered(self, name: str) -> int:
        """How many looks, or queries of a name, the ledger holds of this run."""
        return sum(one.query.query.startswith(f"{name} ") for one in self._own())

    def _own(self) -> list[Held]:
        own = (self._about["run"], self._about["started"])
        return [one for one in self.ledger.queries() if one.query.key[:2] == own]

    def _search_of(self, plan: PrivacyPlan | PublicPlan) -> RandomStopping:
        """The mechanism of the search that this run belongs to, as long as it is under way."""
        if self._search is None:
            raise UserError(
                "hparams_search=private makes many runs: add -m, and lists to choose from, such as "
                "model.lr=1e-3,3e-3."
            )
        for one in self.ledger.queries(self._about["dataset"]):
            query, mechanism = one.query, one.query.mechanism
            if (query.query, query.started) != (private_search.QUERY, str(self._search)):
                continue
            if one.status != "reserved":
                raise UserError(
                    f"ledger.search={self._search} is over, and no run can join it any more; train "
                    "without ledger.search, or begin another search."
                )
            if isinstance(mechanism, RandomStopping) and self._is_candidate(plan, query):
                return mechanism
            raise UserError(
                f"ledger.search={self._search} was entered into the ledger for other runs than this "
                "one: all runs of a search have the same noise, batches, steps, delta and data set."
            )
        raise UserError(
            f"ledger.search={self._search} is no search on dataset.name={self._about['dataset']} in "
            f"ledger.path={self.ledger.path}; leave ledger.search out, hparams_search=private sets "
            "it."
        )

    def _is_candidate(self, plan: PrivacyPlan | PublicPlan, search: Query) -> bool:
        if isinstance(plan, PublicPlan) or plan.unsafe_repeatable_randomness is not None:
            return False
        assert isinstance(search.mechanism, RandomStopping)
        stated = (search.mechanism.candidate, search.delta, search.unit, search.num_examples)
        candidate = tuple(plan.mechanisms().values())
        own = (candidate, plan.delta, self._about["unit"], self._about["num_examples"])
        return stated == own

    def _planned(self, plan: PrivacyPlan | PublicPlan) -> list[Query]:
        if isinstance(plan, PublicPlan):
            return [self._query("training", None, None, "Training without privacy.")]
        void = plan.unsafe_repeatable_randomness is not None
        return [
            self._query(name, None if void else mechanism, plan.delta, _WHAT[name])
            for name, mechanism in plan.mechanisms().items()
        ]

    def _query(
        self, name: str, mechanism: Mechanism | None, delta: float | None, what: str
    ) -> Query:
        return Query(query=name, mechanism=mechanism, delta=delta, what=what, **self._about)


def ledger_of(cfg: DictConfig) -> Ledger:
    """The ledger that a run's config names."""
    path = OmegaConf.select(cfg, "ledger.path")
    return Ledger(default_path() if path is None else Path(path))


def about(cfg: DictConfig, path: Path, started: str) -> dict[str, Any]:
    """What every query of a run says of itself; see ``Query``.

    Args:
        cfg: the config of a run, declared.
        path: the directory of the run, or of a search.
        started: when it was begun.
    """
    root = OmegaConf.select(cfg, "dataset.root")
    return {
        "dataset": str(cfg.dataset.name),
        "root": None if root is None else str(Path(root).expanduser().absolute()),
        "run": str(path.resolve()),
        "started": started,
        "unit": OmegaConf.select(cfg, "privacy.unit") or EXAMPLE,
        "num_examples": cfg.privacy.num_examples,  # canaries of an audit included
    }
