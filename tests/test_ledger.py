"""The privacy ledger: what an entry counts for, whom it protects, what a budget still holds."""

import hashlib
import itertools
import json
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal

from dp_synth.errors import UserError
from dp_synth.privacy.accounting import (
    RandomStopping,
    SubsampledGaussian,
    calibrate,
    composed,
)
from dp_synth.privacy.ledger import Ledger, Query
from dp_synth.privacy.ledger import chain as ledger_chain
from dp_synth.privacy.ledger.budget import compose
from dp_synth.privacy.ledger.chain import FIRST, Chain


def query(run="run", name="dp_sgd", *, noise=1.0, rate=0.1, steps=100, **changes):
    """A query of DP-SGD; ``mechanism=None`` makes it a look."""
    values = {
        "dataset": "scans",
        "root": "/data/scans",
        "run": f"/runs/{run}",
        "started": "2025-01-31T12:00:00.000001+00:00",
        "query": name,
        "unit": "example",
        "num_examples": 1000,
        "mechanism": SubsampledGaussian(noise, rate, steps),
        "delta": 1e-5,
        "what": "Fine-tuning.",
    }
    return Query(**(values | changes))


def look(run="run", name="look 1"):
    return query(run, name, mechanism=None, delta=None, what="Evaluation without noise.")


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.jsonl")


def steps_held(ledger):
    return [held.query.mechanism.steps for held in ledger.queries()]


# --- what counts ---


def test_an_empty_ledger_holds_nothing(ledger):
    assert ledger.queries() == []
    assert ledger.newest_hash() is None
    ledger.verify()
    assert not ledger.path.exists()


def test_what_is_reserved_is_held_until_it_is_settled(ledger):
    first, second = query("first"), query("second", noise=2.0)
    ledger.reserve(first)
    ledger.reserve(second, look("second"))
    ledger.settle(first, 37)

    held = ledger.queries()
    assert [one.status for one in held] == ["settled", "reserved", "look"]
    assert held[0].query == replace(first, mechanism=SubsampledGaussian(1.0, 0.1, 37))
    assert held[0].planned == first.mechanism
    assert [one.query for one in held[1:]] == [second, look("second")]


def test_a_run_that_goes_on_reserves_its_whole_plan_again(ledger):
    ledger.reserve(query())
    ledger.settle(query(), 60)
    assert steps_held(ledger) == [60]
    ledger.reserve(query())
    assert steps_held(ledger) == [100]
    assert ledger.queries()[0].status == "reserved"


def test_repeating_an_entry_writes_nothing(ledger):
    for _ in range(3):
        ledger.reserve(query(), look())
    for _ in range(3):
        ledger.settle(query(), 5)
    assert len(ledger.path.read_text().splitlines()) == 3


def test_settling_never_forgets_steps(ledger):
    ledger.reserve(query())
    ledger.settle(query(), 60)
    ledger.settle(query(), 20)
    assert steps_held(ledger) == [60]
    ledger.settle(query(), 80)
    assert steps_held(ledger) == [80]
    with pytest.raises(RuntimeError, match="101 steps"):
        ledger.settle(query(), 101)
    assert steps_held(ledger) == [80]


def test_steps_of_an_abandoned_branch_raise_a_reservation(ledger):
    ledger.reserve(query())
    ledger.settle(query(), 60)
    ledger.reserve(query(steps=140))
    assert steps_held(ledger) == [140]
    ledger.settle(query(), 120)
    assert steps_held(ledger) == [120]


@pytest.mark.parametrize(
    "other",
    [
        query(steps=59),
        query(noise=1.1),
        query(rate=0.05),
        query(num_examples=999),
        query(unit="patient"),
        query(dataset="other"),
        query(delta=1e-6),
        query(mechanism=None),
    ],
    ids=lambda other: f"{other.mechanism} {other.unit} {other.num_examples} {other.dataset}",
)
def test_a_run_cannot_replace_what_it_spent_by_less(ledger, other):
    """The newest entry of a run's query is the only one that counts."""
    ledger.reserve(query())
    ledger.settle(query(), 60)
    assert "run=/runs/run" in refusal(ledger.reserve, other)
    assert steps_held(ledger) == [60]


