"""Nothing that leaves a private phase depends on a single image; planted leaks are stopped."""

import ctypes
import datetime
import errno
import io
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import types
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm.std
from conftest import Outcome, Recorder, files_below, tiny_images, tiny_module, weights_of
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.callbacks import Callback
from PIL import Image
from tqdm import tqdm as Bar

from dp_synth import fitting, module, train
from dp_synth.checkpoints import PeriodicCheckpoint, newest_first
from dp_synth.data.pixels import to_float
from dp_synth.errors import UserError
from dp_synth.fitting import fit
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.randomness import RepeatablePrivateRandomness
from dp_synth.privacy.silence import StepFault, Withheld, screen, silently

SECRET = "secret 271828"
N, STEPS, SIDE = 11, 3, 8
PLAN = PrivacyPlan(
    eps=10,
    delta=1e-2,
    max_grad_norm=0.5,
    batch_size=5,
    steps=STEPS,
    num_examples=N,
    multiplicity=2,
    accountant="rdp",
    noise_multiplier=0.7,
    unsafe_repeatable_randomness=7,
)
WEIGHTS = ("state_dict", "ema", "optimizer_states")


# --------------------------------------------------------------- the program, on neighbouring data

COMMAND = (
    *("experiment=smoke", "sampler=none", "evaluator=none", "public=none"),
    *("dataset=image_folder", "dataset.name=mine", "dataset.root=data", "run_dir=run"),
    *("dataset.on_error=skip", "dataset.test_fraction=0", f"dataset.resolution={SIDE}"),
    *("model.network.block_out_channels=[8,8]", "model.network.attention_head_dim=8"),
    "model.network.down_block_types=[DownBlock2D,DownBlock2D]",
    "model.network.up_block_types=[UpBlock2D,UpBlock2D]",
    *("privacy.batch_size=5", f"privacy.steps={STEPS}", "privacy.unsafe_repeatable_randomness=7"),
)
UNIT = Path("data/a/04.png")  # the one in which neighbours differ; in the first batch


@dataclass
class Told:
    """All that a run of the command left: what it said, what it failed with, its files."""

    outcome: Outcome
    error: str
    files: dict[str, bytes]

    def public(self):
        """What may not depend on the unit: all but weights, private pixels and local files."""
        private = re.compile(
            r"run/(model|local)/.*|run/checkpoints/.*\.ckpt|(cache/images|data)/.*"
        )
        sizes = {name: len(data) for name, data in self.files.items() if name.endswith(".ckpt")}
        public = {name: d for name, d in self.files.items() if not private.fullmatch(name)}
        return self.outcome, self.error, public, sizes

    def weights(self):
        return {name: data for name, data in self.files.items() if name.endswith(".safetensors")}


