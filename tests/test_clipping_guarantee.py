"""No example moves the clipped sum by more than the bound, measured in float64 and without slack."""

import math
import random

import pytest
import torch
from clipping_oracle import (
    assert_same,
    brute_force,
    check,
    denoising_loss,
    distance,
    engine_sum,
    force,
    make_unet,
    median_norm,
    randomize,
    size,
    square_loss,
    sum_of,
    unet_rows,
)
from torch import nn

from dp_synth.privacy.clipping import ClippingEngine
from dp_synth.privacy.clipping.gradients import clip_factors

WAYS = ["grouped", "example-wise", "windows", "book-keeping", "tables", "product"]


@pytest.fixture(scope="module")
def unet():
    return make_unet()


# ------------------------------------------------------------------------------------- factors


def awkward_norms():
    """Norms over all of float64's range, and closely around a bound of 1."""
    chance = random.Random(0)
    spread = [10 ** chance.uniform(-300, 300) for _ in range(2000)]
    near = [1 + chance.uniform(-1, 1) * 10 ** chance.uniform(-16, 0) for _ in range(2000)]
    edges = [0.0, 5e-324, 1.0, math.nextafter(1, 0), math.nextafter(1, 2), 1.7e308]
    return torch.tensor([*spread, *near, *edges], dtype=torch.float64)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [1.0, 1e-3, 0.1, 3.7, 1e4, 1e-20])
def test_a_factor_times_its_norm_never_exceeds_the_bound(bound, dtype, clipping):
    norms = awkward_norms() * bound
    norms = norms[norms.isfinite()]
    factors = clip_factors(norms, bound, clipping, dtype)
    assert factors.dtype == torch.float64
    assert (factors >= 0).all()
    assert (factors * norms <= bound).all()
    # The sum is made with factors of its own type.
    assert (factors.to(dtype).double() * norms <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_those_of_their_formulas(dtype):
    norms, bound = awkward_norms(), 1.0
    # Larger ones are left out: single precision holds their factors with few digits, or none.
    left_out = norms > 1e37
    assert (clip_factors(norms, bound, "flat", dtype)[norms > 1e38] == 0).all()
    norms = norms[~left_out]
    flat = clip_factors(norms, bound, "flat", dtype)
    assert torch.allclose(flat, (bound / norms).clamp(max=1.0), rtol=1e-6, atol=0)
    assert (flat[norms <= 0.999] == 1.0).all(), "an example within the bound is left alone"
    automatic = clip_factors(norms, bound, "automatic", dtype)
    assert torch.allclose(automatic, bound / (norms + 0.01), rtol=1e-6, atol=0)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_factors_of_norms_that_are_not_finite_are_zero(clipping):
    norms = torch.tensor([math.nan, math.inf, 1.0], dtype=torch.float64)
    assert (clip_factors(norms, 1.0, clipping) == 0).tolist() == [True, True, False]


# -------------------------------------------------------------------------- one example's share


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("way", ["grouped", "example-wise", "windows", "book-keeping", "loop"])
def test_an_example_alone_contributes_at_most_the_bound(monkeypatch, way, clipping, precision):
    dtype = torch.float64 if precision == "float64" else torch.float32
    force(monkeypatch, way)
    net = make_unet(dtype)
    examples, draws = 3, 2
    rows = unet_rows(examples * draws, dtype)
    mode = "loop" if way == "loop" else "auto"
    engine = ClippingEngine(net, 1.0, draws, mode=mode, clipping=clipping)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        for bound in (1e-3, 0.03):  # norms are above 0.1: all are clipped
            engine.max_grad_norm = bound
            for i in range(examples):
                alone = tuple(tensor[i::examples] for tensor in rows)
                share = size(sum_of(engine, denoising_loss(net), alone, draws))
                assert 0.8 * bound < share <= bound
    assert engine.fallback_reason is None


@pytest.mark.parametrize("way", ["product", "book-keeping"])
def test_the_bound_holds_where_a_gradient_is_a_small_difference(monkeypatch, way):
    """Its terms are a thousand times larger, so that single precision keeps few of its digits."""
    taken = force(monkeypatch, way)
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(16, 8, bias=False))
    direction = torch.randn(1, 6, 8)
    direction = direction - direction.mean(1, keepdim=True)  # adds up to nearly nothing

    def loss(x):
        return (net(x) * direction).flatten(1).sum(1)

    engine = ClippingEngine(net, 1e-3, micro_batch_size=1)
    shares = []
    for _ in range(20):
        x = 1000 + torch.randn(1, 6, 16) * 0.1
        shares.append(size(sum_of(engine, loss, (x,), 1)))
    assert taken == {"0": {way}}
    assert max(shares) <= 1e-3


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_no_example_moves_the_sum_by_more_than_the_bound(unet, mode):
    loss = denoising_loss(unet)
    rows = unet_rows(6)
    examples, bound = 3, median_norm(unet, loss, rows, 2)
    together, _ = engine_sum(unet, loss, rows, 2, bound, mode=mode)
    for i in range(examples):
        others = [n for n in range(6) if n % examples != i]
        without, _ = engine_sum(unet, loss, tuple(r[others] for r in rows), 2, bound, mode=mode)
        assert distance(together, without) <= bound
        alone, _ = engine_sum(unet, loss, tuple(r[i::examples] for r in rows), 2, bound, mode=mode)
        assert size(alone) <= bound
        assert distance(together, {n: without[n] + alone[n] for n in alone}) <= 1e-12 * size(
            together
        )


