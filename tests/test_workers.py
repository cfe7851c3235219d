"""The processes that share the work: who they are, and that those which are started take part."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import compose, refusal

from dp_synth.sampling.workers import Worker, helpers, this_worker

ALONE = Worker(0, is_one_of_several=False)


def worker_of(*typed, **environment):
    return this_worker(compose("run=r", *typed, name="sample"), environment)


def test_a_process_that_nobody_says_anything_of_is_alone():
    assert worker_of() == ALONE
    assert worker_of("devices=3") == ALONE


@pytest.mark.parametrize(
    "environment",
    [
        {"LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        {"SLURM_LOCALID": "1", "SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        {"LOCAL_RANK": "1", "WORLD_SIZE": "4", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"},
    ],
)
def test_those_who_start_processes_say_which_one_it_is(environment):
    assert worker_of("out=o", **environment) == Worker(1, is_one_of_several=True)


@pytest.mark.parametrize(
    "environment",
    [{"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}],
)
def test_a_job_of_one_process_is_alone(environment):
    assert worker_of(**environment) == ALONE


def test_jobs_of_a_sweep_have_a_number():
    assert worker_of("worker=3", "out=o") == Worker(3, is_one_of_several=True)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (("worker=1",), "out=DIR"),
        (("worker=1", "out=o", "devices=2"), "devices=2"),
        (("devices=0",), "devices=0"),
        (("worker=-1", "out=o"), "worker=-1"),
        (("worker=a", "out=o"), "worker='a'"),
    ],
)
def test_what_makes_no_sense_is_refused(typed, words):
    cfg = compose("run=r", *typed, name="sample")
    assert words in refusal(this_worker, cfg, {})


def test_each_takes_a_gpu_of_its_own(monkeypatch):
    assert Worker(5, True).device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = [Worker(number, True).device for number in range(4)]
    assert devices == [torch.device("cuda", k) for k in (0, 1, 0, 1)]


def note(directory, worker):
    """What a started process does in these tests."""
    (directory / f"{worker.number}-{worker.is_one_of_several}").touch()


def fail(directory, worker):
    from dp_synth.errors import UserError

    raise UserError("it cannot.")


def test_processes_are_started_and_waited_for(tmp_path, capfd):
    threads = torch.get_num_threads()
    with helpers(3, note, tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"1-True", "2-True"}
    assert capfd.readouterr().err == ""
    torch.set_num_threads(threads)


def test_one_process_needs_no_other(tmp_path):
    with helpers(1, note, tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_process_that_fails_is_told_of_and_ends_nothing(tmp_path, capfd):
    with helpers(2, fail, tmp_path):
        pass
    said = capfd.readouterr().err
    assert "it cannot." in said and "Traceback" not in said
    assert "1 of 2 processes ended early (exit code 2)" in said


HANGS = """
import sys, time
import dp_synth
from dp_synth.sampling.workers import helpers

def hang(path, worker):
    with open(path, "w") as file:
        import os
        file.write(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    with helpers(2, hang, sys.argv[1]):
        pass
"""


def test_started_processes_end_when_the_one_that_started_them_is_killed(tmp_path):
    script, told = tmp_path / "hangs.py", tmp_path / "pid"
    script.write_text(HANGS)
    parent = subprocess.Popen([sys.executable, script, told])
    wait_for(lambda: told.is_file() and told.read_text())
    pid = int(told.read_text())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not runs(pid))


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
