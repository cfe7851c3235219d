"""Choosing ways by measurement: never another sum, and never dependent on what a cache file says."""

import json
import logging

import pytest
import torch
from clipping_oracle import (
    assert_same,
    brute_force,
    clip,
    denoising_loss,
    distance,
    example_gradients,
    make_unet,
    median,
    randomize,
    size,
    square_loss,
    sum_of,
    unet_rows,
)
from torch import nn

from dp_synth.privacy.clipping import ClippingEngine, book_keeping, tuning
from dp_synth.privacy.clipping.contributions import OneByOne
from dp_synth.privacy.clipping.rules import convolution
from dp_synth.privacy.clipping.tuning import LayerWays

DRAWS = 2


class ThreeLayers(nn.Module):
    """Images [R, 2, 4, 4] to vectors, with a choice of ways in each layer but the norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.twin = nn.Conv2d(2, 4, 3, padding=1)
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        y = self.norm(self.conv(x)) + self.twin(x)
        return self.linear(y.flatten(2).transpose(1, 2))


def make(dtype=torch.float64):
    net = randomize(ThreeLayers(), dtype)
    return net, square_loss(net)


def random_rows(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(rows, 2, 4, 4, generator=generator, dtype=dtype),)


@pytest.fixture
def prefer(monkeypatch):
    """A function that makes one way the fastest where it is possible; counts measurements."""

    def prefer(way):
        measured = []

        def fastest(ways, default, memory):
            measured.append(set(ways))
            return way if way in ways else next(iter(ways))

        monkeypatch.setattr(tuning, "_fastest", fastest)
        # Also for layers so small that it would only cost memory.
        monkeypatch.setattr(book_keeping, "is_possible", lambda x, weight, rows: rows <= 512)
        return measured

    return prefer


@pytest.fixture
def no_timing(monkeypatch):
    """A function after which any measurement fails."""

    def forbid():
        def fastest(*_):
            raise AssertionError("measured")

        monkeypatch.setattr(tuning, "_fastest", fastest)

    return forbid


# ---------------------------------------------------------------------------------- the same sum


def test_the_sum_of_a_unet_is_the_same_before_and_after():
    net = make_unet()
    loss, rows = denoising_loss(net), unet_rows(5 * DRAWS)
    gradients = example_gradients(net, loss, rows, DRAWS)
    engine = ClippingEngine(net, median(map(size, gradients)), 3 * DRAWS)
    before = sum_of(engine, loss, rows, DRAWS)
    plan = engine.tune(loss, unet_rows(2 * DRAWS, seed=8), DRAWS)
    after = sum_of(engine, loss, rows, DRAWS)
    assert plan.fallback_reason is None
    assert_same(after, before)
    assert_same(after, clip(gradients, engine.max_grad_norm))


@pytest.mark.parametrize("examples", [1, 7])
@pytest.mark.parametrize("way", ["grouped", "example-wise", "windows", "book-keeping"])
def test_what_is_fastest_is_used_and_gives_the_same_sum(monkeypatch, prefer, way, examples):
    prefer(way)
    net, loss = make()
    engine = ClippingEngine(net, 1.0, 3 * DRAWS)
    plan = engine.tune(loss, random_rows(examples * DRAWS), DRAWS)
    assert plan.ways["conv"] == plan.ways["twin"] == way

    taken = {}
    honest = LayerWays.choose

    def choose(self, call, x, ways, default):
        labelled = {name: lambda name=name: (name, ways[name]()) for name in ways}
        taken[call.name], contribution = honest(self, call, x, labelled, default)
        return contribution

    monkeypatch.setattr(LayerWays, "choose", choose)
    rows = random_rows(7 * DRAWS)
    engine.max_grad_norm = median(map(size, example_gradients(net, loss, rows, DRAWS)))
    found = sum_of(engine, loss, rows, DRAWS)
    assert taken == plan.ways
    assert_same(found, brute_force(net, loss, rows, DRAWS, engine.max_grad_norm))


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_gradients_at_hand_are_left_alone(mode):
    net, loss = make()
    kept = torch.ones_like(net.linear.weight)
    net.linear.weight.grad = kept
    ClippingEngine(net, 1.0, 4, mode=mode).tune(loss, random_rows(6), DRAWS)
    assert net.linear.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert all(p.grad is None for p in net.parameters() if p is not net.linear.weight)
    assert all(p.requires_grad for p in net.parameters())
    assert not any("forward" in vars(module) for module in net.modules())


@pytest.mark.parametrize("way", ["example-wise", "book-keeping"])
def test_tuning_under_autocast(prefer, way):
    prefer(way)
    net, loss = make(torch.float32)
    rows = random_rows(7 * DRAWS, torch.float32)
    gradients = example_gradients(net, loss, rows, DRAWS)
    engine = ClippingEngine(net, median(map(size, gradients)), memory_mib=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = engine.tune(loss, rows, DRAWS)
        found = sum_of(engine, loss, rows, DRAWS)
    assert plan.ways["conv"] == way
    exact = clip(gradients, engine.max_grad_norm)
    assert distance(found, exact) < 0.05 * size(exact)


def test_a_way_that_stops_being_possible_is_not_taken(prefer):
    """Book-keeping is for few rows per example."""
    prefer("book-keeping")
    net, loss = make()
    engine = ClippingEngine(net, 0.5, 400)
    plan = engine.tune(loss, random_rows(4), DRAWS)
    assert set(plan.ways.values()) == {"book-keeping"}
    rows = random_rows(2 * 67)
    found = sum_of(engine, loss, rows, 67)  # 67 draws of 16 positions
    assert_same(found, brute_force(net, loss, rows, 67, 0.5))


# --------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(("micro_batch_size", "chunk"), [(1, (1, 1)), (3, (1, 3)), (8, (2, 3))])
def test_the_plan_says_what_a_backward_takes(micro_batch_size, chunk):
    net, loss = make()
    sizes = []

    def counted(x):
        sizes.append(len(x))
        return loss(x)

    engine = ClippingEngine(net, 1.0, micro_batch_size)
    plan = engine.tune(loss, random_rows(6), 3)
    assert (plan.chunk.examples, plan.chunk.draws) == chunk
    assert plan.memory_mib > 0
    engine.accumulate(counted, random_rows(24), 3)
    assert max(sizes) == plan.chunk.rows
    assert sum(sizes) == 24


def test_the_plan_keeps_to_the_memory_and_is_followed():
    net, loss = make()
    sizes = []

    def counted(x):
        sizes.append(len(x))
        return loss(x)

    engine = ClippingEngine(net, 1.0, memory_mib=1)
    plan = engine.tune(loss, random_rows(2 * DRAWS), DRAWS)
    assert plan.memory_mib <= 1
    engine.accumulate(counted, random_rows(plan.chunk.rows * 3), DRAWS)
    assert max(sizes) == plan.chunk.rows
    assert sum(sizes) == plan.chunk.rows * 3, "memory is not measured again"


def test_the_loop_has_nothing_to_choose(no_timing):
    no_timing()
    net, loss = make()
    engine = ClippingEngine(net, 0.5, 4, mode="loop")
    plan = engine.tune(loss, random_rows(6), DRAWS)
    assert plan.ways == {}
    assert plan.fallback_reason is None
    rows = random_rows(6)
    assert_same(sum_of(engine, loss, rows, DRAWS), brute_force(net, loss, rows, DRAWS, 0.5))


class FlattensRows(nn.Module):
    """Its layer's input hides which row is which: known only when it is called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        y = self.conv(x).flatten(0, 1).flatten(1)
        return self.head(y[:, :2]).unflatten(0, (len(x), 4))


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_fallback_found_while_tuning_is_in_the_plan(caplog, micro_batch_size):
    net = randomize(FlattensRows())
    engine = ClippingEngine(net, 0.5, micro_batch_size, memory_mib=1)
    with caplog.at_level(logging.WARNING, logger="dp_synth"):
        plan = engine.tune(square_loss(net), random_rows(6), DRAWS)
    assert plan.fallback_reason.startswith("head:")
    assert engine.fallback_reason == plan.fallback_reason
    assert len([record for record in caplog.records if record.name == "dp_synth"]) == 1
    rows = random_rows(6)
    found = sum_of(engine, square_loss(net), rows, DRAWS)
    assert_same(found, brute_force(net, square_loss(net), rows, DRAWS, 0.5))


