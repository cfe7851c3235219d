"""The gate: what leaves a private phase passes through here, and nothing else does.

While a private phase runs, only three things come out of it: what is drawn on the ``screen`` (steps,
eps, fixed words), checkpoints cut down to ``declared`` fields, and errors as ``_told_in_public``
words them. Loggers are connected to none of it: they read the finished run directory, by name
(``dp_synth.loggers.record``).
"""

import contextlib
import ctypes
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

from dp_synth.data.journal import open_private
from dp_synth.errors import UserError

T = TypeVar("T")

# Of Lightning's checkpoint. Its loops hold counts of batches taken, which are counts of steps.
_CHECKPOINT = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "state_dict",
    "ema",
    "optimizer_states",
    "lr_schedulers",
    "loops",
    "callbacks",
)
_CALLBACKS = ("PrivacyEngineCallback", "CanaryCallback")

_screen: TextIO | None = None  # while a gate is shut


class Withheld(RuntimeError):
    """A private phase failed, and what went wrong may tell of private images: it is not said."""


class StepFault(RuntimeError):
    """A fault that is told by numbers of steps alone, so that its words pass the gate."""


def screen() -> TextIO:
    """Where a private phase shows what is public: standard error, past the gate.

    Whatever is written here leaves. Only words that are fixed and numbers that follow from the plan
    and the step number may be: no loss, no norm, no batch size, no time.
    """
    return _screen or sys.stderr


def silently(work: Callable[[], T], local_dir: Path | None = None) -> T:
    """Do private work; nothing that it prints, logs, warns of or fails with leaves.

    Python's and C's standard output and standard error, those of child processes, logging of every
    level and warnings lead nowhere meanwhile, in all threads of the process; ``screen`` alone stays.
    Not stopped is code that means to leak: that writes on the screen, to files or sockets of its
    own, or to a terminal or notebook stream that it kept from before; and threads that outlive the
    work.

    Args:
        work: the private phase.
        local_dir: a folder that stays where it is (made, mode 0700): ``error.txt`` in it says what
            went wrong, with its traceback. None keeps nothing.

    Returns:
        What the work returns.

    Raises:
        UserError: the work's own; or, in fixed words, that memory or disk gave out.
        StepFault: the work's own.
        Withheld: any other error, by the name of its type alone.
        BaseException: what is no error (Ctrl-C, exit), without its words; an exit code is 1.
    """
    with _muted():
        try:
            return work()
        except BaseException as error:  # noqa: BLE001  whatever it is, it says no more
            failure = _told_in_public(error, local_dir)
    # Here, outside of any handler: no cause, no context and no frame of the work comes along, which
    # HYDRA_FULL_ERROR=1 would print, and notebooks with all their variables.
    raise failure.with_traceback(None)


def declared(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a checkpoint that are public, or follow from noised gradients alone.

    Weights, their average, the optimizer's moments, counts of steps, the plan and its accountant.
    What else a callback or library adds is left out; so is the state of any other callback.
    """
    kept = {key: checkpoint[key] for key in _CHECKPOINT if key in checkpoint}
    callbacks = checkpoint.get("callbacks", {})
    return kept | {"callbacks": {key: callbacks[key] for key in _CALLBACKS if key in callbacks}}


# ------------------------------------------------------------------------------------------ errors


def _told_in_public(error: BaseException, local_dir: Path | None) -> BaseException:
    """An exception that says no more of an error than may be known."""
    if isinstance(error, UserError | StepFault):
        error.__cause__ = error.__context__ = None
        return error
    if not isinstance(error, Exception):
        error.args, error.__cause__, error.__context__ = (), None, None
        if isinstance(error, SystemExit):
            error.code = 1
        return error
    details = _keep(error, local_dir)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return UserError(
            f"Memory ran out in a step of private training; {details}; a smaller "
            "trainer.memory_mib, trainer.micro_batch_size or privacy.batch_size would work."
        )
    if isinstance(error, OSError) and error.errno is not None and error.errno in errno.errorcode:
        reason = os.strerror(error.errno)
        return UserError(f"{reason}: private training stopped; {details}.")
    return Withheld(f"private training failed with {type(error).__name__}; {details}")


def _keep(error: Exception, local_dir: Path | None) -> str:
    """Write what went wrong where it stays; say in words where that is."""
    if local_dir is None:
        return "details are not kept, since they may tell of private images"
    path = local_dir / "error.txt"
    try:
        make_local(local_dir)
        with open_private(path, "wb") as file:
            file.write(b"PRIVATE: may tell of single images; not for release.\n\n")
            file.write("".join(traceback.format_exception(error)).encode(errors="replace"))
    except OSError:
        return f"details could not be written to {path}"
    return f"details, which may tell of private images, are in {path}"


def make_local(directory: Path) -> None:
    """Make the folder of a run that nobody else may read and that is no part of a release."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.chmod(0o700)


# ------------------------------------------------------------------------------------------ output


@contextmanager
def _muted() -> Iterator[None]:
    """All output of the process leads nowhere, but what is written on the screen."""
    with (
        open(os.devnull, "w") as nowhere,
        _screen_kept(),
        _descriptors_redirected(nowhere.fileno()),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        _logging_disabled(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        # For code that turns its warnings on again; where they go may be a file.
        warnings.showwarning = _say_nothing
        yield


@contextmanager
def _screen_kept() -> Iterator[None]:
    """Keep a way to what is standard error now."""
    global _screen
    before = _screen
    with contextlib.ExitStack() as stack:
        if before is None and _descriptor(sys.stderr) == 2:
            # The descriptor is about to lead nowhere; a copy of it does not.
            _screen = stack.enter_context(
                open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding)
            )
        elif before is None:  # a notebook's, or a test's
            _screen = sys.stderr
        try:
            yield
        finally:
            _screen = before


@contextmanager
def _descriptors_redirected(target: int) -> Iterator[None]:
    """Standard output and standard error lead to ``target``, for C libraries and children, too."""
    _flush()  # what was said before is heard
    copies = {number: os.dup(number) for number in (1, 2)}
    for number in copies:
        os.dup2(target, number)
    try:
        yield
    finally:
        _flush()  # what waits in a buffer goes where the rest went, and does not come out later
        for number, copy in copies.items():
            os.dup2(copy, number)
            os.close(copy)


@contextmanager
def _logging_disabled() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(sys.maxsize)
    try:
        yield
    finally:
        logging.disable(before)


def _descriptor(stream: TextIO | None) -> int | None:
    try:
        return stream.fileno() if stream is not None else None
    except (AttributeError, OSError, ValueError):  # not of the system's: a notebook's, a test's
        return None


def _flush() -> None:
    """Empty the buffers of Python's streams and of C's."""
    for stream in {sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__}:
        if stream is not None:
            with contextlib.suppress(ValueError):  # closed
                stream.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of ``warnings.showwarning``."""
