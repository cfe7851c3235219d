"""The privacy officer's page: it says what the statement says, no more, and gives nothing away."""

import html
import json
import math
import re
import subprocess
import sys

import pytest
from html_page import Page
from omegaconf import OmegaConf
from scipy.stats import norm

from dp_synth.privacy.accounting import SubsampledGaussian
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.privacy.private_search import (
    search_mechanism,
    statement_in_search,
    statement_of_best,
)
from dp_synth.privacy.statement import query_entry, with_query
from dp_synth.reporting import meaning
from dp_synth.reporting.officer import write_privacy_page
from dp_synth.runs import Run

_CONFIG = {
    "dataset": {"name": "moles", "root": "/srv/secret/moles"},
    "public": {
        "load": {"_target_": "dp_synth.data.image_folder.load", "root": "/srv/open/skin"},
        "root": "/srv/open/skin",
        "steps": 2000,
    },
    "ledger": {"path": "/srv/books/ledger.jsonl"},
}


def _plan(eps=3.0, **more):
    return PrivacyPlan(
        eps=eps, delta=1e-3, max_grad_norm=1, batch_size=10, steps=7, num_examples=101,
        accountant="rdp", **more,
    ).calibrate()  # fmt: skip


@pytest.fixture(scope="module")
def statement():
    return _plan().statement(7, "finished") | {"versions": {"torch": "2.6", "git_commit": "abc123"}}


def _with_classifier(statement):
    entry = query_entry(
        "dp_sgd_classifier",
        SubsampledGaussian(2.0, 0.1, 5),
        delta=1e-3,
        accountant="rdp",
        released="A baseline.",
    )
    return with_query(statement, entry)


def _page(folder, statement, config=_CONFIG, name="run"):
    run = Run.create(folder / name, OmegaConf.create(config))
    if statement is not None:
        run.write_statement(statement)
    return Page(write_privacy_page(run).read_text())


def _of_a_search():
    plan = _plan(noise_multiplier=3.0)
    mechanism = search_mechanism(plan, expected_runs=5, eta=0)
    return statement_in_search(plan.statement(7, "finished"), mechanism, "rdp")


def _old(statement):
    """A statement as the first versions wrote it."""
    gone = {"secure_noise", "label_histogram_eps", "eps_rdp", "clipping", "steps_abandoned",
            "steps_planned", "eps_planned", "trust_model", "sampling", "versions"}  # fmt: skip
    query = {"query": "dp_sgd", "mechanism": "poisson_subsampled_gaussian", "eps": statement["eps"]}
    return {k: v for k, v in statement.items() if k not in gone} | {"queries": [query]}


_KINDS = {
    "none": lambda statement: None,
    "public": lambda statement: PublicPlan(batch_size=10, steps=7, num_examples=101).statement(
        7, "finished"
    ),
    "void": lambda statement: _plan(unsafe_repeatable_randomness=3).statement(7, "finished"),
    "running": lambda statement: _plan().statement(0, "running"),
    "interrupted": lambda statement: _plan().statement(3, "interrupted"),
    "not chosen": lambda statement: _of_a_search(),
    "chosen": lambda statement: statement_of_best(_of_a_search()),
    "audit": lambda statement: statement | {"audit": {"what": "Audited.", "gradient_canaries": 9}},
    "old": _old,
    "eps alone": lambda statement: {"eps": 3.0},
    "no queries": lambda statement: statement | {"queries": []},
    "several queries": lambda statement: _with_classifier(statement),
    "not composed": lambda statement: _with_classifier(statement) | {"eps_all_queries": None},
    "patient": lambda statement: _plan(unit="patient").statement(7, "finished"),
    "histogram": lambda statement: _plan(label_histogram_eps=0.4).statement(7, "finished"),
    "secure": lambda statement: _plan(secure_noise=True).statement(7, "finished"),
    "abandoned": lambda statement: statement | {"steps_abandoned": 2},
    "large eps": lambda statement: _plan(eps=60.0).statement(7, "finished"),
    "large delta": lambda statement: statement | {"num_examples": 5_000},
}
_UNPROMISED = {"none", "public", "void", "not chosen"}
_UNRELEASABLE = {*_UNPROMISED, "running", "interrupted", "audit", "eps alone"}


@pytest.mark.parametrize("kind", _KINDS)
def test_every_statement_has_a_page_that_loads_nothing(tmp_path, statement, kind):
    page = _page(tmp_path, _KINDS[kind](statement))
    text = (tmp_path / "run" / "privacy.html").read_text()
    assert page.links and all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
    assert not re.search(r"https?:|@import|url\(|\son\w+\s*=", text)
    assert "default-src 'none'" in text
    assert "None" not in page.text and "nan" not in page.text.split()


