"""A run that is killed again and again: nothing is lost, nothing under-stated, nothing damaged."""

import json
import os
import random
import signal
import sys
import time
import traceback

import pytest
import torch
from conftest import call
from omegaconf import OmegaConf
from safetensors.torch import load_file

from dp_synth import train
from dp_synth.checkpoints import SafeCheckpointIO, newest_first, read_progress
from dp_synth.privacy.accounting import composed
from dp_synth.privacy.ledger import Ledger
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.randomness import RepeatablePrivateRandomness
from dp_synth.runs import Run

KILLS = 50
STEPS = 60
SMALL = (
    "experiment=smoke",
    "public=none",
    "sampler=none",
    "evaluator=none",
    "logger=none",
    "privacy.engine=loop",  # the others' ways are chosen by time, and their last digits differ
    "privacy.batch_size=3",
    "privacy.multiplicity=1",
    f"privacy.steps={STEPS}",
    "trainer.checkpoint_every=2",
    "model.network.block_out_channels=[16,16,16]",
)


@pytest.fixture
def repeatable(monkeypatch):
    """Private randomness that a test can repeat, in a run whose ledger counts as if it could not."""
    monkeypatch.setattr(
        PrivacyPlan, "randomness", lambda plan, seed: RepeatablePrivateRandomness(5)
    )


def attempt(arguments, kill_after, log):
    """Run ``train`` in a child that is killed after some seconds, or never; return its exit code."""
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 1
        try:
            code = call(train, *arguments)
        except Exception:  # noqa: BLE001  the child must not come back into the test
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def held_eps(path, run):
    """What the ledger counts for a run."""
    held = Ledger(path).queries()
    assert {entry.query.run for entry in held} <= {str(run.path.resolve())}
    mechanisms = [entry.query.mechanism for entry in held]
    return composed(mechanisms, delta=1e-4).eps if mechanisms else 0.0


def check_whole(run, ledger_path):
    """Every file is whole, and the ledger counts at least the steps that left something behind."""
    ledger = Ledger(ledger_path)
    ledger.verify()
    if not run.config_path.is_file():
        return
    OmegaConf.load(run.config_path)
    checkpoints = newest_first(run.checkpoints_dir)
    for path in checkpoints:
        SafeCheckpointIO().load_checkpoint(path)
    taken = read_progress(run.checkpoints_dir).steps
    assert all(int(path.stem[5:]) <= taken + 2 for path in checkpoints)
    if not run.privacy_path.is_file():
        assert taken == 0
        return
    statement = json.loads(run.privacy_path.read_text())
    plan = PrivacyPlan(
        **{
            name: statement[name]
            for name in ("delta", "max_grad_norm", "batch_size", "num_examples", "noise_multiplier")
        },
        eps=statement["eps_planned"],
        steps=STEPS,
    )
    truth = plan.epsilon(max([taken, *(int(path.stem[5:]) for path in checkpoints)]))
    assert statement["eps"] >= truth
    assert held_eps(ledger_path, run) >= truth


def test_fifty_kills(repeatable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger_path = tmp_path / "ledger.jsonl"
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    begun = time.monotonic()
    log = tmp_path / "log"
    arguments = [*SMALL, f"run_dir={whole.path}", f"ledger.path={tmp_path / 'other'}"]
    code = attempt(arguments, None, log)
    assert code == 0, log.read_text()
    duration = time.monotonic() - begun

    rng, kills = random.Random(time.time_ns()), 0
    while not killed.has_model():
        resumed = killed.config_path.is_file()
        arguments = (
            [f"run={killed.path}", "resume=true"]
            if resumed
            else [*SMALL, f"run_dir={killed.path}", f"ledger.path={ledger_path}"]
        )
        kill_after = rng.uniform(0, duration / 2) if kills < KILLS else None
        code = attempt(arguments, kill_after, log)
        assert code == (0 if kill_after is None else -signal.SIGKILL) or killed.has_model(), (
            log.read_text()
        )
        kills += kill_after is not None
        check_whole(killed, ledger_path)

    assert killed.statement()["status"] == "finished"
    assert held_eps(ledger_path, killed) == pytest.approx(killed.statement()["eps"])
    weights = [
        load_file(run.model_dir / "diffusion_pytorch_model.safetensors") for run in (whole, killed)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    print(f"{kills} kills", file=sys.stderr)
