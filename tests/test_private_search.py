"""Sweeps on private data: a private search costs what it says, and nothing of it but the best stays."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, compose, refusal, tiny_images
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import stats

from dp_synth import searching, train
from dp_synth.books import Books
from dp_synth.cards import SampleFacts, sample_card
from dp_synth.data.folder import write_image_folder
from dp_synth.data.images import Images
from dp_synth.data.pixels import to_float
from dp_synth.errors import UserError
from dp_synth.formats import checksums
from dp_synth.metrics.synthetic_evaluator import SYNTHETIC_VALIDATION, SyntheticEvaluator
from dp_synth.privacy import private_search
from dp_synth.privacy.accounting import composed
from dp_synth.privacy.ledger import Ledger, Query
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.wording import is_void
from dp_synth.report import report_runs
from dp_synth.reporting.officer import write_privacy_page
from dp_synth.runs import Run
from dp_synth.verifying import verify_run

PLAN = PrivacyPlan(
    eps=2, delta=1e-5, max_grad_norm=1, batch_size=50, steps=40, num_examples=5000
).calibrate()
RATES = ("0.0001", "0.001", "0.01")
SEARCH = ("-m", "hparams_search=private", "experiment=smoke")
LISTS = (f"model.lr={','.join(RATES)}", "privacy.max_grad_norm=0.5,1")


def law_of(runs, eta=0.0):
    return private_search.search_mechanism(PLAN, runs, eta)


@pytest.mark.parametrize("runs", [1.5, 10])
def test_the_number_of_runs_follows_the_stated_law(runs):
    """At shape 0 it is the logarithmic law, which scipy has. Fails one time in a million."""
    mechanism, draws = law_of(runs), 20_000
    law = stats.logser(1 - mechanism.runs.gamma)
    counted = Counter(private_search.draw_number_of_runs(mechanism) for _ in range(draws))
    most = next(k for k in range(1, 1000) if draws * law.sf(k) < 20)
    found = [counted[k] for k in range(1, most)]
    expected = [draws * law.pmf(k) for k in range(1, most)]
    found.append(draws - sum(found))
    expected.append(draws - sum(expected))
    assert law.mean() == pytest.approx(runs)
    assert counted[0] == 0 and stats.chisquare(found, expected).pvalue > 1e-6


def test_settings_are_uniform_and_independent():
    """Of each other, and of the run before."""
    choices = {"model.lr": ["1", "2"], "privacy.max_grad_norm": ["a", "b", "c"]}
    drawn = [private_search.draw_choices(choices) for _ in range(6000)]
    assert all(set(one) == set(choices) for one in drawn)
    pairs = Counter(tuple(one.values()) for one in drawn)
    following = Counter(
        (before["model.lr"], after["model.lr"])
        for before, after in zip(drawn[::2], drawn[1::2], strict=True)
    )
    for counted, kinds in ((pairs, 6), (following, 4)):
        assert len(counted) == kinds and stats.chisquare(list(counted.values())).pvalue > 1e-6


def test_a_search_costs_more_than_a_run_and_less_than_publishing_many():
    one = PLAN.rdp_epsilon()
    costs = [private_search.search_cost(law_of(runs), PLAN).eps for runs in (1.01, 3, 10, 100)]
    hundred = composed([*PLAN.mechanisms().values()] * 100, delta=PLAN.delta).eps
    assert one < costs[0] < costs[1] < costs[2] < costs[3] < hundred


@pytest.mark.parametrize("total", [0.1, 1.0, 37.0])
def test_one_run_gets_the_most_that_keeps_the_whole(total):
    def cost(eps):
        return eps + min(eps, 0.5)

    exact = max(total / 2, total - 0.5)
    assert exact / 1.0021 < private_search.eps_of_one_run(total, cost) <= exact
    assert "search.eps=" in refusal(private_search.eps_of_one_run, total, lambda eps: eps + total)


def tobytes(image):
    return image.numpy().tobytes()


def test_the_synthetic_evaluator_judges_on_images_kept_from_training():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    images, seen = Images(pixels, np.arange(50) % 3, ("a", "b", "c")), []
    evaluator = compose("evaluator=synthetic", "evaluator.classifier.steps=2").evaluator
    whole = instantiate(evaluator)
    metrics, meta = whole(synthetic=images, seed=3)
    value = metrics[SYNTHETIC_VALIDATION]
    assert value * 5 == pytest.approx(round(value * 5))  # a tenth of 50 are kept
    assert not any(entry["private"] for entry in meta.values())

    def train_classifier(training, **options):
        seen.append(training)
        return Asked(1, 1)

    class Asked(torch.nn.Linear):
        def forward(self, x_BCHW):
            seen.append(x_BCHW)
            return torch.zeros(len(x_BCHW), 3)

    SyntheticEvaluator(classifier=train_classifier, validation_fraction=0.3)(
        synthetic=images, seed=3
    )
    training, asked = seen
    assert (len(training), len(asked)) == (35, 15)
    taken = [*map(tobytes, to_float(training.pixels)), *map(tobytes, asked)]
    assert sorted(taken) == sorted(map(tobytes, to_float(images.pixels)))
    few = images.select(np.arange(9))
    assert "sampler.num_images" in refusal(whole, synthetic=few, seed=3)
    for share in (0, 1, -0.1):
        message = refusal(SyntheticEvaluator, classifier=None, validation_fraction=share)
        assert message.startswith(f"evaluator.validation_fraction={share} ")


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.jsonl")


@pytest.fixture
def search(command, tmp_path, ledger):
    """A function (*arguments) -> Outcome that runs a private search into ``search/``."""

    def run(*arguments):
        where = (f"ledger.path={ledger.path}", f"hydra.sweep.dir={tmp_path / 'search'}")
        return command(train, *SEARCH, *where, *arguments)

    return run


@pytest.fixture
def five_runs(monkeypatch):
    """The number of runs that a search draws is 5."""
    monkeypatch.setattr(private_search, "draw_number_of_runs", lambda mechanism: 5)


class Stub:
    """In place of ``train.train``: keeps the books and trains nothing."""

    def __init__(self, ledger, fails_at=None, reads=True):
        self.ledger, self.fails_at, self.reads = ledger, fails_at, reads
        self.configs, self.scores, self.held = [], [], []

    def __call__(self, cfg, path):
        self.held.append([(one.query, one.status) for one in self.ledger.queries()])
        self.configs.append(cfg)
        if len(self.configs) - 1 == self.fails_at and not self.reads:
            raise UserError("refused.")
        run = Run.create(path, cfg)
        plan = instantiate(cfg.privacy).calibrate()
        books = Books(run)
        books.reserve(plan)
        run.write_statement(books.statement(plan, 0, "running"))
        if len(self.configs) - 1 == self.fails_at:
            raise UserError("an image is broken.")
        run.write_statement(books.statement(plan, plan.steps, "finished"))
        books.settle(plan, plan.steps)
        self.scores.append([0.3, 0.1, 0.7, 0.7, 0.5][len(self.scores)])
        self.write_samples(run, tiny_images(6))
        run.write_metrics({SYNTHETIC_VALIDATION: self.scores[-1]}, {})
        return run

    def write_samples(self, run, images):
        """Write images as ``sample`` does."""
        write_image_folder(images, run.samples_dir)
        facts = SampleFacts(
            num_images=len(images), shape=(1, 8, 8), classes=images.classes, format="png",
            sampler={"name": "stub"}, seed=0, labels="uniform", model="0" * 64, precision="32-true",
        )  # fmt: skip
        (run.samples_dir / "README.md").write_text(sample_card(run, facts))
        checksums.write(run.samples_dir)


@pytest.fixture
def stub(monkeypatch, ledger):
    def put(**options):
        stub = Stub(ledger, **options)
        monkeypatch.setattr(train, "train", stub)
        # There is no model that a card could describe.
        monkeypatch.setattr(searching, "write_model_card", lambda run: None)
        return stub

    return put


def test_a_search_is_one_query_and_leaves_its_best_run(search, stub, five_runs, ledger, tmp_path):
    runs = stub()
    assert search(*LISTS, "search.expected_runs=4").code == 0

    (held,) = ledger.queries()
    plan = instantiate(runs.configs[0].privacy).calibrate()
    assert held.status == "settled" and held.query.query == private_search.QUERY
    assert held.query.mechanism.candidate == tuple(plan.mechanisms().values())
    assert held.query.mechanism.runs.expected == pytest.approx(4)
    # It stood in the ledger, whole, before the first run began, and so until the last ended.
    assert runs.held == [[(held.query, "reserved")]] * 5

    assert {path.name for path in (tmp_path / "search").iterdir()} == {"best", "search.json"}
    best = Run(tmp_path / "search" / "best")
    assert best.metrics()[SYNTHETIC_VALIDATION] == max(runs.scores)
    record = json.loads((tmp_path / "search" / "search.json").read_text())
    chosen = runs.configs[runs.scores.index(max(runs.scores))]
    assert {key: float(value) for key, value in record["best"]["settings"].items()} == {
        "model.lr": chosen.model.lr,
        "privacy.max_grad_norm": chosen.privacy.max_grad_norm,
    }
    assert record["choices"]["model.lr"] == list(RATES)

    statement = best.statement()
    eps = composed([held.query.mechanism], delta=plan.delta).eps
    assert statement["eps"] == record["eps"] == eps > plan.eps and not is_void(statement)
    assert [entry["query"] for entry in statement["queries"]] == [private_search.QUERY]
    assert sum(said.startswith("Hyper-parameter search:") for said in statement["not_covered"]) == 1
    assert f"eps = {eps:.2f}"[:-1] in (best.samples_dir / "README.md").read_text()


def test_what_a_search_leaves_does_not_tell_how_many_runs_there_were(
    search, stub, monkeypatch, tmp_path
):
    """The same best run, first of one and third of five: but for times, not a byte differs."""
    left = []
    for number, scores in ((1, [0.7]), (5, [0.3, 0.1, 0.7, 0.2, 0.5])):
        monkeypatch.setattr(private_search, "draw_number_of_runs", lambda _, n=number: n)
        monkeypatch.setattr(private_search, "draw_choices", lambda choices: {"model.lr": "0.001"})
        runs = stub()
        monkeypatch.setattr(runs, "scores", Scores(scores))
        assert search(LISTS[0], "run_dir=none").code == 0
        folder = tmp_path / "search"
        started = json.loads((folder / "search.json").read_text())["ledger"]["started"]
        left.append(
            {
                path.relative_to(folder): path.read_bytes().replace(started.encode(), b"")
                for path in folder.rglob("*")
                if path.is_file()
            }
        )
        folder.rename(tmp_path / f"search {number}")
    assert left[0].keys() == left[1].keys()
    assert {name for name in left[0] if left[0][name] != left[1][name]} == set()


class Scores(list):
    """Scores that the stub takes in turn."""

    def __init__(self, scores):
        super().__init__()
        self.given = iter(scores)

    def append(self, _):
        super().append(next(self.given))


def test_a_run_of_a_search_promises_nothing_by_itself(search, stub, five_runs, ledger, tmp_path):
    stub(fails_at=2)
    outcome = search(*LISTS)
    assert outcome.code == 2 and outcome.err.endswith("an image is broken.\n")
    assert [one.status for one in ledger.queries()] == ["settled"]
    assert not (tmp_path / "search" / "search.json").exists()
    left = [Run(path.parent) for path in (tmp_path / "search").glob("*/privacy.json")]
    assert len(left) == 2  # the best so far, and the one that failed
    for run in left:
        assert is_void(run.statement())
        plan = instantiate(run.config().privacy).calibrate()
        assert "is over" in refusal(Books(run).reserve, plan)  # it cannot be gone on with


def test_a_search_that_read_nothing_costs_nothing(search, stub, five_runs, ledger):
    runs = stub(fails_at=0, reads=False)
    assert search(*LISTS).code == 2
    assert [one.status for one in ledger.queries()] == ["unused"] and len(runs.configs) == 1


def test_the_whole_budget_is_shared_out(search, stub, five_runs, ledger):
    runs = stub()
    assert search(LISTS[0], "search.eps=4", "search.expected_runs=3").code == 0
    (held,) = ledger.queries()
    delta = runs.configs[0].privacy.delta
    assert 3.9 < composed([held.query.mechanism], delta=delta).eps <= 4
    assert len({cfg.privacy.eps for cfg in runs.configs}) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["privacy.eps=1,2"], "privacy.eps cannot be searched"),
        (["privacy.steps=1,2"], "privacy.steps cannot be searched"),
        (["privacy.batch_size=8,16"], "privacy.batch_size cannot be searched"),
        (["privacy=eps1,eps10"], "privacy cannot be searched"),
        (["dataset=digits,font_digits"], "dataset cannot be searched"),
        (["sampler.labels=uniform,dp_histogram"], "sampler.labels cannot be searched"),
        (["model.lr=1e-3"], "nothing to choose from"),
        (["model.lr=interval(1,2)"], "give model.lr=VALUE,VALUE"),
        ([LISTS[0], "privacy=none"], "privacy=none"),
        ([LISTS[0], "privacy.unsafe_repeatable_randomness=1"], "unsafe_repeatable_randomness"),
        ([LISTS[0], "evaluator=quick"], "evaluator=synthetic"),
        ([LISTS[0], "sampler=none"], "sampler=none"),
        ([LISTS[0], "objective=utility/accuracy"], f"objective={SYNTHETIC_VALIDATION}"),
        ([LISTS[0], "logger=wandb"], "logger=csv"),
        ([LISTS[0], "trainer.diagnostics=true"], "trainer.diagnostics"),
        ([LISTS[0], "audit=canaries"], "audit=canaries"),
        ([LISTS[0], "search.expected_runs=1"], "search.expected_runs=1"),
        ([LISTS[0], "search.eps=3", "privacy.eps=1"], "search.eps and privacy.eps"),
        ([LISTS[0], "search.eps=3", "sampler.labels=dp_histogram"], "search.eps cannot"),
        ([LISTS[0], "ledger.max_eps=1"], "ledger.max_eps=1 "),
        ([LISTS[0], "model.ema_decay=2"], "model.ema_decay=2"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused_before_a_run(
    search, stub, ledger, tmp_path, arguments, said
):
    runs = stub()
    outcome = search(*arguments)
    assert outcome.code == 2 and said in outcome.err and "Traceback" not in outcome.err
    assert (runs.configs, ledger.queries()) == ([], []) and not (tmp_path / "search").exists()


def test_a_search_needs_a_directory_of_its_own(search, stub, tmp_path):
    stub()
    (tmp_path / "search" / "other").mkdir(parents=True)
    assert "hydra.sweep.dir=" in search(*LISTS).err


def test_a_run_joins_only_a_search_for_runs_like_it(tmp_path, ledger):
    cfg = compose("experiment=smoke", "+search.eps=null", f"ledger.path={ledger.path}")
    plan = instantiate(cfg.privacy).calibrate()
    cfg.ledger.search = "2026-01-02T03:04:05+00:00"
    books = Books(Run.create(tmp_path / "run", cfg))
    assert "is no search on dataset.name=digits" in refusal(books.reserve, plan)

    own = {**Books(Run(tmp_path / "run"))._about, "started": cfg.ledger.search}
    mechanism = private_search.search_mechanism(plan, 3, 0.0)
    query = private_search_query(own, mechanism, plan.delta)
    ledger.reserve(query)
    books.reserve(plan)
    books.settle(plan, 1)
    books.cancel(plan)
    assert [one.query for one in ledger.queries()] == [query]
    for change in ("privacy.steps=4", "privacy.batch_size=33", "privacy.delta=1e-5"):
        key, _, value = change.partition("=")
        other = OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"{key}={value}"]))
        another = instantiate(other.privacy).calibrate()
        assert "was entered into the ledger for other runs" in refusal(books.reserve, another)


def private_search_query(own, mechanism, delta):
    return Query(
        query=private_search.QUERY, mechanism=mechanism, delta=delta, what="A search.", **own
    )


def test_a_search_without_many_runs_says_what_is_missing(command, ledger):
    arguments = ("hparams_search=private", "experiment=smoke", f"ledger.path={ledger.path}")
    outcome = command(train, *arguments, "public.load.num_images=600", "run_dir=run")
    assert outcome.code == 2 and "add -m" in outcome.err and not Path("run").exists()


def test_a_whole_search_holds_together(tmp_path_factory, monkeypatch):
    """Real training, twice: the record of the best run is recomputed from all that was written."""
    directory = tmp_path_factory.mktemp("whole")
    ledger = Ledger(directory / "ledger.jsonl")
    monkeypatch.setattr(private_search, "draw_number_of_runs", lambda mechanism: 2)
    arguments = (f"hydra.sweep.dir={directory}/search", f"ledger.path={ledger.path}")
    small = ("public.load.num_images=600", "model.network.block_out_channels=[16,16,16]")
    assert call(train, *SEARCH, *arguments, *small, *LISTS) == 0
    best = Run(directory / "search" / "best")
    assert [one.query.query for one in ledger.queries()] == [private_search.QUERY]
    assert best.statement()["unaccounted_looks"] == []
    assert set(best.metrics()) == {
        SYNTHETIC_VALIDATION,
        f"{SYNTHETIC_VALIDATION}.ci_low",
        f"{SYNTHETIC_VALIDATION}.ci_high",
    }
    assert [check for check in verify_run(best, ledger) if not check["ok"]] == []
    # What says the same in other words was written again when the run was chosen.
    for page, write in (
        (best.privacy_page_path, lambda: write_privacy_page(best)),
        (best.report_path, lambda: report_runs([best], best.report_path)),
    ):
        said = page.read_text()
        write()
        assert page.read_text() == said


def test_a_sweep_writes_one_ledger_that_a_failed_trial_does_not_lose(command, stub, ledger):
    runs = stub(fails_at=1)
    runs.scores = Scores([0.1, 0.1])
    sweep = ("-m", "privacy.eps=1,5,2", "experiment=smoke", "hydra.sweep.dir=sweep")
    outcome = command(train, *sweep, f"ledger.path={ledger.path}")
    assert outcome.code == 2 and "an image is broken." in outcome.err
    held = ledger.queries()
    assert [one.query.run[-1] for one in held] == ["0", "1", "2"]
    mechanisms = [one.query.mechanism for one in held]
    eps = composed(mechanisms, delta=held[0].query.delta).eps
    lines = [line for line in outcome.out.splitlines() if line.startswith("3 runs on digits: ")]
    (line,) = lines
    said = float(line.split("eps = ")[1].split()[0])
    assert eps <= said < eps * 1.001 and str(ledger.path.name) in line and "together" in line


def test_the_recommended_search_reads_public_images():
    cfg = compose("hparams_search=public")
    assert cfg.dataset.name == "font_digits"
    assert cfg.dataset.load._target_ == "dp_synth.data.font_digits.load"
    assert cfg.public.load.fonts != cfg.dataset.load.fonts
