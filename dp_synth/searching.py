"""``-m hparams_search=private``: many runs under one reservation, of which the best alone is kept."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.launcher import Launcher
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dp_synth.books import about, ledger_of
from dp_synth.building import check_config, is_on
from dp_synth.cards import rewrite_sample_card, write_model_card
from dp_synth.checks import positive
from dp_synth.declaration import declare
from dp_synth.errors import UserError
from dp_synth.files import write_atomically
from dp_synth.loggers.choice import log_run
from dp_synth.metrics.synthetic_evaluator import SYNTHETIC_VALIDATION
from dp_synth.privacy import private_search
from dp_synth.privacy.accounting import RandomStopping
from dp_synth.privacy.ledger import Ledger, Query
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.wording import eps_at_delta
from dp_synth.report import report_runs
from dp_synth.reporting.officer import write_privacy_page
from dp_synth.runs import Run
from dp_synth.summary import shown

# What runs may differ in: their noise, batches, steps and data set are the same, so that each costs
# the same.
_SEARCHED_GROUPS = ("model", "public", "sampler")
_SEARCHED_KEYS = ("privacy.max_grad_norm", "privacy.clipping", "privacy.multiplicity")
_LOCAL_LOGGER = "dp_synth.loggers.csv_files.CSVFiles"

_BEST = "best"
_RECORD = "search.json"

Choices = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class _Scored:
    """A finished run, the settings that it drew, and what it is compared by."""

    run: Run
    drawn: Mapping[str, str]
    score: float


@dataclass
class _Search:
    """A search that the ledger holds."""

    directory: Path
    plan: PrivacyPlan
    mechanism: RandomStopping
    ledger: Ledger
    query: Query
    refused: bool = False  # its first run was, before it read a private image

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Runs may join; afterwards the search is settled as it stands, and none can any more."""
        try:
            yield
        finally:
            self.ledger.settle(self.query, 0 if self.refused else 1)


