"""A release holds what may leave and nothing else; a run that may not leave is refused."""

import json
import os
import re
import struct
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import files_below, refusal, weights_of
from diffusers import DDPMPipeline, UNet2DModel
from html_page import Page
from huggingface_hub import DatasetCard, ModelCard
from omegaconf import OmegaConf
from PIL import Image
from torchvision.datasets import ImageFolder

from dp_synth import release
from dp_synth.books import ledger_of
from dp_synth.cards import read_facts
from dp_synth.release import release_run
from dp_synth.releasing import papers
from dp_synth.releasing.papers import Terms
from dp_synth.releasing.telling import warnings
from dp_synth.reporting.numbers import looked_at_private_images, without_private
from dp_synth.sample import sample_run

MODEL = {
    "README.md", "classes.json", "config.json", "diffusion_pytorch_model.safetensors",
    "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}  # fmt: skip
PAPERS = {
    "README.md", "SHA256SUMS", "metrics.json", "metrics_meta.json", "privacy.html", "privacy.json",
    "report.html",
}  # fmt: skip
PRIVATE = Terms(license="cc-by-4.0", private_metrics=True)


@pytest.fixture
def run(run_copy):
    """A copy of the finished run."""
    return run_copy


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def _private_metrics(run):
    return {k for k, about in run.metrics_meta().items() if looked_at_private_images(k, about)}


def _change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# What a stranger finds.


def test_others_libraries_open_a_release(run, out):
    release_run(run, out, Terms(license="cc-by-4.0"))
    data = ImageFolder(out / "samples")
    assert len(data) == 40 and data.classes == [str(digit) for digit in range(10)]
    for net in (
        UNet2DModel.from_pretrained(out / "model", low_cpu_mem_usage=False),
        DDPMPipeline.from_pretrained(out / "model", low_cpu_mem_usage=False).unet,
    ):
        assert torch.equal(weights_of(net), weights_of(run.load_model()[0]))
    assert DatasetCard.load(out / "samples" / "README.md").data.license == "cc-by-4.0"
    assert ModelCard.load(out / "model" / "README.md").data.license == "cc-by-4.0"
    for folder in (out, out / "samples"):
        subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    listed = {line.split("  ", 1)[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == files_below(out).keys() - {"SHA256SUMS"}


def test_the_readme_says_what_is_here_and_not_what_stayed(run, out):
    release_run(run, out, Terms())
    text = (out / "README.md").read_text()
    for path in out.iterdir():
        assert path.name in text or path.name == "README.md"
    for name in ("checkpoints", "local", "audit", "config.yaml", "logs", "label_shares", "public/"):
        assert name not in text
    assert "eps = 10 at delta = 0.0001" in text


def test_the_pages_are_whole(run, out):
    release_run(run, out, Terms())
    for name in ("report.html", "privacy.html"):
        page = Page((out / name).read_text())
        assert "script" not in page.tags
        assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "not shown here" in Page((out / "report.html").read_text()).text


# What leaves, and what does not.


def test_only_what_is_on_the_list_leaves(run, out):
    samples = set(files_below(run.samples_dir)) | {"SHA256SUMS"}
    (run.path / "notes.txt").write_text("of the user")
    (run.path / ".hidden").write_text("of the user")
    (run.path / "samples-x").mkdir()
    (run.path / "samples-01").mkdir()
    (run.model_dir / "optimizer.pt").write_text("of the user")
    (run.model_dir / "unet" / "deep").mkdir()
    (run.model_dir / "unet" / "deep" / "notes.txt").write_text("of the user")
    inventory = release_run(run, out, Terms())
    assert files_below(out).keys() == (
        PAPERS | {f"model/{name}" for name in MODEL} | {f"samples/{name}" for name in samples}
    )
    assert {name for name, _ in inventory.stays} == {
        ".hidden", "checkpoints", "config.yaml", "local", "logs", "model/optimizer.pt",
        "model/unet/deep/notes.txt", "notes.txt", "public", "samples-01", "samples-x",
    }  # fmt: skip
    assert all(why for _, why in inventory.stays)


def test_what_leaves_is_what_was_in_the_run(run, out):
    release_run(run, out, Terms())
    before, after = files_below(run.path), files_below(out)
    rewritten = PAPERS | {"samples/README.md", "samples/SHA256SUMS", "model/README.md"}
    for name in after.keys() - rewritten:
        assert after[name] == before[name], name


def test_nothing_that_must_stay_has_a_say_in_a_release(run, tmp_path):
    """Two runs that differ in all that must stay are released alike, byte for byte."""
    for name, number in (("one", 0.7318291), ("two", 0.2591837)):
        for path in sorted(run.path.rglob("*")):
            staying = path.relative_to(run.path).parts[0] in ("local", "logs", "public")
            if path.is_file() and staying:
                path.write_bytes(f"kept secret {number}".encode())
        for path in (run.audit_path, run.label_shares_path, run.path / "search.json"):
            path.write_text(json.dumps({"attacks": {}, "memorization": {}, "value": number}))
        metrics = run.metrics() | {
            key: number + rank / 1e4 for rank, key in enumerate(sorted(_private_metrics(run)))
        }
        run.write_metrics(metrics, run.metrics_meta())
        with run.config_path.open("a") as file:
            file.write(f"note_{name}: {number}\n")
        looks = [{"what": "A look.", "splits": ["test"], "accuracy": number, name: [number]}]
        _change(run.privacy_path, unaccounted_looks=looks)
        held = ledger_of(run.config())  # which must know of as many looks
        assert held is not None
        release_run(run, tmp_path / name, Terms())
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")


def test_no_marked_number_and_no_marked_file_leaves(run, out):
    markers = {}
    for rank, key in enumerate(sorted(_private_metrics(run))):
        markers[key] = float(f"0.{73182915 + 1009 * rank}")
    run.write_metrics(run.metrics() | markers, run.metrics_meta())
    for path in run.path.rglob("*"):
        if path.is_file() and path.relative_to(run.path).parts[0] in ("local", "logs", "public"):
            path.write_bytes(b"KEPTSECRET")
    release_run(run, out, Terms())
    assert len(markers) > 20
    for name, content in files_below(out).items():
        assert b"KEPTSECRET" not in content, name
        for key, number in markers.items():
            for shown in (repr(number)[2:], f"{number:.4g}", f"{100 * number:.1f}&nbsp;%"):
                assert shown.encode() not in content or name.endswith("safetensors"), (name, key)
    assert run.metrics() | markers == run.metrics()


def test_metrics_without_a_private_look_leave(run, out):
    release_run(run, out, Terms())
    metrics = json.loads((out / "metrics.json").read_text())
    meta = json.loads((out / "metrics_meta.json").read_text())
    assert metrics.keys() == meta.keys() == run.metrics().keys() - _private_metrics(run)
    assert "utility/accuracy.synthetic_validation" in metrics
    assert "synthetic_validation" in (out / "samples" / "README.md").read_text()


@pytest.mark.parametrize(
    ("about", "private"),
    [
        (None, True), ({}, True), ("private", True), ({"private": None}, True),
        ({"private": "false"}, True), ({"private": 0}, True), ({"private": True}, True),
        ({"private": False}, False),
    ],
)  # fmt: skip
def test_what_does_not_say_that_it_is_public_is_private(about, private):
    metrics = {"utility/x": 1.0, "public/x": 2.0}
    meta = {} if about is None else dict.fromkeys(metrics, about)
    kept, kept_meta = without_private(metrics, meta)
    assert ("utility/x" in kept) is not private
    assert kept_meta.keys() <= kept.keys()


def test_an_interval_goes_where_its_number_goes():
    metrics = {"a": 0.5, "a.ci_low": 0.4, "a.ci_high": 0.6}
    meta = {key: {"private": False} for key in metrics} | {"a": {"private": True}}
    assert without_private(metrics, meta) == ({}, {})


def test_pictures_hold_pixels_alone(run, out):
    release_run(run, out, Terms())
    pictures = [*out.rglob("*.png")]
    assert len(pictures) == 40
    for path in pictures:
        assert _chunks(path.read_bytes()) <= {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
        with Image.open(path) as picture:
            assert picture.info == {}


def _chunks(png):
    kinds, place = set(), 8
    while place < len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        kinds.add(kind)
        place += length + 12
    return kinds


def test_no_real_image_is_on_the_report(run, out):
    release_run(run, out, Terms())
    text = (out / "report.html").read_text()
    assert text.count("data:image/png") == 1 and "Real public images" not in text


def test_no_path_of_the_machine_leaves(run, out, cache, state):
    release_run(run, out, PRIVATE)
    for name, content in files_below(out).items():
        for place in (out.parent, cache, state, Path.home() / ".cache", Path(__file__).parent):
            assert str(place).encode() not in content, name


def test_file_times_do_not_tell_when_training_ended(run, out):
    for path in [run.path, *run.path.rglob("*")]:
        os.utime(path, (1e9, 1e9))
    begun = time.time() - 1
    release_run(run, out, Terms())
    assert all(path.stat().st_mtime > begun for path in [out, *out.rglob("*")])


def test_every_set_of_samples_leaves_with_its_card(run, out):
    cfg = OmegaConf.merge(run.config(), {"seed": 5})
    from hydra.utils import instantiate

    sampler = instantiate(cfg.sampler, num_images=11)
    sample_run(run, cfg, sampler, run.path / "samples-2")
    release_run(run, out, Terms(license="mit"))
    first, second = (out / name / "README.md" for name in ("samples", "samples-2"))
    assert read_facts(first).seed == 0 and read_facts(second).seed == 5
    assert read_facts(second).num_images == 11
    # Metrics were computed on samples/ alone.
    assert "## Measured" in first.read_text() and "## Measured" not in second.read_text()
    assert "samples-2/" in (out / "README.md").read_text()


# Private metrics, on request.


def test_released_private_metrics_are_on_record_everywhere(run, out):
    looks = len(run.statement()["unaccounted_looks"])
    private = _private_metrics(run)
    release_run(run, out, PRIVATE)
    assert json.loads((out / "metrics.json").read_text()) == run.metrics()
    for statement in (run.statement(), json.loads((out / "privacy.json").read_text())):
        assert len(statement["unaccounted_looks"]) == looks + 1
        assert set(statement["unaccounted_looks"][-1]["metrics"]) == private
    for page in (run.privacy_page_path, out / "privacy.html", out / "report.html"):
        text = Page(page.read_text()).text
        assert "were released" in text and "utility/accuracy.real" in text
    held = [one.query for one in ledger_of(run.config()).queries()]
    own = [q for q in held if q.run == str(run.path.resolve()) and q.query.startswith("look ")]
    assert len(own) == 1 and "released" in own[0].what
    card = (out / "samples" / "README.md").read_text()
    assert "| utility/accuracy.real |" in card and "eps does not cover it" in card
    assert "not shown here" not in (out / "report.html").read_text()


def test_without_private_metrics_there_is_no_look(run, out):
    kept, meta = without_private(run.metrics(), run.metrics_meta())
    run.write_metrics(kept, meta)
    before = run.statement()
    release_run(run, out, PRIVATE)
    assert run.statement() == before


def test_a_run_that_was_not_evaluated_has_no_metrics(run, out):
    run.metrics_path.unlink()
    run.metrics_meta_path.unlink()
    release_run(run, out, PRIVATE)
    assert not (out / "metrics.json").exists()
    assert "metrics.json" not in (out / "README.md").read_text()


# Runs that may not leave.


def _audit_mark(run):
    _change(run.privacy_path, audit="canaries")


def _audit_record(run):
    attack = {"canaries": 3, "right": 2}
    run.audit_path.write_text(json.dumps({"attacks": {"a": attack}, "memorization": {}}))


def _audit_config(run):
    cfg = run.config()
    cfg.audit = {"_target_": "dp_synth.privacy.audit.canary_audit.CanaryAudit"}
    run.config_path.write_text(OmegaConf.to_yaml(cfg))


def _void(run):
    _change(run.privacy_path, guarantee="void: privacy.unsafe_repeatable_randomness")


def _not_chosen(run):
    _change(run.privacy_path, guarantee="void: a run of a private search", search={"eta": 1})


def _without_privacy(run):
    _change(run.privacy_path, eps=None, private=False)


def _running(run):
    _change(run.privacy_path, status="running")


def _no_model(run):
    run.model_dir.rename(run.path / "elsewhere")


def _no_statement(run):
    run.privacy_path.unlink()


def _damaged_statement(run):
    run.privacy_path.write_text("{")


def _smaller_eps(run):
    _change(run.privacy_path, eps=run.statement()["eps"] * 0.9)


def _more_noise(run):
    _change(run.privacy_path, noise_multiplier=7.0)


def _look_left_out(run):
    looks = run.statement()["unaccounted_looks"] * 99
    _change(run.privacy_path, unaccounted_looks=looks)


def _damaged_metrics(run):
    run.metrics_path.write_text("[")


def _damaged_weights(run):
    (run.model_dir / "diffusion_pytorch_model.safetensors").write_bytes(b"x")


def _half_a_model(run):
    (run.model_dir / "unet" / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_audit_mark, "is an audit run"),
        (_audit_record, "is an audit run"),
        (_audit_config, "is an audit run"),
        (_void, "unsafe_repeatable_randomness"),
        (_not_chosen, "its private search"),
        (_without_privacy, "trained without privacy"),
        (_running, "is not finished"),
        (_no_model, "is not finished"),
        (_no_statement, "privacy.json is missing"),
        (_damaged_statement, "privacy.json is not JSON"),
        (_smaller_eps, "checks failed (eps"),
        (_more_noise, "checks failed (mechanism"),
        (_look_left_out, "checks failed (looks in the ledger)"),
        (_damaged_metrics, "metrics.json is not JSON"),
        (_damaged_weights, "cannot be read as a model"),
        (_half_a_model, "unet/config.json is missing"),
    ],
)
def test_a_run_that_may_not_leave_is_refused(run, out, spoil, words):
    spoil(run)
    before = files_below(run.path)
    assert words in refusal(release_run, run, out, Terms())
    assert files_below(run.path) == before
    assert {path.name for path in out.parent.iterdir()} == {"run"}


def test_a_run_in_progress_is_refused(run, out):
    with run.locked():
        assert "another process" in refusal(release_run, run, out, Terms())


# Samples and models that were touched.


def _some_picture(run):
    return sorted(run.samples_dir.rglob("*.png"))[7]


def _slipped_in(run):
    path = _some_picture(run).with_name("portrait.png")
    path.write_bytes(b"a real face")
    return path


def _hidden(run):
    path = run.samples_dir / ".thumbs"
    path.write_bytes(b"a real face")
    return path


def _changed(run):
    path = _some_picture(run)
    path.write_bytes(path.read_bytes()[:-1])
    return path


def _missing(run):
    path = _some_picture(run)
    path.unlink()
    return path


def _other_card(run):
    path = run.samples_dir / "README.md"
    path.write_text(path.read_text() + "Patient 7 is in it.\n")
    return path


def _no_checksums(run):
    path = run.samples_dir / "SHA256SUMS"
    path.unlink()
    return path


def _link(run):
    path = _some_picture(run)
    path.rename(run.path / "elsewhere.png")
    path.symlink_to(run.path / "elsewhere.png")
    return path


def _linked_folder(run):
    run.samples_dir.rename(run.path / "elsewhere")
    run.samples_dir.symlink_to(run.path / "elsewhere")
    return run.samples_dir


def _link_in_the_model(run):
    path = run.model_dir / "config.json"
    path.rename(run.path / "elsewhere.json")
    path.symlink_to(run.path / "elsewhere.json")
    return path


def _linked_model(run):
    run.model_dir.rename(run.path / "elsewhere")
    run.model_dir.symlink_to(run.path / "elsewhere")
    return run.model_dir


@pytest.mark.parametrize(
    "touch",
    [_slipped_in, _hidden, _changed, _missing, _other_card, _no_checksums, _link, _linked_folder,
     _link_in_the_model, _linked_model],
)  # fmt: skip
def test_what_was_touched_is_named(run, out, touch):
    touched = touch(run)
    assert touched.name in refusal(release_run, run, out, Terms())
    assert {path.name for path in out.parent.iterdir()} == {"run"}


# Where to, and all or nothing.


def test_a_place_that_is_taken_or_no_place_is_refused(run, out, tmp_path):
    before = files_below(tmp_path)
    for place in (run.path, run.path / "out", run.samples_dir / "out", tmp_path):
        assert "lie in one another" in refusal(release_run, run, place, Terms())
    assert "no existing folder" in refusal(release_run, run, tmp_path / "a" / "out", Terms())
    assert files_below(tmp_path) == before
    out.mkdir()
    assert "never overwritten" in refusal(release_run, run, out, Terms())
    out.rmdir()
    out.symlink_to(tmp_path / "nowhere")
    assert "never overwritten" in refusal(release_run, run, out, Terms())


def test_a_release_that_fails_leaves_nothing(run, out, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(papers, "report_runs", full)
    before = files_below(run.path)
    with pytest.raises(OSError, match="No space"):
        release_run(run, out, Terms())
    assert files_below(run.path) == before
    assert {path.name for path in out.parent.iterdir()} == {"run"}


def test_what_a_killed_release_left_is_no_obstacle(run, out):
    partial = out.with_name(".out.partial")
    partial.mkdir()
    (partial / "half").write_text("half")
    release_run(run, out, Terms())
    assert not partial.exists() and not (out / "half").exists()


def test_a_release_changes_nothing_in_the_run(run, out):
    before = files_below(run.path)
    release_run(run, out, Terms(license="mit"))
    assert files_below(run.path) == before


# The command.


def test_the_command_lists_what_left_and_what_stays(command, run):
    done = command(release, f"run={run.path}", "out=out")
    assert done.code == 0 and "no licence is chosen" in done.err
    left, stays = done.out.split("Stays in")
    assert re.findall(r"^  (\S+)", left, re.MULTILINE) == sorted([*PAPERS, "model", "samples"])
    for name in ("checkpoints", "config.yaml", "local", "logs", "public"):
        assert re.search(rf"^  {name} +\S", stays, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("release.private_metrics=yes please",), "release.private_metrics="),
        (("release.license=my own",), "release.license="),
        (("release.licence=mit",), "did you mean release.license?"),
    ],
)
def test_wrong_values_are_named(command, run, arguments, words):
    done = command(release, f"run={run.path}", "out=out", *arguments)
    assert done.code == 2 and words in done.err and not Path("out").exists()


def test_a_run_and_a_place_are_required(command, run):
    assert "give run=" in command(release, "out=out").err
    assert "give out=" in command(release, f"run={run.path}").err


@pytest.mark.parametrize("place", ["metrics", "audit"])
def test_suspected_copies_are_warned_of(run, place):
    assert not [warning for warning in warnings(run, PRIVATE) if "local/" in warning]
    if place == "metrics":
        run.write_metrics(run.metrics() | {"memorization/flagged": 1.0}, run.metrics_meta())
    else:
        flagged = {"memorization/flagged": {"value": 1.0, "private": True}}
        run.audit_path.write_text(json.dumps({"attacks": {}, "memorization": flagged}))
    (warning,) = warnings(run, PRIVATE)
    assert "memorization/flagged" in warning and "local/" in warning