@pytest.mark.parametrize("kind", _KINDS)
def test_only_what_is_promised_and_finished_may_leave(tmp_path, statement, kind):
    text = _page(tmp_path, _KINDS[kind](statement)).text
    assert ("Nothing is promised" in text) == (kind in _UNPROMISED)
    assert ("By itself this eps" in text) == (kind not in _UNPROMISED)
    assert ("Nothing but this page" in text) == (kind in _UNRELEASABLE)
    assert ("yes, under this guarantee" in text) == (kind not in _UNRELEASABLE)


def test_each_obstacle_has_its_banner(tmp_path, statement):
    banners = {
        "none": "No privacy statement",
        "public": "No privacy",
        "void": "The guarantee is void",
        "not chosen": "Not the run that was chosen",
        "running": "Unfinished",
        "interrupted": "Unfinished",
        "audit": "An audit run: not for release",
        "large delta": "delta is not below 1/N",
    }
    for name, title in banners.items():
        _page(tmp_path, _KINDS[name](statement), name=name)
        text = (tmp_path / name / "privacy.html").read_text()
        assert f'role="note"><strong>{title}' in text, name
    _page(tmp_path, statement, name="fine")
    assert 'class="banner"' not in (tmp_path / "fine" / "privacy.html").read_text()


def test_every_number_of_the_statement_is_there_and_exact(tmp_path, statement):
    page = _page(tmp_path, statement)
    for key in ("eps", "delta", "num_examples", "noise_multiplier", "sample_rate", "steps",
                "eps_rdp", "max_grad_norm", "batch_size"):  # fmt: skip
        assert statement[key] in page.values, key
    assert set(page.values) <= {float(v) for v in statement.values() if isinstance(v, int | float)}
    for sentence in (*statement["not_covered"], statement["trust_model"], "abc123", "moles"):
        assert sentence in page.text


def test_every_query_and_look_is_listed(tmp_path, statement):
    looked = _with_classifier(statement) | {
        "unaccounted_looks": ["First look.", {"what": "Second look.", "metrics": ["a", "b", "c"]}]
    }
    page = _page(tmp_path, looked)
    for words in ("A baseline.", "First look.", "Second look.", "3 numbers", "2 looks"):
        assert words in page.text
    alone = [query["eps"] for query in looked["queries"]]
    assert {*alone, looked["eps_all_queries"], 2.0, 0.1, 5} <= set(page.values)
    assert "not under this guarantee" in page.text
    assert "not under this guarantee" not in _page(tmp_path, statement, name="other").text


def test_what_is_not_composed_is_added_up(tmp_path, statement):
    listed = _with_classifier(statement) | {"eps_all_queries": None}
    page = _page(tmp_path, listed)
    assert "added up" in page.text
    assert sum(query["eps"] for query in listed["queries"]) in page.values
    assert sum(query["delta"] for query in listed["queries"]) in page.values
    del listed["queries"][1]["eps"]
    assert "All of them together" not in _page(tmp_path, listed, name="unknown").text


def test_the_histogram_of_labels_is_within_eps(tmp_path, statement):
    page = _page(tmp_path, _KINDS["histogram"](statement))
    assert "label_shares.json" in page.text
    assert "All of them together" not in page.text  # eps at the top is that of both
    assert "label_shares.json" not in _page(tmp_path, statement, name="other").text


def test_the_best_of_a_search_has_the_cost_of_the_search(tmp_path):
    chosen = statement_of_best(_of_a_search())
    page = _page(tmp_path, chosen)
    assert chosen["eps"] in page.values
    for words in (chosen["search"]["may_leave"], chosen["search"]["secret"], "tuning included"):
        assert words in page.text
    assert "dp-accounting" not in page.text and "All of them together" not in page.text
    other = _page(tmp_path, _of_a_search(), name="other")
    assert "can be repeated" not in other.text and "AES" not in other.text


def test_whom_it_protects(tmp_path, statement):
    image = _page(tmp_path, statement).text
    assert "Somebody with several images is protected less" in image
    patient = _page(tmp_path, _KINDS["patient"](statement), name="patients").text
    assert "Each patient of the training split, with all of its images together" in patient
    assert "Somebody with several images" not in patient


def test_the_source_of_the_noise_is_told(tmp_path, statement):
    assert "not a cryptographic one" in _page(tmp_path, statement).text
    secure = _page(tmp_path, _KINDS["secure"](statement), name="secure").text
    assert "AES-256" in secure and "not a cryptographic one" not in secure
    void = _page(tmp_path, _KINDS["void"](statement), name="void").text
    assert "Repeatable, for tests" in void and "AES-256" not in void


@pytest.mark.parametrize(
    ("eps", "word"), [(0.5, "strong"), (2.0, "moderate"), (5.0, "weak"), (60.0, "weak")]
)
def test_a_large_eps_is_called_weak(tmp_path, statement, eps, word):
    text = _page(tmp_path, statement | {"eps": eps}).text
    assert f"By itself this eps is a {word} bound" in text
    assert ("above 10" in text) == (eps > 10)


