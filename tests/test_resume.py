"""A run that was stopped, killed or damaged goes on, and its eps is never less than what was spent."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHORT, compose, files_below, refusal, tiny_images, tiny_module, weights_of
from omegaconf import OmegaConf
from PIL import Image

from dp_synth import building, finetuning, train
from dp_synth.checkpoints import (
    PeriodicCheckpoint,
    Progress,
    SafeCheckpointIO,
    newest_first,
    read_progress,
    resume_point,
    write_progress,
)
from dp_synth.declaration import declare
from dp_synth.errors import UserError
from dp_synth.fitting import Interrupted, fit
from dp_synth.privacy.callback import PrivacyEngineCallback
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.privacy.silence import StepFault
from dp_synth.resuming import run_to_resume
from dp_synth.runs import Run

STEPS = 4
PLAN = PrivacyPlan(
    eps=10,
    delta=1e-2,
    max_grad_norm=0.5,
    batch_size=3,
    steps=STEPS,
    num_examples=11,
    multiplicity=2,
    noise_multiplier=0.7,
    unsafe_repeatable_randomness=7,
)
PUBLIC = PublicPlan(batch_size=4, steps=STEPS, num_examples=11)  # two batches an epoch
PLANS = pytest.mark.parametrize("plan", [PLAN, PUBLIC], ids=["private", "public"])


class EveryCheckpoint(PeriodicCheckpoint):
    """Keeps the checkpoint of every step, where the program keeps the newest two."""

    def save(self, trainer):
        trainer.save_checkpoint(self.directory / f"step={trainer.global_step:06d}.ckpt")


class InterruptedAdam(torch.optim.Adam):
    """Adam to which Ctrl-C happens in the middle of one step."""

    def __init__(self, parameters, at):
        super().__init__(parameters, lr=0.1)
        self.countdown = at

    def step(self, closure=None):
        self.countdown -= 1
        if self.countdown == 0:
            signal.raise_signal(signal.SIGINT)
        return super().step(closure)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def train_tiny(plan, trainer_cfg, directory, *, optimizer=adam, keep=EveryCheckpoint, resume=None):
    torch.manual_seed(time.time_ns())  # global randomness is no part of a run's state
    module = tiny_module(plan, optimizer=optimizer)
    fit(
        module,
        tiny_images(11),
        plan,
        trainer_cfg,
        caption="fit",
        checkpoints=keep(directory, every=1),
        resume_from=resume,
    )
    return module


def result_of(module):
    """All that a run hands on: weights, their average, and the counts of steps."""
    counts = [module.trainer.global_step, module.ema.optimization_step]
    counts += [
        callback.steps_taken
        for callback in module.trainer.callbacks
        if isinstance(callback, PrivacyEngineCallback)
    ]
    assert set(counts) == {STEPS}, counts
    return torch.cat([weights_of(module.net), weights_of(module.averaged_network())])


@PLANS
def test_resuming_from_every_step_gives_the_uninterrupted_result(plan, trainer_cfg, tmp_path):
    whole = train_tiny(plan, trainer_cfg, tmp_path)
    files = newest_first(tmp_path)
    assert [path.name for path in files] == [f"step={n:06d}.ckpt" for n in range(STEPS, -1, -1)]
    for file in files:
        resumed = train_tiny(plan, trainer_cfg, tmp_path / "again", resume=file)
        assert torch.equal(result_of(resumed), result_of(whole)), file.name


@PLANS
@pytest.mark.parametrize("at", [1, 2, 3])
def test_ctrl_c_after_every_step_costs_nothing(plan, at, trainer_cfg, tmp_path):
    whole = train_tiny(plan, trainer_cfg, tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"{at} of {STEPS} steps"):
        train_tiny(
            plan,
            trainer_cfg,
            tmp_path / "stopped",
            optimizer=lambda parameters: InterruptedAdam(parameters, at),
            keep=lambda directory, every: PeriodicCheckpoint(directory, every=1000),
        )
    assert signal.getsignal(signal.SIGINT) is handler
    newest = newest_first(tmp_path / "stopped")[0]
    assert newest.name == f"step={at:06d}.ckpt"
    resumed = train_tiny(plan, trainer_cfg, tmp_path / "stopped", resume=newest)
    assert torch.equal(result_of(resumed), result_of(whole))


def test_stopping_after_each_step_in_turn_adds_up_to_one_run(trainer_cfg, tmp_path):
    whole = train_tiny(PLAN, trainer_cfg, tmp_path / "whole")
    newest = None
    for taken in range(1, STEPS):
        with pytest.raises(Interrupted, match=f"{taken} of {STEPS}"):
            train_tiny(
                PLAN,
                trainer_cfg,
                tmp_path / "stopped",
                optimizer=lambda parameters: InterruptedAdam(parameters, 1),
                resume=newest,
            )
        newest = newest_first(tmp_path / "stopped")[0]
        accountant = read(newest)["callbacks"]["PrivacyEngineCallback"]["accountant"]
        assert accountant["history"] == [(PLAN.noise_multiplier, PLAN.sample_rate, taken)]
    last = train_tiny(PLAN, trainer_cfg, tmp_path / "stopped", resume=newest)
    assert torch.equal(result_of(last), result_of(whole))


def test_secret_randomness_is_drawn_afresh_after_a_resume(trainer_cfg, tmp_path):
    plan = replace(PLAN, unsafe_repeatable_randomness=None)
    train_tiny(plan, trainer_cfg, tmp_path)
    start = newest_first(tmp_path)[-2]
    one = train_tiny(plan, trainer_cfg, tmp_path / "one", resume=start)
    other = train_tiny(plan, trainer_cfg, tmp_path / "other", resume=start)
    assert not torch.equal(result_of(one), result_of(other))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", 0.8),
        ("batch_size", 4),
        ("steps", STEPS + 1),
        ("max_grad_norm", 1.0),
        ("delta", 2e-2),
        ("eps", 11),
        ("multiplicity", 3),
        ("accountant", "rdp"),
        ("unsafe_repeatable_randomness", None),
    ],
)
def test_a_checkpoint_of_another_plan_is_refused_by_name(name, value, trainer_cfg, tmp_path):
    train_tiny(PLAN, trainer_cfg, tmp_path)
    start = newest_first(tmp_path)[-2]
    with pytest.raises(UserError, match=rf"privacy\.{name} differ"):
        train_tiny(replace(PLAN, **{name: value}), trainer_cfg, tmp_path / "new", resume=start)
    assert not (tmp_path / "new").exists()


def test_another_engine_is_no_other_plan(trainer_cfg, tmp_path):
    # Not Adam: its first steps are signs, which turn rounding into whole steps.
    whole = train_tiny(PLAN, trainer_cfg, tmp_path, optimizer=sgd)
    start = newest_first(tmp_path)[-2]
    looped = replace(PLAN, engine="loop")
    resumed = train_tiny(looped, trainer_cfg, tmp_path / "new", optimizer=sgd, resume=start)
    torch.testing.assert_close(result_of(resumed), result_of(whole), rtol=1e-3, atol=1e-4)


def read(path):
    return torch.load(path, weights_only=True)


def test_checkpoints_are_data_for_the_owner_alone(finished_run):
    files = newest_first(finished_run.checkpoints_dir)
    assert [path.name for path in files] == ["step=000003.ckpt", "step=000002.ckpt"]
    for file in files:
        assert file.stat().st_mode & 0o777 == 0o600
        assert {"state_dict", "ema", "callbacks"} <= set(read(file))
    others = {path.name for path in finished_run.checkpoints_dir.iterdir()} - {
        f.name for f in files
    }
    assert others == {"progress.json", ".lock"}


def leave(directory, *steps, noted=None):
    """Checkpoints of some steps, and a note of how far the run had come."""
    for count in steps:
        (directory / f"step={count:06d}.ckpt").write_bytes(b"")
    if noted is not None:
        write_progress(directory, noted)


def test_an_abandoned_branch_counts(tmp_path):
    """The steps between an older checkpoint and the furthest one left output, and are taken twice."""
    leave(tmp_path, 3, 5, noted=Progress(steps=7, abandoned=2))
    assert resume_point(tmp_path) == (tmp_path / "step=000005.ckpt", Progress(5, abandoned=4))
    leave(tmp_path, 7)
    assert resume_point(tmp_path) == (tmp_path / "step=000007.ckpt", Progress(7, abandoned=2))
    leave(tmp_path, 9)  # killed before it was noted
    assert resume_point(tmp_path) == (tmp_path / "step=000009.ckpt", Progress(9, abandoned=2))


def test_a_run_whose_checkpoints_are_all_gone_counts_all_their_steps(tmp_path):
    leave(tmp_path, noted=Progress(steps=7))
    assert resume_point(tmp_path) == (None, Progress(0, abandoned=7))


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tmp_path):
    assert resume_point(tmp_path) == (None, Progress())
    assert resume_point(tmp_path / "not there") == (None, Progress())


def test_a_damaged_note_of_progress_is_refused(tmp_path):
    (tmp_path / "progress.json").write_text("{")
    assert "progress.json is damaged" in refusal(read_progress, tmp_path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.ckpt")
    with pytest.raises(UserError, match="not a checkpoint"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "exploded").exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "step=000001.ckpt"
    SafeCheckpointIO().save_checkpoint({"value": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        SafeCheckpointIO().save_checkpoint({"value": lambda: None}, path)
    assert read(path) == {"value": 1}
    assert newest_first(tmp_path) == [path]


@pytest.fixture
def stopped_run(command, tmp_path, monkeypatch):
    """A run of the command that Ctrl-C stopped after one of three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building.torch.optim, "Adam", lambda p, lr: InterruptedAdam(p, 1))
        outcome = command(train, *SHORT, "public=none", f"run_dir={tmp_path}/run")
    assert "1 of 3 steps" in outcome.err
    return Run(tmp_path / "run")