def test_replacing_an_example_moves_the_sum_by_at_most_twice_the_bound(unet):
    loss, bound = denoising_loss(unet), 1e-3  # all are clipped
    rows = unet_rows(6)
    other = tuple(tensor.clone() for tensor in rows)
    other[0][1::3] *= 100.0
    other[1][1::3] = -other[1][1::3]
    first, _ = engine_sum(unet, loss, rows, 2, bound)
    second, _ = engine_sum(unet, loss, other, 2, bound)
    assert 0 < distance(first, second) <= 2 * bound


def test_identical_draws_count_once(unet):
    rows = unet_rows(3)
    repeated = tuple(torch.cat([tensor] * 5) for tensor in rows)
    bound = median_norm(unet, denoising_loss(unet), rows, 1)
    once, _ = engine_sum(unet, denoising_loss(unet), rows, 1, bound)
    often, _ = engine_sum(unet, denoising_loss(unet), repeated, 5, bound)
    assert_same(often, once)


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_automatic_clipping_equals_brute_force(unet, mode):
    check(unet, denoising_loss(unet), unet_rows(10), 2, clipping="automatic", mode=mode)


def test_norms_of_a_million_entries_keep_single_precision():
    net = nn.Linear(1500, 700, bias=False)
    x = torch.rand(1, 1500)
    found, _ = engine_sum(net, lambda x: net(x).sum(1), (x,), 1, 1.0)
    assert 1.0 - 1e-6 < size(found) <= 1.0


# ----------------------------------------------------------------------------- broken examples


class EveryWay(nn.Module):
    """Layers that between them have every way; some are called twice, and two share a weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.table.weight
        self.mix = nn.Linear(4, 4)

    def forward(self, x, y):
        x = self.norm(self.conv(x) + self.table(y)[:, :, None, None])
        x = self.again(self.again(x).tanh()).permute(0, 2, 3, 1)
        return self.head(self.mix(self.mix(x).tanh()))


def every_way_loss(net):
    def loss(x, y, scale):
        return net(x, y).sin().square().flatten(1).sum(1) * scale

    return loss


def every_way_rows(rows):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 2, 3, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (rows,), generator=generator)
    return x, y, torch.ones(rows, dtype=torch.float64)


# Of one draw: a pixel, or its loss; the last has a finite gradient whose norm is not.
BROKEN = {
    "NaN in the image": (0, math.nan),
    "infinity in the image": (0, math.inf),
    "NaN in the loss": (2, math.nan),
    "infinity in the loss": (2, -math.inf),
    "norm beyond float64": (2, 1e200),
}


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("way", [*WAYS, "loop"])
@pytest.mark.parametrize("broken", BROKEN)
def test_an_example_without_a_finite_norm_contributes_nothing(
    monkeypatch, way, broken, micro_batch_size
):
    taken = force(monkeypatch, way)
    net = randomize(EveryWay())
    loss = every_way_loss(net)
    rows = every_way_rows(10)
    sound = tuple(tensor[[n for n in range(10) if n % 5 != 2]] for tensor in rows)
    bound = median_norm(net, loss, sound, 2)
    which, value = BROKEN[broken]
    broken_rows = tuple(tensor.clone() for tensor in rows)
    broken_rows[which][7].view(-1)[0] = value  # one draw of example 2
    mode = "loop" if way == "loop" else "auto"
    engine = ClippingEngine(net, bound, micro_batch_size, mode=mode)
    for _ in range(2):
        found = sum_of(engine, loss, broken_rows, 2)
        assert_same(found, brute_force(net, loss, sound, 2, bound))
    # and leaves nothing behind in the engine's memory
    assert_same(sum_of(engine, loss, rows, 2), brute_force(net, loss, rows, 2, bound))
    assert mode == "loop" or any(way in ways for ways in taken.values())


@pytest.mark.parametrize("way", ["product", "book-keeping"])
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_an_example_with_a_zero_gradient_is_harmless(monkeypatch, way, micro_batch_size):
    force(monkeypatch, way)
    net = randomize(nn.Linear(3, 2, bias=False))
    x = torch.randn(7, 3).double()
    x[2] = 0.0
    engine = ClippingEngine(net, 0.1, micro_batch_size)
    found = sum_of(engine, square_loss(net), (x,), 1)
    others = [n for n in range(7) if n != 2]
    assert_same(found, brute_force(net, square_loss(net), (x[others],), 1, 0.1))
    assert size(sum_of(engine, square_loss(net), (torch.zeros(3, 3).double(),), 1)) == 0.0


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_the_bound_holds_for_gradients_of_equal_entries(mode):
    """Sums of equal squares are rounded in one direction."""
    net = nn.Linear(64, 64, bias=False)
    engine = ClippingEngine(net, 1.0, mode=mode)
    for value in (0.9919490814208984, 0.7, 1 / 3, 0.99999):
        found = sum_of(engine, lambda x: net(x).sum(1), (torch.full((1, 64), value),), 1)
        assert 0.999 < size(found) <= 1.0
