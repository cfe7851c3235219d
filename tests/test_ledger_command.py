"""``python -m dp_synth.ledger``: what it shows, what it recomputes, what it closes."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from dp_synth import ledger as ledger_command
from dp_synth.checkpoints import newest_first
from dp_synth.privacy.accounting import SubsampledGaussian, composed
from dp_synth.privacy.ledger import Ledger, Query, default_path
from dp_synth.settling import held_of_run


def query(run="run", name="dp_sgd", *, noise=1.0, steps=100, **changes):
    values = {
        "dataset": "scans",
        "root": "/data/scans",
        "run": f"/runs/{run}",
        "started": "2025-01-31T12:00:00.000001+00:00",
        "query": name,
        "unit": "example",
        "num_examples": 1000,
        "mechanism": SubsampledGaussian(noise, 1.0, steps),
        "delta": 1e-5,
        "what": "Fine-tuning.",
    }
    return Query(**(values | changes))


LOOK = {"mechanism": None, "delta": None, "what": "Evaluation without noise."}


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.jsonl")


@pytest.fixture
def show(command, ledger, tmp_path):
    """What the command prints, and writes as JSON, of the ledger of a test."""

    def run(*arguments):
        out = tmp_path / "out.json"
        outcome = command(ledger_command, f"ledger.path={ledger.path}", f"out={out}", *arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out, json.loads(out.read_text())

    return run


def row_with(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


# --- show ---


def test_nothing_was_spent_yet(command, monkeypatch, tmp_path):
    monkeypatch.setenv("DP_SYNTH_STATE", str(tmp_path / "state"))
    outcome = command(ledger_command)
    assert outcome.code == 0
    assert str(default_path()) in outcome.out and "Nothing was entered" in outcome.out
    assert not default_path().parent.exists()


def test_every_query_has_its_row_and_all_of_them_a_sum(show, ledger):
    first, second = query("first", noise=20.0), query("second", noise=30.0, delta=1e-6)
    ledger.reserve(first, second, query("second", "look 1", **LOOK))
    ledger.settle(first, 60)
    taken = SubsampledGaussian(20.0, 1.0, 60)

    text, content = show()
    (row,) = row_with(text, "/runs/first")
    assert "60 of 100" in row and "settled" in row
    assert len(row_with(text, "/runs/second", "100 of 100", "reserved")) == 1
    assert len(row_with(text, "/runs/second", "look 1", "none")) == 1
    rows = content["queries"]
    assert [one["eps"] for one in rows] == [
        composed([taken], delta=1e-5).eps,
        composed([second.mechanism], delta=1e-6).eps,
        None,
    ]
    (together,) = content["data_sets"]["scans"]
    both = [taken, second.mechanism]
    assert together["delta"] == 1e-6
    assert together["eps"] == composed(both, delta=1e-6).eps
    assert together["eps_rdp"] == composed(both, delta=1e-6, accountant="rdp").eps
    assert together["looks"] == 1
    assert "1 look, of no finite eps, in no sum" in text
    assert content["newest_hash"] == ledger.newest_hash() and ledger.newest_hash() in text
    assert "cut off" in text  # what a chain cannot show


def test_what_was_given_back_is_shown_and_not_counted(show, ledger):
    ledger.reserve(query(), query(name="look 1", **LOOK))
    ledger.settle(query(), 0)
    ledger.settle(query(name="look 1", **LOOK), 0)
    text, content = show()
    assert [one["status"] for one in content["queries"]] == ["unused", "unused"]
    (together,) = content["data_sets"]["scans"]
    assert (together["queries"], together["looks"], together["eps"]) == (0, 0, 0)
    assert "no query with an eps" in text


def test_a_unit_is_told_what_gives_it_no_bound(show, ledger):
    ledger.reserve(query("a", noise=20.0), query("b", noise=30.0, unit="patient", num_examples=9))
    text, content = show()
    example, patient = content["data_sets"]["scans"]
    assert (example["unit"], example["queries"]) == ("example", 2)
    assert (patient["unit"], patient["queries"]) == ("patient", 1)
    assert (
        example["eps"] > patient["eps"] == composed([query(noise=30.0).mechanism], delta=1e-5).eps
    )
    assert "1 more query did not count by patient" in text


def test_one_data_set_can_be_chosen(show, command, ledger):
    ledger.reserve(query("a"), query("b", dataset="X-rays", root="/data/x"))
    text, content = show("dataset=X-rays")
    assert list(content["data_sets"]) == ["X-rays"] and "scans" not in text
    refused = command(ledger_command, f"ledger.path={ledger.path}", "dataset=X-ray")
    assert refused.code == 2 and "scans, X-rays are" in refused.err


def test_a_delta_can_be_chosen(show, command, ledger):
    ledger.reserve(query())
    _, content = show("ledger.delta=1e-3")
    assert content["data_sets"]["scans"][0]["eps"] == composed([query().mechanism], delta=1e-3).eps
    refused = command(ledger_command, f"ledger.path={ledger.path}", "ledger.delta=1")
    assert refused.code == 2 and "ledger.delta=1" in refused.err


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (query("b", dataset="renamed"), "under 2 names (renamed, scans)"),
        (query("b", root="/moved"), "read from 2 folders (/data/scans, /moved)"),
        (query("b", num_examples=999), "different numbers of examples (999, 1000)"),
        (query("b"), "/runs/b has reserved its plan and not settled it"),
    ],
    ids=["names", "folders", "sizes", "open"],
)
def test_what_an_officer_should_look_at_is_said(show, ledger, other, words):
    ledger.reserve(query("a"))
    ledger.settle(query("a"), 100)
    assert show()[1]["warnings"] == []
    ledger.reserve(other)
    text, content = show()
    assert any(words in warning for warning in content["warnings"])
    assert words in text


def test_a_crash_in_the_middle_of_a_line_is_said(show, ledger):
    ledger.reserve(query("a"))
    ledger.settle(query("a"), 100)
    with ledger.path.open("ab") as file:
        file.write(b'{"entry":{"da')
    assert any("crash" in warning for warning in show()[1]["warnings"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verfy"], "'verfy' is not of the form"),
        (["action=spend"], "action='spend' is unknown"),
        (["settle"], "run=DIR"),
        (["verify", "run=nowhere"], "run=nowhere is not a directory"),
        (["out=nowhere/file.json"], "out=nowhere/file.json"),
        (["ledger.path=/"], "ledger.path=/ is a folder"),
        (["verify", "expect=0123"], "expect="),
    ],
)
def test_mistakes_end_with_a_sentence(command, arguments, words):
    outcome = command(ledger_command, *arguments)
    assert outcome.code == 2 and words in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_help_says_what_the_command_does(command):
    outcome = command(ledger_command, "--help")
    for word in ("verify [run=DIR]", "settle run=DIR", "dataset=NAME", "ledger.path=FILE"):
        assert word in outcome.out


# --- verify ---


def test_the_chain_alone_can_be_verified(command, ledger):
    at = f"ledger.path={ledger.path}"
    ledger.reserve(query("a"))
    noted = ledger.newest_hash()
    ledger.reserve(query("b"))
    assert "the chain is intact" in command(ledger_command, "verify", at).out
    assert command(ledger_command, "verify", at, f"expect={noted}").code == 0

    _, second = ledger.path.read_text().splitlines(keepends=True)
    ledger.path.write_text(second)
    outcome = command(ledger_command, "verify", at)
    assert outcome.code == 2 and "first line was changed or removed" in outcome.err


def verify(command, run, ledger, *arguments):
    """Exit code, and the checks by name: None where right, else what is wrong."""
    out = run.path / "checks.json"
    outcome = command(
        ledger_command,
        "verify",
        f"run={run.path}",
        f"ledger.path={ledger}",
        f"out={out}",
        *arguments,
    )
    checks = json.loads(out.read_text())["checks"]
    for one in checks:
        mark = "ok   " if one["ok"] else "WRONG"
        assert len(row_with(outcome.out, f"{mark}  {one['check']:<22}  {one['found']}")) == 1
    failed = {one["check"]: one["found"] for one in checks if not one["ok"]}
    assert all(name in outcome.err for name in failed)
    return outcome.code, failed


def test_the_record_of_a_run_holds(command, run_copy, state):
    assert verify(command, run_copy, state / "ledger.jsonl") == (0, {})


STATEMENT_EDITS = {
    "eps": ({"eps": 1.0}, {"eps"}),
    "eps_rdp": ({"eps_rdp": 1.0}, {"eps by RDP"}),
    "delta": ({"delta": 1e-3}, {"eps", "eps by RDP", "config"}),
    "sample_rate": ({"sample_rate": 1e-3}, {"sampling rate", "mechanism"}),
    "noise_multiplier": ({"noise_multiplier": 9.0}, {"mechanism", "checkpoint"}),
    "steps": ({"steps": 2}, {"mechanism", "steps"}),
    "num_examples": (
        {"num_examples": 10**6},
        {"sampling rate", "config", "data set in the ledger"},
    ),
    "max_grad_norm": ({"max_grad_norm": 0.1}, {"config"}),
    "unit": ({"unit": "patient"}, {"config"}),
    "status": ({"status": "interrupted"}, {"steps"}),
    "abandoned": ({"steps_abandoned": 2}, {"mechanism", "steps"}),
}


@pytest.mark.parametrize("name", STATEMENT_EDITS)
def test_a_number_of_the_statement_that_was_changed_is_named(command, run_copy, state, name):
    change, expected = STATEMENT_EDITS[name]
    run_copy.privacy_path.write_text(json.dumps(run_copy.statement() | change))
    code, failed = verify(command, run_copy, state / "ledger.jsonl")
    assert code == 2 and expected <= set(failed)


def edit_query(run, **change):
    statement = run.statement()
    statement["queries"][0] |= change
    run.privacy_path.write_text(json.dumps(statement))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"eps": 0.1}, {"eps of each query"}),
        ({"noise_multiplier": 5.0}, {"mechanism", "eps", "queries in the ledger"}),
        ({"steps": 1}, {"mechanism", "eps", "queries in the ledger"}),
        ({"mechanism": "magic"}, {"mechanism", "eps"}),
        ({"query": "magic"}, {"mechanism", "queries in the ledger"}),
    ],
)
def test_a_query_that_was_changed_is_named(command, run_copy, state, change, expected):
    edit_query(run_copy, **change)
    code, failed = verify(command, run_copy, state / "ledger.jsonl")
    assert code == 2 and expected <= set(failed)


def test_fields_that_are_gone_are_named_without_a_traceback(command, run_copy, state):
    whole = run_copy.statement()
    for field in ("eps", "queries", "sample_rate", "unaccounted_looks", "status", "eps_planned"):
        changed = {key: value for key, value in whole.items() if key != field}
        run_copy.privacy_path.write_text(json.dumps(changed))
        code, failed = verify(command, run_copy, state / "ledger.jsonl")
        assert code == 2 and any(field in found for found in failed.values())


def test_a_config_that_was_changed_is_named(command, run_copy, state):
    text = run_copy.config_path.read_text()
    run_copy.config_path.write_text(text.replace("multiplicity: ", "multiplicity: 1", 1))
    assert set(verify(command, run_copy, state / "ledger.jsonl")[1]) == {"config"}


def test_a_checkpoint_beyond_the_statement_is_named(command, run_copy, state):
    newest = newest_first(run_copy.checkpoints_dir)[0]
    shutil.copy(newest, newest.with_name("step=000099.ckpt"))
    assert "checkpoint" in verify(command, run_copy, state / "ledger.jsonl")[1]


def test_progress_beyond_the_statement_is_named(command, run_copy, state):
    progress = run_copy.checkpoints_dir / "progress.json"
    progress.write_text(json.dumps({"steps": 99, "abandoned": 0}))
    assert "beyond" in verify(command, run_copy, state / "ledger.jsonl")[1]["steps"]


def copy_of_ledger(run, source, target, change):
    """A ledger with this run's entries as ``change`` makes them; its chain is right again."""
    copied = Ledger(target)
    for held in held_of_run(run, Ledger(source)):
        for query in change(replace(held.query, mechanism=held.planned)):
            copied.reserve(query)
    return target


