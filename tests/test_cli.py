"""A user's mistake ends in one clear sentence and exit code 2, and leaves nothing behind."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import SHORT, files_below

from dp_synth import (
    audit,
    building,
    evaluate,
    finetuning,
    ledger,
    plan,
    report,
    sample,
    train,
)
from dp_synth.data import digits, folder, font_digits
from dp_synth.data.images import Images
from dp_synth.errors import UserError


@pytest.fixture
def unread(monkeypatch):
    """Whoever opens an image is told so: for mistakes that must be found before."""

    def open_images(*args, **kwargs):
        raise AssertionError("images were opened")

    for module in (digits, font_digits, folder):
        name = "read_image_folder" if module is folder else "load"
        monkeypatch.setattr(module, name, open_images)


def assert_refused(outcome, *words):
    """Exit code 2, one sentence on stderr that holds all the words, no traceback."""
    assert outcome.code == 2, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in outcome.err, outcome.err
    for word in words:
        assert word in lines[0]
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy.epss=3"], ["privacy.epss", "did you mean privacy.eps?"]),
        (["sampler.num_image=3"], ["sampler.num_image", "did you mean sampler.num_images?"]),
        (["qqqqqq.zzzzzz=3"], ["qqqqqq", "--help"]),
        (["dataset=nonsense"], ["dataset=nonsense", "digits", "font_digits"]),
        (["privacy=eps7"], ["privacy=eps7", "eps1", "eps10", "none"]),
        (["sampler=dimm"], ["sampler=dimm", "ddim"]),
        (["experiment=big"], ["experiment=big", "smoke"]),
        (["privacy.eps"], ["privacy.eps", "key=value"]),
        (["privacy.eps=0"], ["privacy.eps=0", "above 0"]),
        (["privacy.eps=-3"], ["privacy.eps=-3", "above 0"]),
        (["privacy.eps=ten"], ["privacy.eps='ten'", "above 0"]),
        (["privacy.eps=.nan"], ["privacy.eps", "above 0"]),
        (["privacy.delta=1"], ["privacy.delta=1", "between 0 and 1"]),
        (["privacy.delta=0"], ["privacy.delta=0", "above 0"]),
        (["privacy.batch_size=1438"], ["privacy.batch_size=1438", "at most 1437"]),
        (["privacy.steps=0"], ["privacy.steps=0", "1 or more"]),
        (["privacy.multiplicity=1.5"], ["privacy.multiplicity=1.5", "whole number"]),
        (["privacy.accountant=gdp"], ["privacy.accountant", "prv or rdp"]),
        (["privacy.max_grad_norm=0"], ["privacy.max_grad_norm=0"]),
        (["sampler.num_images=0"], ["sampler.num_images=0", "1 or more"]),
        (["sampler.labels=private"], ["sampler.labels='private'", "uniform"]),
        (["resume=true"], ["resume=true", "run=DIR"]),
        (["resume=true", "run=missing"], ["run=missing", "a directory that train wrote"]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else None,
)
def test_a_mistake_in_the_command_line(command, unread, tmp_path, overrides, words):
    assert_refused(command(train, *overrides), *words)
    assert list(tmp_path.iterdir()) == [] or files_below(tmp_path) == {}
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset.num_examples=1000"], ["dataset.num_examples=1000", "declare", "1437"]),
        (["dataset.image_shape=[1,16,16]"], ["dataset.image_shape", "(1, 8, 8, 10)"]),
        (["dataset.num_classes=7"], ["dataset.num_classes", "(1, 8, 8, 10)"]),
        (["trainer.devices=2"], ["trainer.devices", "trainer.devices=1 would work"]),
        (["trainer.checkpoint_every=0"], ["trainer.checkpoint_every=0", "1 or more"]),
        (["trainer.precision=bf16-true"], ["trainer.precision='bf16-true'", "bf16-mixed"]),
        (["trainer.micro_batch_size=0"], ["trainer.micro_batch_size=0", "1 or more"]),
        (["model.lr=0"], ["model.lr=0", "above 0"]),
        (["model.ema_decay=2"], ["model.ema_decay=2", "from 0 to 1"]),
        (["seed=abc"], ["seed='abc'", "whole number"]),
        (["+privacy.foo=1"], ["privacy.foo", "--help"]),
        (["model.trainable=some"], ["model.trainable=some", "attention"]),
        (
            ["model.diffusion.prediction=epsilon"],
            ["model.diffusion.prediction='epsilon'", "eps or v or x0"],
        ),
        (["model.diffusion.timestep_law.weights=[1]"], ["timestep_law.bounds", "weights"]),
        (
            ["model.network.block_out_channels=[8,8,8,8,8]"],
            ["model.network.block_out_channels", "multiples of 16"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else None,
)
def test_a_mistake_that_only_the_run_can_find(command, tmp_path, overrides, words):
    outcome = command(
        train, *SHORT, "public=none", "evaluator=none", f"run_dir={tmp_path}/run", *overrides
    )
    assert_refused(outcome, *words)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("module", [train, plan])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("privacy.unit=patient", "privacy.unit=patient"),
        ("+dataset.unit=patient", "privacy.unit=patient"),
        ("privacy.num_examples=1500", "leave privacy.num_examples out"),
        ("dataset.image_shape=[a,8,8]", "dataset.image_shape"),
        ("dataset.name=???", "dataset.name is required"),
    ],
)
def test_the_plan_is_about_the_examples_that_are_loaded(
    command, tmp_path, module, unread, override, words
):
    outcome = command(module, *SHORT, "public=none", f"run_dir={tmp_path}/run", override)
    assert_refused(outcome, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [train, plan])
@pytest.mark.parametrize(
    ("override", "would_work"),
    [
        ("public.lr=-1", "above 0"),
        ("public.steps=0", "1 or more"),
        ("public.batch_size=0", "1 or more"),
        ("sampler.guidance=abc", "0 or more"),
        ("evaluator.utility.validation_fraction=1", "less than 1"),
    ],
)
def test_a_mistake_in_any_phase_shows_before_the_first(
    command, tmp_path, module, override, would_work
):
    outcome = command(module, "experiment=smoke", f"run_dir={tmp_path}/run", override)
    assert_refused(outcome, override.partition("=")[0], would_work)
    assert not (tmp_path / "run").exists()


def test_a_delta_that_allows_publishing_a_record_is_warned_of(command):
    """One sentence, once, without a place in the code; it does not stop the command."""
    arguments = ("experiment=smoke", "public=none", "privacy.delta=0.01", "privacy.batch_size=16")
    outcome = command(plan, *arguments)
    assert outcome.code == 0
    warned = [line for line in outcome.err.splitlines() if "1/N" in line]
    assert len(warned) == 1 and warned[0].startswith("Warning: privacy.delta=0.01")


def test_a_run_directory_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    outcome = command(train, *SHORT, "public=none", f"run_dir={tmp_path}/file/run")
    assert_refused(outcome, "file")
    assert files_below(tmp_path) == {"file": b"mine"}


def test_a_finished_run_is_never_overwritten(command, finished_run):
    before = files_below(finished_run.path)
    outcome = command(train, *SHORT, "public=none", f"run_dir={finished_run.path}")
    assert_refused(outcome, "already holds a run", "resume=true")
    assert files_below(finished_run.path) == before


def test_in_a_sweep_every_bad_job_is_named_and_leaves_nothing(command, tmp_path, unread):
    outcome = command(
        train, "-m", "privacy.eps=-1,-2", "privacy.batch_size=9999", f"hydra.sweep.dir={tmp_path}/s"
    )
    assert outcome.code == 2 and "Traceback" not in outcome.err
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 2 and "eps=-1" in lines[0] and "eps=-2" in lines[1]
    assert [p for p in tmp_path.rglob("*") if p.is_dir() and not any(p.iterdir())] == []


def test_in_a_sweep_a_wrong_key_is_one_sentence(command, tmp_path):
    outcome = command(train, "-m", "privacy.epss=1,2", f"hydra.sweep.dir={tmp_path}/s")
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "did you mean privacy.eps?" in outcome.err


def test_a_sweep_with_one_bad_job_finishes_the_good_one(command, tmp_path):
    outcome = command(
        train,
        "-m",
        *SHORT,
        "public=none",
        "privacy.steps=0,1",
        f"hydra.sweep.dir={tmp_path}/s",
    )
    assert outcome.code == 2 and "privacy.steps=0" in outcome.err
    assert not (tmp_path / "s" / "0").exists()
    assert (tmp_path / "s" / "1" / "model").is_dir()


@pytest.mark.parametrize("module", [sample, evaluate, report], ids=["sample", "evaluate", "report"])
def test_commands_on_a_run_need_a_run(command, module, tmp_path):
    key = "runs" if module is report else "run"
    assert_refused(command(module), f"{key} is required")
    assert_refused(command(module, f"{key}=missing"), "run=missing", "not a directory")
    (tmp_path / "empty").mkdir()
    assert_refused(command(module, f"{key}=empty"), "run=empty", "no config.yaml")
    assert (tmp_path / "empty").is_dir()


def test_an_unfinished_run_says_how_to_finish_it(command, run_copy):
    shutil.rmtree(run_copy.model_dir)
    outcome = command(sample, f"run={run_copy.path}")
    assert_refused(outcome, "no model/", f"run={run_copy.path} resume=true")
    assert not run_copy.next_samples_dir().exists()


def test_a_damaged_model_is_one_sentence(command, run_copy):
    for file in run_copy.model_dir.rglob("*.safetensors"):
        file.unlink()
        file.write_bytes(b"not weights")
    outcome = command(sample, f"run={run_copy.path}", "sampler.num_images=2", "sampler.steps=1")
    assert_refused(outcome, str(run_copy.model_dir), "damaged")


def test_a_data_set_is_never_overwritten(command, run_copy):
    before = files_below(run_copy.path)
    outcome = command(sample, f"run={run_copy.path}", f"out={run_copy.samples_dir}")
    assert_refused(outcome, "never overwritten")
    assert files_below(run_copy.path) == before


def test_groups_switched_off_say_so(command, run_copy):
    assert_refused(command(sample, f"run={run_copy.path}", "sampler=none"), "sampler=none")
    assert_refused(command(evaluate, f"run={run_copy.path}", "evaluator=none"), "evaluator=none")
    outcome = command(evaluate, f"run={run_copy.path}", "samples=nowhere")
    assert_refused(outcome, "samples=nowhere", "dp_synth.sample")


def test_outputs_into_missing_folders_are_refused_before_the_work(command, run_copy, unread):
    assert_refused(command(report, f"runs={run_copy.path}", "out=no/where.html"), "no/where.html")
    assert_refused(command(plan, "plan.out=no/where.json"), "plan.out=no/where.json")


def test_every_command_prints_help(command):
    for module in (train, plan, sample, evaluate, report, audit, ledger):
        outcome = command(module, "--help")
        assert outcome.code == 0 and outcome.out.startswith(f"python -m {module.__name__} ")
        assert len(outcome.out) > 100


@pytest.fixture
def interrupted_at(monkeypatch):
    """A function that lets Ctrl-C arrive in the middle of a given step."""

    def arrange(step):
        class InterruptedAdam(torch.optim.Adam):
            steps = 0

            def step(self, closure=None):
                type(self).steps += 1
                if type(self).steps == step:
                    signal.raise_signal(signal.SIGINT)
                return super().step(closure)

        monkeypatch.setattr(building.torch.optim, "Adam", InterruptedAdam)

    return arrange


def test_ctrl_c_saves_the_step_in_progress_and_says_how_to_go_on(
    command, tmp_path, interrupted_at, monkeypatch
):
    interrupted_at(2)
    run = tmp_path / "run"
    stopped = command(train, *SHORT, "public=none", f"run_dir={run}")
    assert stopped.code not in (0, 2) and "Traceback" not in stopped.err
    assert "2 of 3 steps" in stopped.err
    # As one types it in the folder that one is in: relative to it.
    assert f"python -m dp_synth.train run={run.name} resume=true" in stopped.err
    assert (run / "checkpoints" / "step=000002.ckpt").is_file() and not (run / "model").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)

    continued = command(train, f"run={run}", "resume=true")
    assert continued.code == 0 and (run / "model").is_dir()
    assert "3 steps" in continued.out


def test_a_time_limit_stops_as_ctrl_c_does(command, tmp_path):
    run = tmp_path / "run"
    outcome = command(
        train,
        *SHORT,
        "public=none",
        "privacy.steps=2000",
        "trainer.max_time=00:00:00:01",
        f"run_dir={run}",
    )
    assert outcome.code not in (0, 2) and "of 2000 steps" in outcome.err
    assert "resume=true" in outcome.err and list((run / "checkpoints").glob("*.ckpt"))


def test_an_error_of_the_program_is_not_dressed_up_as_the_users(command, monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(finetuning, "fit", broken)
    with pytest.raises(ZeroDivisionError):
        command(train, *SHORT, "public=none", f"run_dir={tmp_path}/run")


def test_a_users_mistake_keeps_its_traceback_on_request(command, monkeypatch):
    monkeypatch.setattr(os.environ, "pop", lambda *args: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError, match=r"privacy\.eps"):
        command(train, "privacy.eps=0")


def test_public_images_of_another_shape_are_refused(command, tmp_path, monkeypatch):
    """The public model of 16x16 images is trained, and does not fit a network of 8x8 ones."""

    def load(split, **options):
        pixels = np.zeros((40, 16, 16, 3), dtype=np.uint8)
        return Images(pixels, np.arange(40, dtype=np.int64) % 10, tuple("0123456789"))

    monkeypatch.setattr(font_digits, "load", load)
    outcome = command(train, *SHORT, "public.load.num_images=41", f"run_dir={tmp_path}/run")
    assert outcome.code == 2 and "does not fit model.network" in outcome.err