def test_without_tuning_ways_are_chosen_for_the_runs_rows_and_not_for_those_memory_is_measured_on():
    """One draw has few rows for a wide layer; sixteen have not."""
    net = randomize(nn.Linear(32, 32))
    rows = (torch.randn(32, 4, 32, dtype=torch.float64),)
    ways = []
    for micro_batch_size in (32, None):
        engine = ClippingEngine(net, 1.0, micro_batch_size)
        engine.accumulate(square_loss(net), rows, 16)
        ways.append(engine._ways.as_dict())
    assert ways[0] == {"the network itself": "product"}
    assert ways[1] == ways[0]


# -------------------------------------------------------------------------------- the measurement


@pytest.mark.parametrize(
    ("seconds", "default", "best"),
    [
        ([1.0, 0.5, 0.7], "a", "b"),
        ([1.0, 0.95, 2.0], "a", "a"),  # that little is noise
        ([0.95, 1.0, 0.5], "b", "c"),
        ([0.95, 1.0, 2.0], "b", "b"),
        ([1.0, 0.95, 2.0], "impossible here", "a"),
    ],
)
def test_another_way_must_be_clearly_faster(monkeypatch, seconds, default, best):
    monkeypatch.setattr(tuning, "fastest_seconds", lambda work: work.args[0]())
    ways = {way: lambda s=s: s for way, s in zip("abc", seconds, strict=True)}
    assert tuning._fastest(ways, default, torch.empty(1, 1)) == best


