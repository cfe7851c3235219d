"""How the network is run: chosen by measured times, and the same network however it is run."""

import pytest
import torch
from conftest import compose, tiny_net
from hydra.utils import instantiate

from dp_synth.sampling import execution
from dp_synth.sampling.execution import ExecutedNetwork, Execution, asked_for, choose, measured

LONG, SHORT = 10**6, 1  # network calls ahead, of a second or so each


class Stopwatch:
    """Fake times of a network call: each change multiplies the time by a factor; asked is recorded."""

    def __init__(self, **factors):
        self.factors = factors
        self.asked = []

    def __call__(self, execution):
        self.asked.append(execution)
        seconds = 1.0
        seconds *= self.factors.get("bf16", 1) if execution.precision == "bf16" else 1
        seconds *= self.factors.get("channels_last", 1) if execution.channels_last else 1
        return seconds * (self.factors.get("compile", 1) if execution.compile else 1)


def test_the_simplest_is_kept_where_nothing_wins_clearly():
    watch = Stopwatch(bf16=0.95, channels_last=0.91, compile=1.2)
    assert choose({}, LONG, watch, native_bf16=True) == Execution()
    assert len(watch.asked) == 4


@pytest.mark.parametrize("winner", ["channels_last", "compile"])
def test_a_clear_winner_is_taken(winner):
    chosen = choose({}, LONG, Stopwatch(**{winner: 0.8}), native_bf16=True)
    assert chosen == Execution(**{winner: True})


def test_winners_are_combined_and_measured_together():
    watch = Stopwatch(bf16=0.5, channels_last=0.8, compile=0.7)
    assert choose({}, LONG, watch, native_bf16=True) == Execution("bf16", True, True)
    assert watch.asked[-1] == Execution("bf16", True, True)


def test_emulated_bf16_is_not_even_tried():
    watch = Stopwatch(bf16=0.5)
    assert choose({}, LONG, watch, native_bf16=False) == Execution()
    assert all(asked.precision == "32-true" for asked in watch.asked)


def test_short_work_is_not_worth_a_choice_and_longer_work_no_compiling():
    watch = Stopwatch(bf16=0.1, channels_last=0.1, compile=0.1)
    assert choose({}, SHORT, watch, native_bf16=True) == Execution()
    assert watch.asked == [Execution()]
    watch = Stopwatch(compile=0.1)
    assert choose({}, 120, watch, native_bf16=True) == Execution()  # two minutes
    assert not any(asked.compile for asked in watch.asked)


def test_what_makes_the_rest_short_ends_the_search():
    """A half of the work is saved, and compiling no longer pays."""
    watch = Stopwatch(bf16=0.1, compile=0.1)
    assert choose({}, 1000, watch, native_bf16=True) == Execution("bf16")


@pytest.mark.parametrize(
    "asked",
    [{"precision": "bf16"}, {"channels_last": False}, {"compile": True}, {"precision": "32-true"}],
)
def test_what_is_asked_for_stays(asked):
    watch = Stopwatch(bf16=0.1, channels_last=0.1, compile=0.1)
    chosen = choose(asked, LONG, watch, native_bf16=True).describe()
    assert asked.items() <= chosen.items()
    assert all(asked.items() <= tried.describe().items() for tried in watch.asked)


def test_nothing_is_measured_where_everything_is_asked_for():
    asked = {"precision": "32-true", "channels_last": True, "compile": False}
    watch = Stopwatch()
    assert choose(asked, LONG, watch, native_bf16=True) == Execution(channels_last=True)
    assert watch.asked == []


def test_the_keys_that_users_type_are_the_ones_that_are_asked_for():
    typed = ("sampler.precision=bf16", "sampler.channels_last=false")
    sampler = instantiate(compose(*typed).sampler)
    assert asked_for(sampler) == {"precision": "bf16", "channels_last": False}
    assert asked_for(instantiate(compose().sampler)) == {}


def test_it_is_measured_on_a_real_batch(monkeypatch):
    """As many rows as a batch has, and as many calls ahead as all batches make."""
    seen = {}

    def choose(asked, calls, seconds, native_bf16):
        seen.update(calls=calls)
        assert seconds(Execution()) > 0
        return Execution()

    net = tiny_net().eval()
    net.register_forward_pre_hook(lambda module, args: seen.update(rows=len(args[0])))
    monkeypatch.setattr(execution, "choose", choose)
    typed = ("sampler=heun", "sampler.steps=3", "sampler.batch_size=4", "sampler.num_images=9")
    measured(net, instantiate(compose(*typed).sampler))
    assert seen == {"calls": 3 * 5, "rows": 4}


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 4, 4, generator=generator)
    return x, torch.full((5,), 7.0), torch.arange(5) % 3


def plain_output(net, rows):
    x, t, y = rows
    return net(x, t, class_labels=y, return_dict=False)[0]


@torch.no_grad()
def test_layout_changes_rounding_alone(rows):
    net = tiny_net().eval()
    expected = plain_output(net, rows)
    for layout in (True, False):
        (output,) = ExecutedNetwork(net, Execution(channels_last=layout))(*rows)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        strided = net.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert strided == layout or net.conv_in.weight.shape[1] == 1
    assert torch.equal(ExecutedNetwork(net, Execution())(*rows)[0], expected)


@torch.no_grad()
def test_bf16_rounds_and_gives_float32(rows):
    net = tiny_net().eval()
    expected = plain_output(net, rows)
    (output,) = ExecutedNetwork(net, Execution("bf16"))(*rows)
    assert output.dtype == torch.float32 and not torch.equal(output, expected)
    torch.testing.assert_close(output, expected, rtol=0.1, atol=0.1)
    assert all(p.dtype == torch.float32 for p in net.parameters())


@torch.no_grad()
def test_a_network_that_does_not_compile_runs_without(rows, monkeypatch, capsys):
    def broken(net, **options):
        def forward(*args, **kwargs):
            raise RuntimeError("no C++\ncompiler")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    net = tiny_net().eval()
    executed = ExecutedNetwork(net, Execution(compile=True))
    for _ in range(2):
        assert torch.equal(executed(*rows)[0], plain_output(net, rows))
    said = capsys.readouterr().err
    assert said.count("torch.compile failed") == 1 and "no C++ compiler" in said


def test_an_error_of_the_network_itself_is_not_hidden(rows):
    x, t, y = rows
    with pytest.raises(RuntimeError):
        ExecutedNetwork(tiny_net().eval(), Execution())(x[:, :, :3], t[:2], y)