def test_a_stopped_run_states_the_whole_planned_eps(stopped_run):
    statement = stopped_run.statement()
    assert statement["status"] == "interrupted"
    assert statement["eps"] == pytest.approx(10, rel=2e-3)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("privacy.eps=3", "privacy.eps"),
        ("privacy.steps=5", "privacy.steps"),
        ("privacy=eps1", "privacy"),
        ("privacy.batch_size=31", "privacy.batch_size"),
        ("model.lr=1", "model.lr"),
        ("dataset=font_digits", "dataset"),
    ],
)
def test_another_plan_on_the_command_line_is_refused_by_name(command, stopped_run, override, key):
    before = files_below(stopped_run.path)
    outcome = command(train, f"run={stopped_run.path}", "resume=true", override)
    assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1
    assert f"leave {key} out" in outcome.err
    assert files_below(stopped_run.path) == before


def test_a_plan_changed_in_the_runs_own_config_is_refused(command, stopped_run):
    stored = OmegaConf.load(stopped_run.config_path)
    stored.privacy.max_grad_norm = 2.0
    OmegaConf.save(stored, stopped_run.config_path)
    outcome = command(train, f"run={stopped_run.path}", "resume=true")
    assert outcome.code == 2 and "privacy.max_grad_norm differ" in outcome.err
    assert not stopped_run.has_model()