class FixedDate(datetime.datetime):
    """It is always the same moment."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 2, 29, 12, tzinfo=tz)


@pytest.fixture
def tell(command, tmp_path, monkeypatch):
    """A function from a way to write the unit's image to what the program tells; same paths.

    The clock stands still; an image that is white all over has a gradient that is not finite.
    """
    for name in ("time", "time_ns", "monotonic", "monotonic_ns"):
        monkeypatch.setattr(time, name, lambda kind=float if "ns" not in name else int: kind(10**9))
    for name, loaded in list(sys.modules.items()):
        if name.startswith("dp_synth") and vars(loaded).get("datetime") is datetime.datetime:
            monkeypatch.setattr(loaded, "datetime", FixedDate)
    for variable in ("CACHE", "STATE"):
        monkeypatch.setenv(f"DP_SYNTH_{variable}", str(tmp_path / variable.lower()))
    monkeypatch.setattr(module, "to_float", broken_where_white)

    def run(write):
        for number in range(N):
            path = Path("data") / "ab"[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            paint(path, np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3)))
        write(UNIT)
        error = ""
        try:
            outcome = command(train, *COMMAND)
        except Withheld:
            error, outcome = traceback.format_exc(), None
        told = Told(outcome, error, files_below(tmp_path))
        for part in tmp_path.iterdir():
            shutil.rmtree(part)
        return told

    return run


def paint(path, pixels):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def broken_where_white(pixels):
    x = to_float(pixels)
    x[(pixels == 255).flatten(1).all(1)] = float("nan")
    return x


def as_it_is(path):
    pass


def blank(path):
    paint(path, np.zeros((SIDE, SIDE, 3)))


def not_finite(path):
    paint(path, np.full((SIDE, SIDE, 3), 255))


def unreadable(path):
    path.write_bytes(b"no image")


def test_neighbouring_data_are_told_of_in_the_same_bytes(tell):
    """Logs, stdout, stderr, config, statement, report, ledger; and weights alone are unlike."""
    whole = tell(as_it_is)
    assert whole.outcome.code == 0 and whole.error == ""
    assert {"run/config.yaml", "run/privacy.json", "run/logs/metrics.csv"} <= set(whole.files)
    for write in (blank, not_finite, unreadable):
        other = tell(write)
        assert other.public() == whole.public(), write.__name__
        assert other.weights() != whole.weights(), "the unit takes part"
        weights = torch.load(io.BytesIO(other.files[f"run/checkpoints/step={STEPS:06d}.ckpt"]))
        assert all(tensor.isfinite().all() for tensor in weights["state_dict"].values())
    # A bar: steps and eps, and no time or rate.
    *_, bar = whole.outcome.err.rstrip().splitlines()
    for shown in filter(None, bar.split("\r")):
        pattern = rf"fine-tuning: +\d+%\|.{{10}}\| \d/{STEPS} steps(, eps spent \d+\.\d\d)?"
        assert re.fullmatch(pattern, shown)


def test_neighbouring_data_fail_in_the_same_words(tell, monkeypatch):
    """Where the error itself names the batch's shape and an image's brightness."""

    class Raise(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError(f"{SECRET} {batch.pixels.shape} {batch.pixels.sum()}")

    plant(monkeypatch, Raise)
    told = [tell(write) for write in (as_it_is, blank)]
    assert "Withheld: private training failed with RuntimeError" in told[0].error
    assert all(each.public() == told[0].public() for each in told)
    details = [each.files["run/local/error.txt"] for each in told]
    assert all(SECRET.encode() in text and b"Traceback" in text for text in details)
    assert details[0] != details[1]


def test_full_tracebacks_of_mistakes_do_not_open_the_gate(tmp_path, monkeypatch, capfd):
    class Mistake(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            try:
                raise RuntimeError(SECRET)
            except RuntimeError as error:
                raise UserError("A sentence.") from error

    plant(monkeypatch, Mistake)
    monkeypatch.chdir(tmp_path)
    for number in range(N):
        path = Path("data") / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blank(path)
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [train.__file__, *COMMAND])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError, match="A sentence") as caught:
        train.main()
    GlobalHydra.instance().clear()
    text = "".join(traceback.format_exception(caught.value))
    assert "Traceback" in text and SECRET not in text + "".join(capfd.readouterr())


# ------------------------------------------------------------------------------- planted callbacks


def plant(monkeypatch, *leaks):
    """Have callbacks among those of every private phase."""
    callbacks = PrivacyPlan.callbacks
    monkeypatch.setattr(
        PrivacyPlan, "callbacks", lambda *args: [*callbacks(*args), *(leak() for leak in leaks)]
    )


class Leak(Callback):
    """Says what must not be known by every way that a callback has, at every moment it has."""

    def say(self, trainer, pl_module):
        print(SECRET)
        print(SECRET, file=sys.stderr)
        os.write(1, SECRET.encode())
        os.write(2, SECRET.encode())
        warnings.warn(f"a norm of {SECRET}", stacklevel=1)
        logging.getLogger("lightning.pytorch").critical(SECRET)
        logging.getLogger("dp_synth").warning(SECRET)
        trainer.logger.log_metrics({SECRET: 1.0})

    def setup(self, trainer, pl_module, stage):
        self.say(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log(SECRET, float(len(batch.indices)), on_epoch=True, prog_bar=True)
        self.say(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self.say(trainer, pl_module)

    def state_dict(self):
        return {"a field": SECRET}

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["another field"] = SECRET


@pytest.fixture
def spoken(trainer_cfg, capfd, caplog, recwarn, tmp_path, monkeypatch):
    """A function that trains with the leak planted, and returns all that is said and kept."""
    plant(monkeypatch, Leak)

    def speak():
        for heard in (capfd.readouterr, caplog.clear, recwarn.clear):
            heard()
        train_tiny(trainer_cfg, checkpoints=PeriodicCheckpoint(tmp_path / "checkpoints", every=1))
        said = [*capfd.readouterr(), *caplog.messages, *(str(w.message) for w in recwarn)]
        kept = [torch.load(path) for path in newest_first(tmp_path / "checkpoints")]
        return "\n".join(said), repr(kept)

    return speak


def train_tiny(
    trainer_cfg, plan=PLAN, *, optimizer=Recorder, randomness=None, images=None, **options
):
    built = tiny_module(plan, optimizer=optimizer, randomness=randomness)
    fit(built, images or tiny_images(N), plan, trainer_cfg, caption="fit", **options)
    return built


def test_what_callbacks_say_is_stopped(spoken):
    said, kept = spoken()
    assert SECRET not in said and SECRET not in kept
    assert f"{STEPS}/{STEPS} steps, eps spent" in said


@pytest.mark.parametrize("gate", ["silently", "declared"])
def test_without_the_gate_they_are_heard(spoken, monkeypatch, gate):
    """So that silence above means something."""
    monkeypatch.setattr(fitting, gate, {"silently": lambda f, _: f(), "declared": dict}[gate])
    said, kept = spoken()
    assert (SECRET in said, SECRET in kept) == (gate == "silently", gate == "declared")


class Chosen(RepeatablePrivateRandomness):
    """Lets exactly the first so many units into every batch."""

    def __init__(self, units):
        super().__init__(7)
        self.units = units

    def selection(self, step, num_units):
        return (np.arange(num_units) >= self.units).astype(float)


def test_beside_weights_a_checkpoint_follows_the_number_of_steps_alone(trainer_cfg, tmp_path):
    kept, sizes = [], []
    for units in (0, 1, N):
        directory = tmp_path / str(units)
        trainer_cfg.max_time = "00:01:00:00"
        checkpoints = PeriodicCheckpoint(directory, every=1)
        train_tiny(trainer_cfg, randomness=Chosen(units), checkpoints=checkpoints)
        sizes.append([path.stat().st_size for path in newest_first(directory)])
        loaded = [torch.load(path) for path in newest_first(directory)]
        kept.append([{k: v for k, v in each.items() if k not in WEIGHTS} for each in loaded])
    assert kept[0] == kept[1] == kept[2] and sizes[0] == sizes[1] == sizes[2]
    assert set(kept[0][0]["callbacks"]) == {"PrivacyEngineCallback"}


def test_which_steps_the_bar_shows_does_not_follow_the_clock(trainer_cfg, capfd, monkeypatch):
    said = []
    for seed in (0, 1):
        ticks = np.random.default_rng(seed).exponential(20, 10_000).cumsum()
        monkeypatch.setattr(tqdm.std, "time", iter(ticks.tolist()).__next__)
        train_tiny(trainer_cfg)
        said.append(capfd.readouterr().err)
    assert said[0] == said[1] and all(f"{n}/{STEPS} steps" in said[0] for n in range(STEPS + 1))


# ---------------------------------------------------------------------------------------- the gate


def by_thread():
    def fail():
        raise ValueError(SECRET)

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


def by_insisting_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(SECRET, stacklevel=1)


def by_logging():
    logger = logging.getLogger("anybody")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    logger.critical(SECRET)
    logger.removeHandler(handler)


WAYS = {
    "print": lambda: print(SECRET),
    "stderr": lambda: print(SECRET, file=sys.stderr),
    "descriptor 1": lambda: os.write(1, SECRET.encode()),
    "descriptor 2": lambda: os.write(2, SECRET.encode()),
    "C's buffer": lambda: ctypes.CDLL(None).printf(SECRET.encode()),
    "a child": lambda: os.system(f"echo {SECRET}; echo {SECRET} >&2"),
    "a bar": lambda: Bar(desc=SECRET).close(),
    "a warning": lambda: warnings.warn(SECRET, stacklevel=1),
    "a warning that insists": by_insisting_warning,
    "logging": by_logging,
    "a level above all": lambda: logging.getLogger("x").log(99, SECRET),
    "a thread": by_thread,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_out_is_shut_meanwhile_and_open_before_and_after(way, capfd, caplog, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # not pytest's
    monkeypatch.setattr(
        warnings, "showwarning", lambda message, *a, **k: print(message, file=sys.stderr)
    )

    def heard():
        ctypes.CDLL(None).fflush(None)
        said = "".join(capfd.readouterr()) + "".join(caplog.messages)
        caplog.clear()
        return SECRET in said

    WAYS[way]()
    assert heard()
    assert silently(lambda: [WAYS[way](), 7][1]) == 7
    assert not heard()
    WAYS[way]()
    assert heard()


def test_the_processes_own_streams():
    """A process of its own, since pytest's streams are not the system's."""
    script = f"""
        import ctypes, os, sys, dp_synth
        from dp_synth.privacy.silence import screen, silently

        def work():
            for stream in kept:
                stream.write("{SECRET}")
            ctypes.CDLL(None).printf(b"{SECRET}")
            os.write(1, b"{SECRET}")
            os.system("echo {SECRET} >&2")
            print("shown", file=screen())
            raise ValueError("{SECRET}")

        kept = [sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__]
        print("before")
        try:
            silently(work)
        finally:
            print("after")
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(train.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "before\nafter\n")
    assert ended.stderr.startswith("shown\nTraceback")
    assert "Withheld: private training failed with ValueError" in ended.stderr
    assert SECRET not in ended.stderr.replace(f'"{SECRET}"', "")