class RandomStoppingSearch:
    """Makes a random number of runs, one after another, and keeps the best one.

    The whole search is entered into the ledger before the first run, and every run refers to it.
    A run that is not the best so far is removed at once: the guarantee holds while it stays
    unknown. The best one becomes ``best/`` in the sweep's directory, beside ``search.json``.

    Args:
        loader: composes the config of a run.
        launcher: makes a run.
        config: of the sweep, Hydra's part included.
        expected_runs: how many runs there are on average, above 1.
        eta: shape of the law of their number, see ``TruncatedNegativeBinomialRuns``.
        eps: of the whole search; None: ``privacy.eps`` is that of each run.
    """

    def __init__(
        self,
        loader: ConfigLoader,
        launcher: Launcher,
        config: DictConfig,
        *,
        expected_runs: float,
        eta: float,
        eps: float | None,
    ) -> None:
        self.loader = loader
        self.launcher = launcher
        self.config = config
        self.expected_runs = expected_runs
        self.eta = eta
        self.eps = eps

    def run(self, arguments: Sequence[str]) -> None:
        """Search.

        Args:
            arguments: the command line's overrides, lists of choices among them.

        Raises:
            UserError: the search cannot be accounted for, or the ledger's budget does not hold it;
                raised before a private image is read.
        """
        fixed, choices = self._parse(arguments)
        cfg = self._config([*fixed, *_assigned(private_search.draw_choices(choices))])
        _check_searchable(cfg)
        declare(cfg)
        plan = self._calibrated(cfg)
        check_config(cfg, plan)
        search = self._reserve(cfg, plan)
        same = [*fixed, f"privacy.eps={plan.eps!r}", f"ledger.search='{search.query.started}'"]
        with search.under_way():
            best = self._best_run(search, same, choices)
        if best is not None:
            _publish(search, best, choices, cfg.objective)

    def _parse(self, arguments: Sequence[str]) -> tuple[list[str], Choices]:
        """The overrides that all runs share, and the lists to draw from by their key."""
        parser = OverridesParser.create(config_loader=self.loader)
        overrides = parser.parse_overrides(list(arguments))
        lists = [override for override in overrides if override.is_sweep_override()]
        for override in lists:
            _check_list(override)
        if not lists:
            raise UserError(
                "hparams_search=private has nothing to choose from; list values, such as "
                "model.lr=1e-3,3e-3."
            )
        if self.eps is not None and any(one.key_or_group == "privacy.eps" for one in overrides):
            raise UserError(
                "search.eps and privacy.eps exclude each other: the one is of the whole search, "
                "from which that of each run follows, the other is of each run."
            )
        return (
            [str(one.input_line) for one in overrides if one not in lists],
            {one.get_key_element(): list(one.sweep_string_iterator()) for one in lists},
        )

    def _config(self, overrides: Sequence[str]) -> DictConfig:
        """The config that a run with these overrides will be given."""
        cfg = self.loader.load_sweep_config(self.config, list(overrides))
        return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])

    def _calibrated(self, cfg: DictConfig) -> PrivacyPlan:
        """The plan of each run; with ``search.eps``, that with which the search keeps it."""
        if self.eps is None:
            return instantiate(cfg.privacy).calibrate()
        total = positive("search.eps", self.eps)
        if cfg.privacy.label_histogram_eps is not None:
            raise UserError(
                "search.eps cannot be shared out between the histogram of labels and training; "
                "give privacy.eps, that of one run, in its place."
            )

        def planned(eps: float) -> PrivacyPlan:
            return instantiate(cfg.privacy, eps=eps).calibrate()

        def cost(eps: float) -> float:
            plan = planned(eps)
            return private_search.search_cost(self._mechanism(plan), plan).eps

        return planned(private_search.eps_of_one_run(total, cost))

    def _mechanism(self, plan: PrivacyPlan) -> RandomStopping:
        return private_search.search_mechanism(plan, self.expected_runs, self.eta)

    def _reserve(self, cfg: DictConfig, plan: PrivacyPlan) -> _Search:
        """Enter the whole search into the ledger."""
        directory = Path(self.config.hydra.sweep.dir)
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(
                f"hydra.sweep.dir={directory} is not empty; a search begins in a new directory."
            )
        started = datetime.now(UTC).isoformat(timespec="microseconds")
        mechanism = self._mechanism(plan)
        query = Query(
            query=private_search.QUERY,
            mechanism=mechanism,
            delta=plan.delta,
            what=private_search.WHAT,
            **about(cfg, directory, started),
        )
        ledger = ledger_of(cfg)
        ledger.reserve(query, max_eps=cfg.ledger.max_eps, delta=plan.delta)
        spent = private_search.search_cost(mechanism, plan)
        print(
            f"Search: {self.expected_runs:g} runs are expected, eps = {plan.eps:.4g} each, "
            f"{eps_at_delta(spent.eps, plan.delta)} for the best of them"
        )
        return _Search(directory, plan, mechanism, ledger, query)

    def _best_run(self, search: _Search, same: Sequence[str], choices: Choices) -> _Scored | None:
        """Make the runs, each with settings of its own; None where one of them failed."""
        best: _Scored | None = None
        # Neither a run's score nor its settings have a say in how many follow.
        for number in range(private_search.draw_number_of_runs(search.mechanism)):
            drawn = private_search.draw_choices(choices)
            (job,) = self.launcher.launch([[*same, *_assigned(drawn)]], initial_job_idx=number)
            assert job.hydra_cfg is not None
            run = Run(job.hydra_cfg.hydra.runtime.output_dir)
            if job.return_value is None:  # the command says why, when it ends
                search.refused = number == 0 and not run.config_path.exists()
                return None
            found = _Scored(run, drawn, float(job.return_value))
            if best is None or found.score > best.score:
                best, found = found, best
            if found is not None:
                shutil.rmtree(found.run.path)
        return best


def _assigned(drawn: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in drawn.items()]


def _check_list(override: Override) -> None:
    """UserError where runs that differ in this key would not all have one cost."""
    key = override.key_or_group
    group = key.replace("/", ".").split(".")[0]
    if key not in _SEARCHED_KEYS and (group not in _SEARCHED_GROUPS or key == "sampler.labels"):
        raise UserError(
            f"{key} cannot be searched by hparams_search=private: all runs must have the same "
            "noise, batches, steps and data set; model.*, public.*, sampler.*, "
            f"{', '.join(_SEARCHED_KEYS)} can."
        )
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line} is no list to draw from; give {key}=VALUE,VALUE.")


