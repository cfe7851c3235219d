"""What imports torchvision works after dp_synth is imported, whatever build of torch is there."""

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch

from dp_synth import torchvision_shim
from dp_synth.torchvision_shim import make_torchvision_importable


def test_nothing_is_done_where_torchvision_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.library, "define", _must_not_be_called)
    assert make_torchvision_importable() is False


def test_nothing_is_done_where_the_library_loads(monkeypatch, tmp_path):
    (tmp_path / "_C.so").touch()
    loaded = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: _spec(tmp_path))
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(torch.library, "define", _must_not_be_called)
    assert make_torchvision_importable() is False
    assert loaded == [tmp_path / "_C.so"]


@pytest.mark.parametrize("known", [(), ("nms",), ("nms", "qnms")])
def test_only_operators_that_are_missing_are_declared(monkeypatch, tmp_path, known):
    """Declaring one twice would be an error of its own."""

    class Operators:
        pass

    class Library:
        torchvision = Operators()

        @staticmethod
        def load_library(path):
            raise OSError("undefined symbol")

    for name in known:
        setattr(Library.torchvision, name, None)
    declared = []
    (tmp_path / "_C.so").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: _spec(tmp_path))
    monkeypatch.setattr(torchvision_shim.torch, "ops", Library)
    monkeypatch.setattr(torch.library, "define", lambda name, schema: declared.append(name))
    assert make_torchvision_importable() is True
    assert declared == [f"torchvision::{n}" for n in ("nms", "qnms") if n not in known]


def test_it_can_be_asked_twice():
    assert make_torchvision_importable() == make_torchvision_importable()


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="torchvision is optional")
def test_lightning_torchmetrics_and_torchvision_import_after_dp_synth():
    """In a fresh process, since here all of them are imported already."""
    code = (
        "import dp_synth, lightning, torchmetrics, torchmetrics.image\n"
        "from torchvision.transforms import v2\n"
        "from torchvision.models import resnet18\n"
        "import torch\n"
        "assert v2.functional.horizontal_flip(torch.arange(4.).view(1, 2, 2))[0, 0, 0] == 1\n"
        "assert resnet18(weights=None).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, text=True
    )
    assert result.returncode == 0, result.stderr


def _spec(directory):
    return ModuleSpec("torchvision", None, origin=str(directory / "__init__.py"))


def _must_not_be_called(*args, **kwargs):
    raise AssertionError("an operator was declared")
