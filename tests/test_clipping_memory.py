"""The engine keeps to its memory: by arithmetic, and as the operating system measures it."""

import gc
import multiprocessing
import random
import re
from pathlib import Path

import pytest
import torch
from clipping_oracle import (
    assert_same,
    brute_force,
    denoising_loss,
    force,
    make_unet,
    randomize,
    square_loss,
    sum_of,
    unet_rows,
)
from torch import nn

from dp_synth.errors import UserError
from dp_synth.privacy.clipping import ClippingEngine
from dp_synth.privacy.clipping.memory import MIB, Chunk, MemoryUse, measure

# ------------------------------------------------------------------------------------- arithmetic


def some_uses():
    chance = random.Random(0)
    for _ in range(2000):
        sizes = (10 ** chance.uniform(0, 9) for _ in range(3))
        budget = 10 ** chance.uniform(0, 11)
        yield MemoryUse(*sizes), budget, chance.choice([1, 2, 3, 7, 128])


def test_the_largest_chunk_is_within_the_budget_and_none_is_larger():
    fitting, spread, refused = 0, 0, 0
    for use, budget, multiplicity in some_uses():
        try:
            chunk = use.largest_chunk(budget, multiplicity)
        except UserError:
            assert use.of(Chunk(1, 1)) > budget * (1 - 1e-9)
            refused += 1
            continue
        assert use.of(chunk) <= budget * (1 + 1e-9)
        if chunk.draws == multiplicity:
            assert chunk.examples >= 1
            assert use.of(Chunk(chunk.examples + 1, multiplicity)) > budget * (1 - 1e-9)
            fitting += 1
        else:
            assert 1 <= chunk.draws < multiplicity
            assert chunk.examples == 1
            assert use.of(Chunk(1, chunk.draws + 1)) > budget * (1 - 1e-9)
            spread += 1
    assert min(fitting, spread, refused) > 10, "each case occurs"


@pytest.mark.parametrize(
    ("use", "budget", "multiplicity", "chunk"),
    [
        (MemoryUse(fixed=10, per_row=2, per_example=3), 10 + 5 * 9, 3, Chunk(5, 3)),
        (MemoryUse(fixed=10, per_row=2, per_example=3), 10 + 5 * 9 - 1, 3, Chunk(4, 3)),
        (MemoryUse(fixed=10, per_row=2, per_example=3), 10 + 3 + 2 * 2, 3, Chunk(1, 2)),
        (MemoryUse(fixed=10, per_row=2, per_example=3), 10 + 3 + 2, 3, Chunk(1, 1)),
        (MemoryUse(fixed=0, per_row=1, per_example=0), 7, 7, Chunk(1, 7)),
    ],
)
def test_largest_chunks_by_hand(use, budget, multiplicity, chunk):
    assert use.largest_chunk(budget, multiplicity) == chunk
    assert use.of(chunk) <= budget


@pytest.mark.parametrize("fixed", [0.2 * MIB, 3.4 * MIB, 99.5 * MIB])
def test_a_budget_that_holds_nothing_is_refused_with_one_that_works(fixed):
    use = MemoryUse(fixed=fixed, per_row=0.3 * MIB, per_example=0.6 * MIB)
    with pytest.raises(
        UserError, match="trainer.memory_mib=0.1 does not hold .* one row"
    ) as refusal:
        use.largest_chunk(0.1 * MIB, 5)
    (least,) = re.findall(r"(\d+) or more works", str(refusal.value))
    assert use.largest_chunk(int(least) * MIB, 5).draws >= 1


def test_measuring_finds_fixed_and_growing_parts():
    """Backwards that hold 4 KiB, 8 KiB for each row, and 2 KiB of the example's gradients."""

    def backward(draws):
        kept = [torch.ones(1024), torch.ones(512), *(torch.ones(2048) for _ in range(draws))]
        del kept

    use = measure(backward).writing(2048)
    overhead = use.per_example / 2048
    assert 1 <= overhead < 2
    assert use.fixed == pytest.approx((4096 + 2048) * overhead)
    assert use.per_row == pytest.approx(8192 * overhead)


def test_measuring_counts_what_is_alive_at_once():
    """Memory that is given back before more is asked for does not add up; views cost nothing."""

    def backward(draws):
        for _ in range(5):
            x = torch.ones(draws, 1024)
            views = [x.view(-1), x[:, :5], x.t()]
            del x, views
        torch.ones(draws, 1024).add_(1).mul_(2)

    use = measure(backward).writing(1)
    assert use.per_row / use.per_example == pytest.approx(4096)