def _check_searchable(cfg: DictConfig) -> None:
    """UserError where a run would look at private images beside its plan, or tell others."""
    if OmegaConf.select(cfg, "privacy.eps") is None:
        raise UserError(
            "hparams_search=private accounts for runs with privacy; with privacy=none leave it out."
        )
    if cfg.privacy.unsafe_repeatable_randomness is not None:
        raise UserError(
            "hparams_search=private and privacy.unsafe_repeatable_randomness exclude each other: "
            "runs that can be repeated are no secret."
        )
    if not (is_on(cfg.sampler) and is_on(cfg.evaluator)):
        raise UserError(
            "hparams_search=private compares runs by their synthetic images; sampler=none and "
            "evaluator=none leave it nothing to compare."
        )
    if getattr(instantiate(cfg.evaluator), "reads_private_images", True):
        raise UserError(
            "hparams_search=private allows no evaluator that reads private images: each run's look "
            "would be one that no eps covers; use evaluator=synthetic, and evaluate the best run "
            "afterwards."
        )
    if cfg.objective != SYNTHETIC_VALIDATION:
        raise UserError(
            f"objective={cfg.objective} is nothing that hparams_search=private can compare runs by; "
            f"objective={SYNTHETIC_VALIDATION} would work."
        )
    if is_on(cfg.logger) and cfg.logger._target_ != _LOCAL_LOGGER:
        raise UserError(
            "hparams_search=private keeps its runs secret, but for the best one; logger=none or "
            "logger=csv would work."
        )
    if OmegaConf.select(cfg, "trainer.diagnostics"):
        raise UserError(
            "trainer.diagnostics=true shows what no eps covers, run by run; hparams_search=private "
            "goes without it."
        )
    if OmegaConf.select(cfg, "audit._target_") is not None:
        raise UserError(
            "hparams_search=private makes a model for release, and audit=canaries one that is not; "
            "leave one of them out."
        )


def _publish(search: _Search, best: _Scored, choices: Choices, objective: str) -> None:
    """Make the best run what the search leaves, and say what it cost."""
    run = Run(search.directory / _BEST)
    best.run.path.rename(run.path)
    # When the best run was begun would tell how many came before it.
    cfg = run.config()
    cfg.started, cfg.run_dir = search.query.started, str(run.path)
    write_atomically(run.config_path, OmegaConf.to_yaml(cfg))
    run.write_statement(private_search.statement_of_best(run.statement()))
    write_privacy_page(run)
    write_model_card(run)
    rewrite_sample_card(run, run.samples_dir)
    report_runs([run], run.report_path)
    log_run(run, cfg.logger)
    record = _record(search, best, choices, objective)
    write_atomically(search.directory / _RECORD, json.dumps(record, indent=2) + "\n")
    _date(run.path, search.query.started)
    print(
        f"\nSearch     {eps_at_delta(record['eps'], record['delta'])} for the best run alone "
        f"({shown(search.directory / _RECORD)})\nBest run   {shown(run.path)}"
    )


def _date(directory: Path, started: str) -> None:
    """Date all files at the search's start: their own times tell how many runs it made."""
    seconds = datetime.fromisoformat(started).timestamp()
    for path in [directory, *directory.rglob("*")]:
        os.utime(path, (seconds, seconds), follow_symlinks=False)


def _record(search: _Search, best: _Scored, choices: Choices, objective: str) -> dict[str, Any]:
    """``search.json``: public, as the best run is; how many runs there were does not stand in it."""
    spent = private_search.search_cost(search.mechanism, search.plan)
    return {
        "dataset": search.query.dataset,
        "unit": search.query.unit,
        "num_examples": search.query.num_examples,
        "eps": spent.eps,
        "delta": search.plan.delta,
        "accountant": spent.accountant,
        **search.mechanism.to_dict(),
        "eps_of_one_run": search.plan.epsilon(),
        "choices": {key: list(values) for key, values in choices.items()},
        "best": {"run": _BEST, "settings": dict(best.drawn), objective: best.score},
        "may_leave": private_search.MAY_LEAVE,
        "secret": private_search.SECRET,
        "ledger": {"path": str(search.ledger.path), "started": search.query.started},
    }
