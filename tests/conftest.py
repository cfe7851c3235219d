"""Shared by the tests of the assembled program: tiny objects, commands in this process, one run."""

import contextlib
import importlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dp_synth.cli import conf_dir
from dp_synth.data.images import Images
from dp_synth.diffusion import Diffusion
from dp_synth.errors import UserError
from dp_synth.module import DiffusionModule
from dp_synth.networks import unet
from dp_synth.runs import Run, default_run_dir
from dp_synth.timestep_law import TimestepLaw

torch.set_num_threads(1)

# dp_accounting brings absl, whose log handler keeps the stderr of the moment it is imported, and
# closes it when Hydra sets up logging: it must not be one of pytest's, which more tests will need.
with contextlib.redirect_stderr(sys.__stderr__), contextlib.suppress(ImportError):
    importlib.import_module("absl.logging")

# A whole run in seconds: what `experiment=smoke` leaves, minus what a test does not look at.
SHORT = ("experiment=smoke", "sampler=none", "evaluator=none")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Public models are trained once per test session, and never found from an earlier one."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DP_SYNTH_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory):
    """The privacy ledger of a test session is its own, and never the user's."""
    directory = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DP_SYNTH_STATE", str(directory))
        yield directory


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def call(module, *arguments):
    """Run a command's ``main`` with a command line; return its exit code and what it wants said."""
    GlobalHydra.instance().clear()
    # A command sets it for itself; the next one in this process would take it for the user's wish.
    os.environ.pop("HYDRA_FULL_ERROR", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        try:
            module.main()
        except SystemExit as end:
            if isinstance(end.code, str):  # what Python itself does with a message
                print(end.code, file=sys.stderr)
                return 1
            return end.code or 0
        finally:
            GlobalHydra.instance().clear()
    return 0


@pytest.fixture
def command(capfd, tmp_path, monkeypatch):
    """A function (module, *arguments) -> Outcome that runs a command in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments):
        capfd.readouterr()
        code = call(module, *arguments)
        return Outcome(code, *capfd.readouterr())

    return run


def refusal(call, *arguments, **options):
    """The one sentence that a call is refused with."""
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    message = str(error.value)
    assert message.isprintable() and message.endswith(".")
    return message


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A finished smoke run; tests must not change what is in it."""
    from dp_synth import train

    directory = tmp_path_factory.mktemp("finished") / "run"
    overrides = ("public.load.num_images=600", "trainer.checkpoint_every=1")
    assert call(train, "experiment=smoke", *overrides, f"run_dir={directory}") == 0
    return Run(directory)


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished_run.path, tmp_path / "run")
    return Run(tmp_path / "run")


def compose(*overrides, name="train"):
    """The config of a command line, without running anything."""
    OmegaConf.register_new_resolver("run_dir", default_run_dir, replace=True, use_cache=True)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose(name, overrides=list(overrides))


@pytest.fixture
def trainer_cfg():
    """The ``trainer`` group as the default has it."""
    return compose().trainer


def tiny_net(seed=0, num_classes=3, **architecture):
    """A U-Net for 4x4 grey images that has every kind of layer of the real ones."""
    options = {
        "block_out_channels": [4, 8],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "attention_head_dim": 4,
    }
    torch.manual_seed(seed)
    return unet((1, 4, 4), num_classes, **(options | architecture))


def tiny_diffusion(prediction="v", timesteps=50):
    """A diffusion with few timesteps."""
    return Diffusion(prediction, TimestepLaw([0, 3, timesteps], [0.1, 0.9]))


def tiny_images(count=11, classes=3, seed=0):
    """``count`` random 4x4 images; no two are alike."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
    names = tuple("abcdefghij"[:classes])
    return Images(pixels, np.arange(count, dtype=np.int64) % classes, names)


class Recorder(torch.optim.SGD):
    """Keeps every gradient that reaches it, flattened; a rate of 0 leaves the weights alone."""

    def __init__(self, parameters, lr=0.0):
        super().__init__(parameters, lr=lr)
        self.seen = []

    @torch.no_grad()
    def step(self, closure=None):
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        self.seen.append(torch.cat(grads).clone())
        return super().step(closure)


def tiny_module(plan, randomness=None, optimizer=Recorder, net=None, **options):
    """A module that trains a tiny network under a plan."""
    settings = {"ema_decay": 0.9, "label_dropout": 0.1, "flip": True}
    return DiffusionModule(
        net=tiny_net() if net is None else net,
        diffusion=tiny_diffusion(),
        optimizer=optimizer,
        randomness=plan.randomness(0) if randomness is None else randomness,
        multiplicity=plan.multiplicity,
        **(settings | options),
    )


def weights_of(net):
    """All weights of a network as one vector."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def files_below(directory: Path):
    """Every file below a directory with its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