def test_a_data_set_that_moved_is_the_same(ledger):
    ledger.reserve(query())
    ledger.reserve(query(root="/elsewhere"))
    assert [held.query.root for held in ledger.queries()] == ["/elsewhere"]


def test_a_run_that_read_nothing_counts_for_nothing(ledger):
    everything = [
        query(),
        look(),
        query(name="search", mechanism=RandomStopping.expecting(4, (query().mechanism,))),
    ]
    ledger.reserve(*everything)
    for one in everything:
        ledger.settle(one, 0)
    assert {held.status for held in ledger.queries()} == {"unused"}
    ledger.reserve(query(noise=0.4, run="other"), max_eps=200)  # nothing of theirs is in the way
    ledger.reserve(*everything)
    assert [held.status for held in ledger.queries()[:3]] == ["reserved", "look", "reserved"]


def test_a_mechanism_without_steps_is_settled_as_it_is(ledger):
    mechanism = RandomStopping.expecting(4, (query().mechanism,))
    search = query(name="search", mechanism=mechanism)
    ledger.reserve(search, look())
    ledger.settle(search, 1)
    ledger.settle(look(), 1)
    assert [held.status for held in ledger.queries()] == ["settled", "look"]
    assert ledger.queries()[0].query == search


def test_a_query_that_the_file_does_not_hold_is_entered_when_it_is_settled(ledger):
    """Somebody replaced the file while a run trained."""
    ledger.settle(query(), 60)
    assert steps_held(ledger) == [60]


def test_a_mechanism_needs_its_delta():
    with pytest.raises(ValueError, match="delta"):
        query(delta=None)


def test_queries_of_one_data_set(ledger):
    ledger.reserve(query(), query("other", dataset="X-rays"))
    assert [held.query.dataset for held in ledger.queries("X-rays")] == ["X-rays"]
    assert ledger.queries("scan") == []


def test_names_of_any_kind_survive(ledger, tmp_path):
    awkward = query(
        dataset="Röntgen \u2028 \"'\\\n\udcff", root="/a b/\udce9", run="x\ty", what="😀 torn"
    )
    ledger.reserve(awkward, query())
    assert [held.query for held in ledger.queries()] == [awkward, query()]


# --- whom a query protects ---


def eps_of(*queries, delta, accountant="prv"):
    return composed([one.mechanism for one in queries], delta=delta, accountant=accountant).eps


def test_every_query_counts_for_an_example_and_only_its_own_for_a_unit():
    of_images = query("a", delta=1e-6)
    of_patients = query("b", unit="patient", noise=2.0), query("c", unit="patient", noise=3.0)
    of_slides = query("d", unit="slide", noise=4.0)
    queries = [of_images, *of_patients, of_slides, look()]

    per_example = compose(queries)
    assert (per_example.queries, per_example.unbounded, per_example.looks) == (4, 0, 1)
    assert per_example.delta == 1e-6
    assert per_example.prv.eps == eps_of(*queries[:4], delta=1e-6)
    assert per_example.rdp.eps == eps_of(*queries[:4], delta=1e-6, accountant="rdp")

    per_patient = compose(queries, "patient")
    assert (per_patient.queries, per_patient.unbounded, per_patient.looks) == (2, 2, 1)
    assert per_patient.prv.eps == eps_of(*of_patients, delta=1e-6)

    assert compose(queries, "slide", delta=1e-3).prv.eps == eps_of(of_slides, delta=1e-3)


def test_without_queries_nothing_is_composed():
    for queries in ([], [look()]):
        nothing = compose(queries)
        assert (nothing.queries, nothing.delta, nothing.prv.eps) == (0, None, 0)
        assert nothing.looks == len(queries)
    assert compose([query()], "patient").delta is None


@pytest.mark.parametrize("delta", [0, 1, -1e-5, float("nan"), "often"])
def test_a_delta_that_is_none_is_refused(delta):
    assert refusal(compose, [query()], delta=delta).startswith("ledger.delta=")


# --- the budget ---


