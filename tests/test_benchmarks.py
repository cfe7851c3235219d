"""The benchmark tells right engines from wrong ones; the faults reported upstream are there."""

import json
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import dp_synth  # noqa: F401  before diffusers

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

opacus_1_6 = pytest.mark.skipif(
    not version("opacus").startswith("1.6."), reason="written for Opacus 1.6"
)


@pytest.fixture
def clipping(monkeypatch):
    """The benchmark as a module; warning filters and threads are as before afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    import clipping

    yield clipping
    torch.set_num_threads(threads)


def run(clipping, tmp_path, *options):
    out = tmp_path / "out.json"
    clipping.main(
        ["--networks", "digits", "--rounds", "1", "--threads", "1", "--out", str(out), *options]
    )
    report = json.loads(out.read_text())
    return {
        label: point["engines"] for label, point in report["networks"]["digits"]["points"].items()
    }


def test_engines_get_the_verdict_they_deserve(clipping, tmp_path, monkeypatch, capsys):
    engines, engine_type = clipping.ENGINES, sys.modules["engines"].Engine

    def unclipped(net, loss, max_grad_norm):
        return engines["non-private"].make(net, loss, max_grad_norm)

    def forgets_bias(net, loss, max_grad_norm):
        right = engines["dp_synth"].make(net, loss, max_grad_norm)

        def wrong(rows, multiplicity):
            right(rows, multiplicity)
            net.conv_in.bias.grad = None

        return wrong

    def broken(net, loss, max_grad_norm):
        raise NotImplementedError("no such layer\nand more")

    def not_finite(net, loss, max_grad_norm):
        return lambda rows, multiplicity: (loss(*rows).sum() * float("nan")).backward()

    planted = (unclipped, forgets_bias, broken, not_finite)
    for make in planted:
        monkeypatch.setitem(engines, make.__name__, engine_type(make))
    points = run(
        clipping, tmp_path, "--points", "3x2", "5x1",
        "--engines", "dp_synth", "per-example loop", *(make.__name__ for make in planted),
    )  # fmt: skip
    assert set(points) == {"B=3 K=2", "B=5 K=1"}
    for found in points.values():
        verdicts = {name: entry["verdict"] for name, entry in found.items()}
        assert verdicts == {
            "non-private": "not private",
            "dp_synth": "exact",
            "per-example loop": "exact",
            "unclipped": "differs",
            "forgets_bias": "differs",
            "broken": "fails",
            "not_finite": "differs",
        }
        assert found["broken"]["failure"] == "NotImplementedError: no such layer"
        assert all(len(entry["seconds"]) == (name != "broken") for name, entry in found.items())
    printed = {line[:18].strip(): line[18:] for line in capsys.readouterr().out.splitlines()}
    assert printed["unclipped"].count("!") == printed["forgets_bias"].count("!") == 2
    assert printed["broken"].split() == ["fails", "fails"]
    assert "!" not in printed["dp_synth"]


@opacus_1_6
def test_rivals_are_judged_as_known(clipping, tmp_path):
    points = run(
        clipping, tmp_path, "--points", "2x3", "--engines",
        "vmap(grad)", "Opacus hooks", "Opacus functorch", "Opacus ghost",
    )  # fmt: skip
    verdicts = {name: entry["verdict"] for name, entry in points["B=2 K=3"].items()}
    assert verdicts == {
        "non-private": "not private",
        "vmap(grad)": "exact",
        "Opacus hooks": "differs",
        "Opacus functorch": "exact",
        "Opacus ghost": "other mechanism",
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_holds_what_the_engine_must_hold(clipping):
    """vmap keeps B gradients; neither torch itself nor the network is counted."""
    measure = sys.modules["measure"]
    measured = {"vmap(grad)": measure.Measurement()}
    settings = clipping.Settings(device="cpu", bf16=False, threads=1, rounds=1)
    measure.measure_memory("digits", (48, 1), measured, settings)
    net = clipping.NETWORKS["digits"].build("cpu")
    gradients = 48 * sum(4 * param.numel() for param in net.parameters())
    assert measured["vmap(grad)"].memory_failure is None
    assert gradients < measured["vmap(grad)"].peak_bytes < 3 * gradients


def test_what_does_not_fit_is_skipped_with_the_reason(clipping, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["measure"], "_free_memory", lambda device: 8 * 2**20)
    points = run(clipping, tmp_path, "--points", "7x1", "--engines", "vmap(grad)")
    assert points["B=7 K=1"]["vmap(grad)"]["verdict"] == "fails"
    assert "holds 7 gradients" in points["B=7 K=1"]["vmap(grad)"]["failure"]


@pytest.mark.parametrize(
    "options", [["--points", "8"], ["--points", "0x3"], ["--rounds", "0"], ["--engines", "none"]]
)
def test_wrong_options_end_with_a_message(clipping, options, capsys):
    with pytest.raises(SystemExit) as ended:
        clipping.parse(options)
    assert ended.value.code == 2
    assert options[0] in capsys.readouterr().err


@opacus_1_6
@pytest.mark.parametrize("script", ["opacus_conv2d_strides.py", "opacus_tied_parameter.py"])
def test_upstream_fault_is_there(script, capsys):
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / "upstream" / script), run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("REPRODUCED: ")
    assert printed.count("\n") == 1


@opacus_1_6
def test_ghost_clipping_refuses_dit():
    from diffusers import DiTTransformer2DModel
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=2,
        num_layers=1, sample_size=4, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    module = GradSampleModuleFastGradientClipping(net.train())
    labels = torch.tensor([1, 2])
    with pytest.raises(NotImplementedError, match="Parameter tying"):
        module(torch.randn(2, 2, 4, 4), timestep=labels, class_labels=labels)