def less_noise(query):
    mechanism = query.mechanism
    if mechanism is not None:
        mechanism = replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)
    return [replace(query, mechanism=mechanism)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda query: [],
            {"queries in the ledger", "looks in the ledger", "data set in the ledger"},
        ),
        (lambda query: [] if query.query == "dp_sgd" else [query], {"queries in the ledger"}),
        (lambda query: [] if query.query.startswith("look") else [query], {"looks in the ledger"}),
        (less_noise, {"queries in the ledger"}),
        (lambda query: [replace(query, dataset="other")], {"data set in the ledger"}),
        (lambda query: [query], set()),
    ],
    ids=["nothing", "no query", "no look", "less noise", "other data set", "all"],
)
def test_a_ledger_that_says_otherwise_is_named(
    command, run_copy, state, tmp_path, change, expected
):
    ledger = copy_of_ledger(run_copy, state / "ledger.jsonl", tmp_path / "other.jsonl", change)
    code, failed = verify(command, run_copy, ledger)
    assert set(failed) == expected and code == (2 if expected else 0)


def test_a_broken_chain_is_named_before_anything_is_recomputed(command, run_copy, tmp_path):
    (tmp_path / "broken").write_text("{}\n")
    outcome = command(
        ledger_command, "verify", f"run={run_copy.path}", f"ledger.path={tmp_path / 'broken'}"
    )
    assert outcome.code == 2 and "does not begin like" in outcome.err