def test_a_budget_holds_what_fits_and_refuses_what_does_not(ledger):
    eps = eps_of(query("a"), query("b"), delta=1e-5)
    ledger.reserve(query("a"), max_eps=eps)
    ledger.reserve(query("b"), max_eps=eps)
    message = refusal(ledger.reserve, query("c"), max_eps=eps)
    assert message.startswith("ledger.max_eps=")
    assert "dataset.name=scans" in message and "nothing more fits" in message
    assert len(ledger.queries()) == 2


def test_what_would_still_fit_does(ledger):
    """Plain Gaussians, whose eps has a closed form, so that a dense search is the oracle."""
    ledger.reserve(query("a", rate=1.0, noise=20.0), look(), max_eps=10)
    asked = query("b", rate=1.0, noise=3.0)
    message = refusal(ledger.reserve, asked, max_eps=10)
    assert "looks that have no eps, and are in no sum: 1" in message
    fits = float(message.split("eps = ")[-1].split(" at delta")[0])

    candidates = [query("b", rate=1.0, noise=noise) for noise in np.geomspace(3, 30, 5_000)]
    together = [eps_of(query(rate=1.0, noise=20.0), one, delta=1e-5) for one in candidates]
    dearest = candidates[next(i for i, eps in enumerate(together) if eps <= 10)]
    assert 0.998 * eps_of(dearest, delta=1e-5) <= fits <= 1.0005 * eps_of(dearest, delta=1e-5)

    typed = calibrate(eps=fits, delta=1e-5, sample_rate=1.0, steps=100)
    ledger.reserve(query("b", rate=1.0, noise=typed), max_eps=10)


def test_what_would_still_fit_does_with_subsampling_too(ledger):
    ledger.reserve(query("a", noise=2.0), max_eps=6)
    message = refusal(ledger.reserve, query("b", noise=0.7), max_eps=6)
    fits = float(message.split("eps = ")[-1].split(" at delta")[0])
    typed = calibrate(eps=fits, delta=1e-5, sample_rate=0.1, steps=100)
    ledger.reserve(query("b", noise=typed), max_eps=6)


def test_a_reservation_is_all_or_nothing(ledger):
    small, large = query(name="histogram", noise=50.0, rate=1.0, steps=1), query(noise=0.5)
    assert "would still fit" in refusal(ledger.reserve, small, large, max_eps=2)
    assert ledger.queries() == []


def test_a_run_that_goes_on_is_not_counted_twice(ledger):
    eps = eps_of(query(), delta=1e-5)
    for _ in range(3):
        ledger.reserve(query(), max_eps=eps)
        ledger.settle(query(), 99)
    assert steps_held(ledger) == [99]


def test_what_a_run_gave_back_can_be_spent_by_another(ledger):
    eps = eps_of(query(), delta=1e-5)
    ledger.reserve(query("a"), max_eps=eps)
    refusal(ledger.reserve, query("b", steps=40), max_eps=eps)
    ledger.settle(query("a"), 60)
    ledger.reserve(query("b", steps=40), max_eps=eps)
    refusal(ledger.reserve, query("a"), max_eps=eps)  # and is missing when the first goes on
    assert steps_held(ledger) == [60, 40]


def test_a_budget_is_for_a_data_set_and_for_all_units_of_it(ledger):
    eps = eps_of(query(), delta=1e-5)
    ledger.reserve(query("a"), max_eps=eps)
    ledger.reserve(query("b", dataset="other"), max_eps=eps)
    refusal(ledger.reserve, query("c", unit="patient"), max_eps=eps)


def test_a_budget_is_at_one_delta(ledger):
    """A larger delta of a later run does not make the earlier ones cheaper."""
    ledger.reserve(query("a", delta=1e-6))
    both = eps_of(query(), query(), delta=1e-6)
    refusal(ledger.reserve, query("b", delta=1e-4), max_eps=both * 0.999)
    ledger.reserve(query("b", delta=1e-4), max_eps=both * 0.999, delta=1e-4)


def test_looks_pass_every_budget(ledger):
    ledger.reserve(look(), max_eps=1e-9)
    assert [held.status for held in ledger.queries()] == ["look"]


@pytest.mark.parametrize("max_eps", [0, -1, float("inf"), float("nan"), "much"])
def test_a_budget_that_is_none_is_refused(ledger, max_eps):
    assert refusal(ledger.reserve, query(), max_eps=max_eps).startswith("ledger.max_eps=")
    assert ledger.queries() == []