def test_a_repeated_override_that_agrees_is_fine(command, stopped_run):
    outcome = command(
        train,
        f"run={stopped_run.path}",
        "resume=true",
        "privacy.steps=3",
        "trainer.checkpoint_every=2",
    )
    assert outcome.code == 0 and stopped_run.statement()["steps_taken"] == 3


def test_a_repeated_group_that_agrees_is_fine(command, tmp_path):
    """Also where the run counted what the group leaves open: N, classes, delta, the batch size."""
    for number in range(11):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    words = ["dataset=image_folder", "dataset.name=mine", f"dataset.root={tmp_path / 'data'}"]
    run = Run.create(tmp_path / "run", declared(*words, "privacy=eps10"))
    cfg = compose(*words, "privacy=eps10", f"run={run.path}", "resume=true")
    assert run_to_resume(cfg, [*words, "privacy=eps10"]).dataset.num_examples > 0
    for other in ("dataset.resolution=16", "privacy.steps=7"):
        cfg = compose(*words, "privacy=eps10", other, f"run={run.path}", "resume=true")
        with pytest.raises(UserError, match=f"leave {other.split('=')[0]} out"):
            run_to_resume(cfg, [other])


def declared(*words):
    cfg = compose(*words)
    cfg.run_dir = None
    declare(cfg)
    return cfg