def fails(error):
    """Work that fails with an error, on its way from another."""

    def work():
        try:
            raise KeyError(SECRET)
        except KeyError as cause:
            raise error from cause

    return work


@pytest.mark.parametrize(
    ("error", "type_told", "told"),
    [
        (ValueError(SECRET), Withheld, "failed with ValueError"),
        (ExceptionGroup(SECRET, [ValueError(SECRET)]), Withheld, "failed with ExceptionGroup"),
        (UserError("A sentence."), UserError, "^A sentence.$"),
        (StepFault("3 steps"), StepFault, "^3 steps$"),
        (KeyboardInterrupt(SECRET), KeyboardInterrupt, "^$"),
        (SystemExit(SECRET), SystemExit, "^$"),
        (SystemExit(271828), SystemExit, "^$"),
        (MemoryError(SECRET), UserError, "Memory ran out .* would work.$"),
        (torch.OutOfMemoryError(SECRET), UserError, "Memory ran out .* would work.$"),
        (OSError(errno.ENOSPC, SECRET, SECRET), UserError, "^No space left on device: .*txt.$"),
        (OSError(271828, SECRET), Withheld, "failed with OSError"),
        (OSError(SECRET), Withheld, "failed with OSError"),
    ],
)
def test_what_an_error_may_say(error, type_told, told, tmp_path):
    with pytest.raises(BaseException) as caught:
        silently(fails(error), tmp_path / "local")
    assert type(caught.value) is type_told and re.search(told, str(caught.value))
    text = "".join(traceback.format_exception(caught.value))
    assert SECRET not in text and "271828" not in text and "KeyError" not in text
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 1
    if type_told is Withheld:
        kept = tmp_path / "local" / "error.txt"
        assert SECRET in kept.read_text() and str(kept) in str(caught.value)
        assert kept.read_text().startswith("PRIVATE")
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def test_an_error_that_cannot_be_kept_is_withheld_all_the_same(tmp_path):
    (tmp_path / "local").write_text("a file in its place")
    with pytest.raises(Withheld, match="could not be written") as caught:
        silently(fails(ValueError(SECRET)), tmp_path / "local")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_everything_is_as_it_was_afterwards(tmp_path):
    def state():
        streams = sys.stdout, sys.stderr, screen()
        hooks = warnings.showwarning, list(warnings.filters), logging.root.manager.disable
        return streams, hooks, len(os.listdir("/proc/self/fd")) if Path("/proc").exists() else 0

    before = state()
    silently(lambda: silently(lambda: None))
    with pytest.raises(Withheld):
        silently(fails(ValueError(SECRET)))
    assert state() == before