def live_tensors():
    gc.collect()
    return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("way", ["book-keeping", "grouped", "product"])
def test_nothing_of_a_sum_stays_alive_after_it(way, monkeypatch):
    """A recording that its graph refers to and that refers to the graph would never be freed."""
    force(monkeypatch, way)
    net = make_unet(torch.float32)
    engine, loss = ClippingEngine(net, 1.0, micro_batch_size=2), denoising_loss(net)
    alive = []
    for _ in range(4):
        engine.accumulate(loss, unet_rows(5, torch.float32))
        alive.append(live_tensors())
    assert alive[1:] == alive[1:2] * 3


# ------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_more_draws_than_fit_are_spread_over_several_backwards(mode):
    net = randomize(nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2)))
    x = torch.randn(3 * 200, 3, dtype=torch.float64)
    sizes = []

    def counted(x):
        sizes.append(len(x))
        return square_loss(net)(x)

    memory_mib = 0.15
    engine = ClippingEngine(net, 0.5, memory_mib=memory_mib, mode=mode)
    plan = engine.tune(counted, (x,), 200)
    assert 1 < plan.chunk.draws < 200
    assert plan.chunk.examples == 1
    assert plan.memory_mib <= memory_mib
    sizes.clear()
    found = sum_of(engine, counted, (x,), 200)
    assert max(sizes) <= plan.chunk.draws
    assert len(sizes) == 3 * -(-200 // plan.chunk.draws), "no more backwards than it takes"
    assert sum(sizes) == len(x)
    assert_same(found, brute_force(net, square_loss(net), (x,), 200, 0.5))


def test_a_budget_too_small_for_a_row_is_named():
    net = nn.Linear(300, 300)
    engine = ClippingEngine(net, 1.0, memory_mib=0.1)
    with pytest.raises(UserError, match="trainer.memory_mib=0.1 .* one row"):
        engine.accumulate(lambda x: net(x).square().sum(1), (torch.randn(3, 300),), 1)
    assert net.weight.grad is None
    assert net.weight.requires_grad


def convolutions(channels):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.GroupNorm(4, channels),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(4, channels),
        nn.SiLU(),
        nn.Conv2d(channels, 3, 3, padding=1),
    )


def wide_layers(width):
    return nn.Sequential(nn.Linear(48, width), nn.SiLU(), nn.Linear(width, width))


# (network, shape of a row, examples, draws): what grows is activations, or per-example gradients.
CASES = {
    "activations": (lambda: convolutions(32), (3, 32, 32), 40, 8),
    "gradients": (lambda: wide_layers(700), (300, 48), 60, 1),
    "gradients of more rows than book-keeping takes": (
        lambda: wide_layers(500),
        (48,),
        100,
        600,
    ),
}


def status(field):
    """Return a line of this process' memory status, in MiB."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) / 1024


def run(case, memory_mib, answer):
    """Send by how many MiB a clipped sum raised this process' memory at its peak."""
    torch.set_num_threads(1)
    make, shape, examples, multiplicity = CASES[case]
    torch.manual_seed(0)
    net = make()

    def loss(x):
        return net(x).square().flatten(1).sum(1)

    rows = (torch.randn(examples * multiplicity, *shape),)
    # What the first call ever brings in for good: code, most of all.
    ClippingEngine(net, 1.0).accumulate(loss, (rows[0][:2],), 2)
    engine = ClippingEngine(net, 1.0, memory_mib=memory_mib)
    before = status("VmRSS")
    engine.accumulate(loss, rows, multiplicity)
    answer.put(status("VmHWM") - before)


def peak_mib(case, memory_mib):
    """Return `run`'s answer from a fresh process, whose peak is nobody else's."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=run, args=(case, memory_mib, answer))
    process.start()
    peak = answer.get(timeout=120)
    process.join()
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize(
    ("case", "allowed"),
    [
        ("activations", 1.0),
        ("gradients", 1.0),
        # A few tensors of many MiB each, which the allocator of a CPU fits in badly.
        ("gradients of more rows than book-keeping takes", 1.4),
    ],
)
def test_a_run_stays_within_its_memory(case, allowed):
    budget = 128
    unbounded, bounded = peak_mib(case, 100_000), peak_mib(case, budget)
    assert unbounded > 2 * budget, "the budget binds"
    assert bounded <= allowed * budget