def test_no_damage_ends_in_a_traceback(command, run_copy, state):
    whole = run_copy.statement()
    damages = [
        *({**whole, "num_examples": value} for value in (0, None, "many")),
        {**whole, "queries": [{**whole["queries"][0], "mechanism": "random_stopping"}]},
        {**whole, "queries": None},
        {**whole, "noise_multiplier": -1.0},
        {**whole, "delta": 0},
    ]
    for damaged in damages:
        run_copy.privacy_path.write_text(json.dumps(damaged))
        assert verify(command, run_copy, state / "ledger.jsonl")[0] == 2
    for text in ("{", "[]", "7", ""):
        run_copy.privacy_path.write_text(text)
        outcome = command(ledger_command, "verify", f"run={run_copy.path}")
        assert outcome.code == 2 and "damaged" in outcome.err
    run_copy.privacy_path.unlink()
    outcome = command(ledger_command, "verify", f"run={run_copy.path}")
    assert outcome.code == 2 and "never began to train" in outcome.err


# --- settle ---


@pytest.fixture
def killed(run_copy, state, tmp_path):
    """A run that was killed after step 2, with a ledger that holds its whole plan."""
    running = run_copy.statement() | {"status": "running", "steps_taken": None}
    run_copy.privacy_path.write_text(json.dumps(running))
    reserved = copy_of_ledger(
        run_copy,
        state / "ledger.jsonl",
        tmp_path / "reserved.jsonl",
        lambda query: [replace(query, run=str(run_copy.path.resolve()))],
    )
    shutil.rmtree(run_copy.model_dir)
    (run_copy.checkpoints_dir / "step=000003.ckpt").unlink()
    (run_copy.checkpoints_dir / "progress.json").write_text('{"steps": 2, "abandoned": 0}')
    return run_copy, Ledger(reserved)


