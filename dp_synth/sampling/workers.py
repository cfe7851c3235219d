"""The processes that share the drawing of a data set: which one this is, and how more are started.

They agree through the data set's staging folder alone, so that nothing here connects them.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from omegaconf import DictConfig

from dp_synth.checks import count, whole
from dp_synth.errors import UserError

# Variables that say a process's number on its machine, and how many there are on all of them.
_STARTERS = (
    ("LOCAL_RANK", "WORLD_SIZE"),  # torchrun and Lightning
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),  # mpirun
    ("SLURM_LOCALID", "SLURM_NTASKS"),  # srun
)

_INTERRUPTED = 130


@dataclass(frozen=True)
class Worker:
    """One of the processes that may share the work.

    Attributes:
        number: its number on this machine, from 0: which GPU it takes.
        is_one_of_several: whether somebody else has started others beside it.
    """

    number: int
    is_one_of_several: bool

    @property
    def device(self) -> torch.device:
        """A GPU of its own, as far as there are any; else the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.number % torch.cuda.device_count())


def this_worker(cfg: DictConfig, environment: Mapping[str, str] = os.environ) -> Worker:
    """Which worker this process is.

    Args:
        cfg: ``worker``, a number that tells the jobs of a sweep apart, and ``devices``.
        environment: the variables that those who start processes set.

    Raises:
        UserError: a value out of range, several processes without an agreed ``out``, or more to be
            started by one of several.
    """
    count("devices", cfg.devices)
    worker = _worker(cfg.worker, environment)
    if worker.is_one_of_several and cfg.out is None:
        raise UserError(
            "Several processes share the work, which need out=DIR: without it one that starts late "
            "would begin a data set of its own."
        )
    if worker.is_one_of_several and cfg.devices > 1:
        raise UserError(
            f"devices={cfg.devices} starts processes, but this is one of several already; leave "
            "devices out."
        )
    return worker


def _worker(number: int | None, environment: Mapping[str, str]) -> Worker:
    if number is not None:
        return Worker(whole("worker", number), is_one_of_several=True)
    for local_number, total in _STARTERS:
        if local_number in environment and int(environment.get(total, 1)) > 1:
            return Worker(int(environment[local_number]), is_one_of_several=True)
    return Worker(0, is_one_of_several=False)


@contextmanager
def helpers(devices: int, work: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """Start ``devices - 1`` processes that do the same work as this one, on a machine's other GPUs.

    Without GPUs they divide this process's threads. A process that dies leaves its part to the
    others.

    Args:
        devices: how many processes there are, this one included.
        work: a function of a module, called as ``work(*arguments, Worker)``.
        arguments: what can be sent to another process.
    """
    if devices > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // devices))
    threads = torch.get_num_threads()
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=_help, args=(work, arguments, number, threads), daemon=True)
        for number in range(1, devices)
    ]
    for process in started:
        process.start()
    try:
        yield
        _join(started)
    finally:
        for process in started:
            process.kill()  # nothing is lost: see the staging folder


def _join(started: list[SpawnProcess]) -> None:
    for process in started:
        process.join()
    if ended := [process.exitcode for process in started if process.exitcode != 0]:
        print(
            f"Warning: {len(ended)} of {len(started) + 1} processes ended early (exit code "
            f"{ended[0]}); the others did their part.",
            file=sys.stderr,
        )


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _help(work: Callable[..., Any], arguments: tuple[Any, ...], number: int, threads: int) -> None:
    """What a started process does; it ends when the one that started it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        work(*arguments, Worker(number, is_one_of_several=True))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