def test_a_damaged_checkpoint_is_one_sentence(command, stopped_run):
    newest = newest_first(stopped_run.checkpoints_dir)[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    outcome = command(train, f"run={stopped_run.path}", "resume=true")
    assert outcome.code == 2 and newest.name in outcome.err and "damaged" in outcome.err
    assert "Traceback" not in outcome.err and not stopped_run.has_model()
    assert stopped_run.statement()["eps"] == pytest.approx(10, rel=2e-3)


@pytest.mark.parametrize(
    ("module", "function"),
    [(train, "fine_tune"), (finetuning, "fit"), (PeriodicCheckpoint, "on_train_start")],
    ids=["before the statement", "before training", "before the first checkpoint"],
)
def test_a_run_killed_before_its_first_checkpoint_resumes_from_its_config(
    command, tmp_path, monkeypatch, module, function
):
    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    run = Run(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, die)
        with pytest.raises(Killed):
            command(train, *SHORT, "public=none", "privacy.eps=7", f"run_dir={run.path}")
    assert newest_first(run.checkpoints_dir) == [] and run.config_path.is_file()

    assert command(train, f"run={run.path}", "resume=true").code == 0
    assert run.statement()["eps"] == pytest.approx(7, rel=2e-3)
    assert run.statement()["status"] == "finished" and run.has_model()


def test_a_finished_run_is_not_trained_again(command, run_copy, monkeypatch):
    def no_more(*args, **kwargs):
        raise AssertionError("trained, sampled or evaluated again")

    monkeypatch.setattr(finetuning, "fit", no_more)
    monkeypatch.setattr("dp_synth.sampling.Sampler.__call__", no_more)
    monkeypatch.setattr(train, "evaluate_run", no_more)
    before = files_below(run_copy.path)
    assert command(train, f"run={run_copy.path}", "resume=true").code == 0
    after = files_below(run_copy.path)
    del before["report.html"], after["report.html"]
    assert after == before


def test_kill_9_in_mid_training_then_resume(command, tmp_path, cache):
    """The one test of a process of its own; it also shows that a warning reaches the terminal."""
    run = Run(tmp_path / "run")
    arguments = [
        *SHORT,
        "public=none",
        "privacy.delta=0.01",
        "privacy.steps=12",
        "trainer.checkpoint_every=1",
    ]
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "dp_synth.train", *arguments, f"run_dir={run.path}"],
            cwd=Path(train.__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=stderr,
            stderr=stderr,
        )
        try:
            third = run.checkpoints_dir / "step=000003.ckpt"
            while not third.exists() and process.poll() is None:
                time.sleep(0.002)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
    said = (tmp_path / "stderr").read_text()
    assert said.count("privacy.delta=0.01 is not below 1/N") == 1
    taken = read(newest_first(run.checkpoints_dir)[0])["global_step"]
    assert 3 <= taken < 12 and not run.has_model()
    planned = run.statement()
    assert planned["status"] == "running" and planned["steps"] == 12

    outcome = command(train, f"run={run.path}", "resume=true")
    assert outcome.code == 0 and run.has_model()
    statement = run.statement()
    assert statement["steps_taken"] == statement["steps"] == 12
    assert statement["eps"] == planned["eps"]
    final = read(newest_first(run.checkpoints_dir)[0])
    history = final["callbacks"]["PrivacyEngineCallback"]["accountant"]["history"]
    assert history == [(statement["noise_multiplier"], statement["sample_rate"], 12)]


def test_a_checkpoint_of_a_run_without_privacy_is_no_private_result(trainer_cfg, tmp_path):
    """It has no accountant; no step is left that could find out."""
    train_tiny(PUBLIC, trainer_cfg, tmp_path / "public")
    with pytest.raises(StepFault, match=f"{STEPS} optimizer steps but 0 accounted"):
        train_tiny(PLAN, trainer_cfg, tmp_path, resume=newest_first(tmp_path / "public")[0])


@pytest.mark.parametrize("remains", ["checkpoints", "model", "local"])
def test_a_new_run_takes_nothing_of_another(remains, tmp_path):
    (tmp_path / remains).mkdir()
    assert f"{remains} of another run" in refusal(Run.refuse_taken, tmp_path)


def test_checkpoints_that_were_removed_are_not_forgotten(command, stopped_run):
    assert stopped_run.statement()["status"] == "interrupted"
    shutil.rmtree(stopped_run.checkpoints_dir)
    outcome = command(train, f"run={stopped_run.path}", "resume=true")
    assert outcome.code == 2 and "the ledger knows of" in outcome.err


def test_a_smaller_budget_holds_for_the_next_sitting(command, stopped_run):
    outcome = command(train, f"run={stopped_run.path}", "resume=true", "ledger.max_eps=0.1")
    assert outcome.code == 2 and "ledger.max_eps=0.1 is not kept" in outcome.err