def test_a_measurement_does_the_work_of_a_sum():
    made = []

    def gradient(i):
        made.append(i)
        return torch.ones(5)

    memory = torch.zeros(3, 5)
    tuning._fastest({"example-wise": lambda: OneByOne(3, gradient)}, "example-wise", memory)
    assert made[:3] == [0, 1, 2]
    assert (memory == 1).all()


def test_equal_layers_are_measured_once(prefer):
    measured = prefer("windows")
    net, loss = make()
    ClippingEngine(net, 1.0, 8).tune(loss, random_rows(6), DRAWS)
    assert len(measured) == 2, "two convolutions alike, and a linear layer"


# --------------------------------------------------------------------------------------- the cache


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deeper" / "ways.json"


def tune(cache, dtype=torch.float64, examples=3, draws=DRAWS):
    net, loss = make(dtype)
    engine = ClippingEngine(net, 0.5, examples * draws)
    plan = engine.tune(loss, random_rows(examples * draws, dtype), draws, cache=cache)
    rows = random_rows(7 * draws, dtype)
    if dtype == torch.float64:
        found = sum_of(engine, loss, rows, draws)
        assert_same(found, brute_force(net, loss, rows, draws, 0.5))
    return plan


def test_what_was_measured_once_is_not_again(path, prefer, no_timing):
    prefer("windows")
    first = tune(path)
    no_timing()
    assert tune(path) == first
    assert first.ways["conv"] == "windows"


@pytest.mark.parametrize(
    "other", [{"dtype": torch.float32}, {"examples": 2}, {"examples": 2, "draws": 3}]
)
def test_other_shapes_are_measured_and_added(path, prefer, no_timing, other):
    prefer("windows")
    tune(path)
    measured = prefer("example-wise")
    assert tune(path, **other).ways["conv"] == "example-wise"
    assert measured
    no_timing()
    assert tune(path).ways["conv"] == "windows"
    assert tune(path, **other).ways["conv"] == "example-wise"


def test_another_machines_measurements_are_kept_and_not_used(path, prefer):
    prefer("windows")
    tune(path)
    (mine,) = json.loads(path.read_text()).values()
    others = {"another machine": dict.fromkeys(mine, "grouped")}
    path.write_text(json.dumps(others))
    assert tune(path).ways["conv"] == "windows"
    content = json.loads(path.read_text())
    assert content.pop("another machine") == others["another machine"]
    assert list(content.values()) == [mine]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"3",
        b'{"a machine": 3}',
        b'{"a machine": {"a layer": 3}, "another": null}',
    ],
)
def test_a_broken_cache_is_harmless_and_replaced(path, prefer, no_timing, content):
    path.parent.mkdir()
    path.write_bytes(content)
    prefer("windows")
    first = tune(path)
    no_timing()
    assert tune(path) == first


@pytest.mark.parametrize("foreign", ["book-burning", "", 3, None, ["grouped"], {"way": "grouped"}])
def test_ways_that_do_not_exist_are_measured_again(path, prefer, foreign):
    prefer("windows")
    tune(path)
    content = json.loads(path.read_text())
    ((machine, ways),) = content.items()
    path.write_text(json.dumps({machine: ways | {"ways": dict.fromkeys(ways["ways"], foreign)}}))
    assert tune(path).ways["conv"] == "windows"
    assert json.loads(path.read_text()) == content


def test_a_cache_that_cannot_be_written_is_harmless(tmp_path, prefer):
    prefer("windows")
    (tmp_path / "file").write_text("")
    assert tune(tmp_path / "file" / "below.json").ways["conv"] == "windows"
    assert tune(tmp_path).ways["conv"] == "windows"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [
        "file"
    ]


def test_a_way_that_memory_does_not_hold_is_not_taken(monkeypatch):
    net, loss = make()

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(convolution, "_one_by_one", out_of_memory)
    monkeypatch.setattr(convolution, "grouped_weight_grads", out_of_memory)
    plan = ClippingEngine(net, 1.0).tune(loss, random_rows(4), DRAWS)
    assert plan.ways["conv"] in ("windows", "book-keeping")


def test_sizes_that_memory_does_not_hold_are_not_taken():
    def work(size):
        if size > 25:
            raise torch.OutOfMemoryError

    assert tuning.fastest_size(100, work) <= 25