def test_inside_another_gate_the_screen_is_the_outer_one(capfd):
    silently(lambda: silently(lambda: print("shown", file=screen())))
    assert "shown" in capfd.readouterr().err


# --------------------------------------------------------------------------------- diagnostics


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("engine", ["auto", "loop", "opacus"])
def test_diagnostics_change_no_bit_and_say_nothing(engine, trainer_cfg, tmp_path, capfd):
    plan = replace(PLAN, engine=engine, multiplicity=1)
    without = train_tiny(trainer_cfg, plan, optimizer=sgd)
    said = capfd.readouterr()
    watched = train_tiny(
        trainer_cfg, plan, optimizer=sgd, local_dir=tmp_path / "local", diagnostics=True
    )
    assert capfd.readouterr() == said
    assert torch.equal(weights_of(without.net), weights_of(watched.net))
    assert type(watched.engine) is type(without.engine)
    file = tmp_path / "local" / "diagnostics.csv"
    assert file.read_text().startswith("# PRIVATE")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


class Growing(RepeatablePrivateRandomness):
    """No unit is in the first batch, one in the second, two in the third, ..."""

    def selection(self, step, num_units):
        return (np.arange(num_units) >= step).astype(float)


@pytest.mark.parametrize("micro_batch_size", [None, 3, 1])
def test_diagnostics_are_what_autograd_finds(micro_batch_size, trainer_cfg, tmp_path):
    """By hand, one example at a time; a rate of 0 leaves the weights alone."""
    plan = replace(PLAN, max_grad_norm=2.3, steps=5)
    trainer_cfg.micro_batch_size = micro_batch_size
    options = {"randomness": Growing(7), "local_dir": tmp_path, "diagnostics": True}
    built = train_tiny(trainer_cfg, plan, **options)
    first, *rows = diagnosed(tmp_path)
    assert list(first.values()) == ["1", "0"] + 6 * [""]
    for step, row in enumerate(rows, 1):
        losses, norms = by_hand(built, tiny_images(N), step, range(step))
        assert (int(row["step"]), int(row["batch_size"])) == (step + 1, step)
        expected = {
            "loss": np.mean(losses),
            "clipped_fraction": np.mean(np.array(norms) > plan.max_grad_norm),
            "norm_mean": np.mean(norms),
            "norm_median": sorted(norms)[(len(norms) - 1) // 2],
            "norm_max": max(norms),
            "not_finite": 0,
        }
        assert {k: float(row[k]) for k in expected} == pytest.approx(expected, rel=1e-3)
    assert 0 < float(rows[-1]["clipped_fraction"]) < 1


def test_diagnostics_count_what_is_not_finite(trainer_cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "to_float", broken_where_white)
    white = replace(tiny_images(N), pixels=np.full((N, 4, 4, 1), 255, dtype=np.uint8))
    options = {"images": white, "local_dir": tmp_path, "diagnostics": True}
    train_tiny(trainer_cfg, randomness=Growing(7), **options)
    assert [list(row.values())[1:] for row in diagnosed(tmp_path)[1:]] == [
        ["1", "", "", "", "", "", "1"],
        ["2", "", "", "", "", "", "2"],
    ]


def diagnosed(directory):
    _, header, *lines = (directory / "diagnostics.csv").read_text().splitlines()
    return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]