def test_a_killed_run_is_settled_at_its_furthest_checkpoint(command, killed):
    run, ledger = killed
    assert verify(command, run, ledger.path) == (0, {})
    arguments = ("settle", f"run={run.path}", f"ledger.path={ledger.path}")
    outcome = command(ledger_command, *arguments)
    assert outcome.code == 0 and "dp_sgd: settled at 2 steps" in outcome.out
    held = {one.query.query: one for one in ledger.queries()}
    assert (held["dp_sgd"].status, held["dp_sgd"].query.mechanism.steps) == ("settled", 2)
    assert verify(command, run, ledger.path) == (0, {})
    again = command(ledger_command, *arguments)
    assert again.code == 2 and "nothing to settle" in again.err


def test_steps_of_an_abandoned_branch_are_settled_too(command, killed):
    """The checkpoint of step 2 is gone; what it held had been written, and may have been copied."""
    run, ledger = killed
    (run.checkpoints_dir / "step=000002.ckpt").unlink()
    arguments = ("settle", f"run={run.path}", f"ledger.path={ledger.path}")
    assert "dp_sgd: settled at 2 steps" in command(ledger_command, *arguments).out


def test_a_ledger_that_counts_too_few_steps_is_named(command, killed):
    run, ledger = killed
    (training,) = [one.query for one in ledger.queries() if one.query.query == "dp_sgd"]
    ledger.settle(training, 1)
    found = verify(command, run, ledger.path)[1]["queries in the ledger"]
    assert "counts 1 steps, and 2 left output" in found


def test_a_run_that_is_being_trained_is_not_settled(command, killed):
    run, ledger = killed
    with run.locked():
        outcome = command(ledger_command, "settle", f"run={run.path}", f"ledger.path={ledger.path}")
    assert outcome.code == 2 and "being trained" in outcome.err
    assert {one.status for one in ledger.queries()} == {"reserved", "look"}


def test_a_run_is_found_by_its_start_where_it_has_moved(run_copy, finished_run, tmp_path):
    ledger = Ledger(tmp_path / "own.jsonl")
    started = str(finished_run.config().started)
    own = replace(query(), run=os.path.realpath(finished_run.path), started=started)
    ledger.reserve(own, query("other"))
    (found,) = held_of_run(run_copy, ledger)
    assert found.query.run == os.path.realpath(finished_run.path)
    assert held_of_run(finished_run, ledger) == [found]


def test_a_copy_does_not_settle_for_the_run(command, run_copy, finished_run, tmp_path):
    ledger = Ledger(tmp_path / "own.jsonl")
    started = finished_run.started
    ledger.reserve(replace(query(), run=os.path.realpath(finished_run.path), started=started))
    outcome = command(
        ledger_command, "settle", f"run={run_copy.path}", f"ledger.path={ledger.path}"
    )
    assert outcome.code == 2 and "nothing to settle" in outcome.err
    assert [one.status for one in ledger.queries()] == ["reserved"]