def test_public_data_are_named_without_their_place(tmp_path, statement):
    text = _page(tmp_path, statement).text
    assert "image folder" in text and "skin" in text and "2,000" in text
    assert "/srv" not in text and str(tmp_path) not in text
    random = _page(tmp_path, statement, {"dataset": {"name": "moles"}, "public": {}}, "random").text
    assert "None: training began from random weights" in random
    model = {"dataset": {"name": "moles"}, "public": {"path": "/srv/models/unet.pt"}}
    text = _page(tmp_path, statement, model, "model").text
    assert "unet.pt" in text and "/srv" not in text


def test_what_accounting_and_record_take_for_granted_is_told(tmp_path, statement):
    text = _page(tmp_path, statement).text
    for words in (
        "Budgets of later runs that are chosen in view of this one",
        "no private image is among them",
        "the choice of this run among several",
        "the guarantee covers the training split",
        "last digits could in theory tell of the sum",
        "What no record can show",
    ):
        assert words in text


def test_no_path_of_the_machine_is_on_it(tmp_path, statement):
    _page(tmp_path, statement | {"ledger": {"path": "/srv/books/ledger.jsonl"}})
    text = (tmp_path / "run" / "privacy.html").read_text()
    assert "/srv" not in text and str(tmp_path) not in text


def test_hostile_words_are_escaped(tmp_path, statement):
    evil = "\"><script>alert(1)<!-- & ' --> {{ 7 * 7 }}"
    hostile = _with_classifier(statement) | {
        "unit": evil, "status": evil, "trust_model": evil, "not_covered": [evil],
        "accountant": evil, "unaccounted_looks": [{"what": evil, "metrics": [evil]}, evil],
        "versions": {evil: evil},
    }  # fmt: skip
    hostile["queries"] = [
        query | {"query": evil, "released": evil, evil: evil} for query in hostile["queries"]
    ]
    config = {"dataset": {"name": evil}, "public": {"path": evil}}
    page = _page(tmp_path, hostile, config, "<b>run")
    assert "script" not in page.tags and "b" not in page.tags
    assert "49" not in page.text
    assert page.text.count(evil.rpartition("/")[2]) > 8


def test_the_page_follows_what_is_recorded_later(tmp_path, statement):
    run = Run.create(tmp_path / "run", OmegaConf.create(_CONFIG))
    run.write_statement(statement)
    assert "The statement records none" in Page(write_privacy_page(run).read_text()).text
    run.record_look("A later look.")
    assert "A later look." in Page(write_privacy_page(run).read_text()).text
    assert [path.name for path in run.path.iterdir() if path.name.startswith(".")] == []


def test_only_config_and_statement_are_needed(tmp_path, statement):
    _page(tmp_path, statement)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.yaml", "privacy.html", "privacy.json",
    ]  # fmt: skip


def test_the_program_on_the_page_finds_its_eps(tmp_path):
    statement = _plan(label_histogram_eps=0.4, eps=1.3).statement(7, "finished")
    _page(tmp_path, json.loads(json.dumps(statement)))
    text = (tmp_path / "run" / "privacy.html").read_text()
    program = re.search(r'<pre class="program">(.*?)</pre>', text, re.DOTALL).group(1)
    finished = subprocess.run(
        [sys.executable, "-c", html.unescape(program)], check=True, capture_output=True, text=True
    )
    # RDP, of which the statement is made, is the looser bound.
    assert 0.7 * statement["eps"] < float(finished.stdout) <= 1.001 * statement["eps"]


def _delta_of_gaussian(mu, eps):
    return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)


def _share(shown):
    return float(shown.removesuffix("%").strip()) / 100


@pytest.mark.parametrize("mu", [0.1, 0.7, 1.0, 2.3, 4.0])
@pytest.mark.parametrize("eps", [0.0, 0.5, 1.0, 3.0, 10.0])
def test_no_test_of_a_gaussian_does_better_than_the_table_says(mu, eps):
    delta = _delta_of_gaussian(mu, eps)
    for accused in (1e-4, 0.001, 0.05, 0.5):
        best = norm.sf(norm.isf(accused) - mu)
        assert best <= _share(meaning.found(eps, delta, accused)) + 1e-12
    assert norm.cdf(mu / 2) <= _share(meaning.guess(eps, delta)) + 1e-12
    advantage = _delta_of_gaussian(mu, 0.0)
    assert _share(meaning.guess_by_advantage(advantage)) == pytest.approx(
        norm.cdf(mu / 2), abs=1e-3
    )
    assert norm.cdf(mu / 2) <= _share(meaning.guess_by_advantage(advantage)) + 1e-12


@pytest.mark.parametrize("eps", [0.1, 1.0, 3.0, 10.0, 30.0])
def test_randomised_response_reaches_what_the_table_says(eps):
    truth = 1 / (1 + math.exp(-eps))
    assert _share(meaning.found(eps, 0.0, 1 - truth)) == pytest.approx(truth, abs=1e-3)
    assert meaning.found(eps, 1.0, 0.001) == "100\N{NO-BREAK SPACE}%"