# --- the file ---


def lines_of(ledger):
    return ledger.path.read_bytes().splitlines(keepends=True)


@pytest.fixture
def filled(ledger):
    for run in "abcde":
        ledger.reserve(query(run))
    return ledger


def test_the_file_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "state" / "dp_synth" / "ledger.jsonl"
    before = os.umask(0)
    try:
        Ledger(path).reserve(query())
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (path, path.parent, path.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]
    assert {stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()} == {0o600}


def test_a_shared_file_stays_shared(ledger):
    ledger.path.touch()
    ledger.path.chmod(0o660)
    folder_mode = ledger.path.parent.stat().st_mode
    ledger.reserve(query())
    assert {stat.S_IMODE(one.stat().st_mode) for one in ledger.path.parent.iterdir()} == {0o660}
    assert ledger.path.parent.stat().st_mode == folder_mode


def test_a_line_is_what_its_description_says(filled):
    """Read with nothing but a JSON parser and SHA-256."""
    previous = FIRST
    for line in lines_of(filled):
        record = json.loads(line)
        assert record.pop("previous") == previous
        digest = record.pop("hash")
        record["previous"] = previous
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == digest
        previous = digest
    assert filled.newest_hash() == previous


def test_nothing_private_stands_in_it(filled):
    names = {name for line in lines_of(filled) for name in json.loads(line)["entry"]}
    assert names == {field for field in Query.__dataclass_fields__} | {"status", "written"}


def broken_at(ledger, lines):
    ledger.path.write_bytes(b"".join(lines))
    message = refusal(ledger.verify)
    assert message.startswith(f"ledger.path={ledger.path}")
    before = ledger.path.read_bytes()
    for use in (ledger.queries, lambda: ledger.reserve(query("new"))):
        assert refusal(use) == message
    assert ledger.path.read_bytes() == before  # nothing is added to a broken chain
    return message


@pytest.mark.parametrize("number", range(5))
def test_a_changed_line_is_named(filled, number):
    lines = lines_of(filled)
    lines[number] = lines[number].replace(b'"steps":100', b'"steps":10')
    message = broken_at(filled, lines)
    assert "first line" in message if number == 0 else f"line {number + 1} " in message