def by_hand(built, images, step, units):
    """Each example's mean loss, and the norm of its gradient."""
    losses, norms = [], []
    for unit in units:
        pixels = torch.from_numpy(images.pixels[[unit]]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(images.labels[[unit]])
        batch = types.SimpleNamespace(
            indices=torch.tensor([unit]), pixels=pixels, labels=labels, counts=None
        )
        rows = built.draw_rows(batch, step)
        loss = built.diffusion.row_loss(built.net)(*rows).mean()
        gradient = torch.autograd.grad(loss, list(built.net.parameters()))
        losses.append(loss.item())
        norms.append(torch.cat([part.flatten() for part in gradient]).double().norm().item())
    return losses, norms


def test_a_resumed_run_adds_to_its_diagnostics(trainer_cfg, tmp_path):
    options = {"local_dir": tmp_path / "local", "diagnostics": True}
    train_tiny(trainer_cfg, checkpoints=PeriodicCheckpoint(tmp_path / "c", every=2), **options)
    first = (tmp_path / "local" / "diagnostics.csv").read_text()
    start = newest_first(tmp_path / "c")[1]
    train_tiny(trainer_cfg, resume_from=start, **options)
    again = (tmp_path / "local" / "diagnostics.csv").read_text()
    assert again == first + first.splitlines(keepends=True)[-1]


def test_diagnostics_need_a_place(trainer_cfg):
    with pytest.raises(ValueError, match="local_dir"):
        train_tiny(trainer_cfg, diagnostics=True)