def test_no_byte_can_be_changed(ledger):
    ledger.reserve(query(), look())
    whole = ledger.path.read_bytes()
    for place in range(len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        ledger.path.write_bytes(changed)
        assert refusal(ledger.verify).startswith(f"ledger.path={ledger.path}")


@pytest.mark.parametrize("number", range(4))
def test_a_line_that_is_gone_doubled_or_out_of_place_is_named(filled, number):
    lines = lines_of(filled)
    without = lines[:number] + lines[number + 1 :]
    doubled = lines[: number + 1] + lines[number:]
    swapped = [*lines[:number], lines[number + 1], lines[number], *lines[number + 2 :]]
    for changed in (without, swapped, doubled):
        broken_at(filled, changed)


def test_lines_that_are_not_ours_are_named(filled):
    lines = lines_of(filled)
    for alien in (b"\n", b"{}\n", b"null\n", b"[" * 100_000 + b"\n", b"\xff\n", b'{"entry":NaN}\n'):
        assert "line 3 " in broken_at(filled, [*lines[:2], alien, *lines[2:]])


def test_what_a_chain_cannot_show_a_noted_hash_does(filled):
    noted = filled.newest_hash()
    filled.reserve(query("f"))
    filled.verify(expect=noted)
    filled.verify(expect=noted[:16].upper())
    whole = lines_of(filled)

    filled.path.write_bytes(b"".join(whole[:4]))
    filled.verify()
    assert "cut off" in refusal(filled.verify, expect=noted)

    filled.path.unlink()
    for run in "abcde":
        filled.reserve(query(run, noise=9.0))
    filled.verify()
    assert "rewritten" in refusal(filled.verify, expect=noted)
    assert "too few digits" in refusal(filled.verify, expect=noted[:15])


def test_an_entry_of_another_version_is_not_guessed_at(ledger):
    ledger.reserve(query())
    entry = Chain(ledger.path).read().entries[0]
    for change in (
        {"mechanism": {"mechanism": "laplace", "scale": 1}},
        {"status": "lent"},
        {"extra": 1},
        {"delta": None},
    ):
        ledger.path.unlink()
        Chain(ledger.path).extend(lambda entries, change=change: [entry | change])
        assert "ledger's entry 1" in refusal(ledger.queries)
        assert str(ledger.path) in refusal(ledger.reserve, query("new"))


@pytest.mark.parametrize(
    "content", [b"hello", b"hello\n", b"{}", b'{"utility/accuracy":0.5}\n', b"\0" * 10, b"\n"]
)
def test_a_file_that_is_something_else_is_left_alone(ledger, content):
    ledger.path.write_bytes(content)
    for use in (ledger.queries, ledger.verify, lambda: ledger.reserve(query())):
        message = refusal(use)
        assert message.startswith(f"ledger.path={ledger.path} does not begin like")
    assert ledger.path.read_bytes() == content


def test_a_folder_is_refused(tmp_path):
    ledger = Ledger(tmp_path)
    for use in (ledger.queries, lambda: ledger.reserve(query())):
        message = refusal(use)
        assert message.startswith(f"ledger.path={tmp_path} is a folder")
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    ledger = Ledger(tmp_path / "pipe")
    for use in (ledger.queries, lambda: ledger.reserve(query())):
        assert "no ordinary file" in refusal(use)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    ledger = Ledger(tmp_path / "file" / "deep" / "ledger.jsonl")
    for use in (ledger.queries, lambda: ledger.reserve(query())):
        assert refusal(use).startswith(f"ledger.path={ledger.path} cannot be")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_place_that_cannot_be_written_is_refused(filled):
    folder = filled.path.parent
    filled.path.chmod(0o400)
    folder.chmod(0o500)
    try:
        assert "Permission denied" in refusal(filled.reserve, query("new"))
        assert len(filled.queries()) == 5  # reading takes no lock
        assert "Permission denied" in refusal(Ledger(folder / "x" / "y.jsonl").reserve, query())
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("error", ["Read-only file system", "No space left on device"])
def test_what_the_disk_refuses_is_said_in_a_sentence(ledger, monkeypatch, error):
    ledger.reserve(query())

    def failing(*_):
        raise OSError(30, error)

    monkeypatch.setattr(os, "write", failing)
    message = refusal(ledger.reserve, query("new"))
    assert message.startswith(f"ledger.path={ledger.path}") and error in message
    monkeypatch.undo()
    assert len(ledger.queries()) == 1


def test_the_home_folder_can_be_meant(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    Ledger(Path("~/books/ledger.jsonl")).reserve(query())
    assert (tmp_path / "books" / "ledger.jsonl").is_file()


def test_a_reservation_reads_each_entry_once(ledger, monkeypatch):
    """Work for an entry must not grow with the number of entries: counted, not timed."""
    ledger.reserve(*(query(str(number)) for number in range(100)))
    hashed = itertools.count()
    original = ledger_chain._line

    def counting(entry, previous):
        next(hashed)
        return original(entry, previous)

    monkeypatch.setattr(ledger_chain, "_line", counting)
    ledger.reserve(query("new"), max_eps=1000)
    assert next(hashed) == 101


def test_a_waiting_writer_says_so(ledger, monkeypatch, caplog):
    monkeypatch.setattr(ledger_chain, "_PATIENCE", 0.05)
    inside, leave = threading.Event(), threading.Event()

    def slow(entries):
        inside.set()
        leave.wait(30)
        return []

    holder = threading.Thread(target=Chain(ledger.path).extend, args=(slow,))
    holder.start()
    inside.wait(30)
    waiting = threading.Thread(target=ledger.reserve, args=(query(),))
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive() and "waiting for it" in caplog.text
    leave.set()
    for thread in (holder, waiting):
        thread.join(30)
    assert len(ledger.queries()) == 1


def test_nothing_is_written_when_a_decision_fails(ledger):
    def failing(entries):
        raise UserError("no.")

    refusal(Chain(ledger.path).extend, failing)
    assert ledger.path.read_bytes() == b""
    ledger.reserve(query())
    assert len(ledger.queries()) == 1
