"""The clipping engine against brute force: a loop over examples and draws, and nothing clever."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dp_synth.errors import UserError
from dp_synth.privacy.clipping import ClippingEngine
from dp_synth.privacy.clipping import engine as engine_module

torch.set_num_threads(1)

UNUSED = 1e30  # a bound that clips nothing


def brute_force(net, loss, rows, multiplicity, max_grad_norm):
    """Return the clipped sum as {name: tensor}, and each example's norm."""
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    examples = len(rows[0]) // multiplicity
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    norms = []
    for i in range(examples):
        mean = {name: torch.zeros_like(p) for name, p in params.items()}
        for k in range(multiplicity):
            n = k * examples + i
            value = loss(*(tensor[n : n + 1] for tensor in rows)).sum()
            parts = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            for name, part in zip(params, parts, strict=True):
                if part is not None:
                    mean[name] += part / multiplicity
        norms.append(float(sum(g.double().square().sum() for g in mean.values()) ** 0.5))
        for name, gradient in mean.items():
            total[name] += gradient * min(1.0, max_grad_norm / norms[-1])
    return total, norms


def median_norm(net, loss, rows, multiplicity):
    norms = sorted(brute_force(net, loss, rows, multiplicity, UNUSED)[1])
    return norms[len(norms) // 2] if norms else 1.0


def engine_sum(net, loss, rows, multiplicity, max_grad_norm, **kwargs):
    engine = ClippingEngine(net, max_grad_norm, **kwargs)
    return sum_of(engine, loss, rows, multiplicity), engine


def sum_of(engine, loss, rows, multiplicity):
    for param in engine.net.parameters():
        param.grad = None
    engine.accumulate(loss, rows, multiplicity)
    return {n: p.grad.clone() for n, p in engine.net.named_parameters() if p.requires_grad}


def distance(a, b):
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in b) ** 0.5)


def size(a):
    return distance(a, {name: torch.zeros_like(part) for name, part in a.items()})


def assert_same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    assert distance(found, expected) <= tolerance * size(expected)


def check(net, loss, rows, multiplicity, tolerance=1e-12, recorded=True, **kwargs):
    """The engine equals brute force, with about half of the examples clipped."""
    bound = median_norm(net, loss, rows, multiplicity)
    expected, norms = brute_force(net, loss, rows, multiplicity, bound)
    assert not norms or max(norms) >= bound
    found, engine = engine_sum(net, loss, rows, multiplicity, bound, **kwargs)
    assert (engine.fallback_reason is None) == recorded
    assert_same(found, expected, tolerance)


# ------------------------------------------------------------------------------- a diffusion U-Net


def make_unet(dtype=torch.float64):
    from diffusers import UNet2DModel  # after dp_synth, which makes its imports work everywhere

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=11,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).to(dtype)


@pytest.fixture(scope="module")
def unet():
    return make_unet()


def denoising_loss(net):
    def loss(x, noise, t, y):
        prediction = net(x, t, class_labels=y, return_dict=False)[0]
        return (prediction - noise).square().flatten(1).mean(1)

    return loss


def unet_rows(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 2, 8, 8, generator=generator, dtype=dtype)
    noise = torch.randn(rows, 2, 8, 8, generator=generator, dtype=dtype)
    t = torch.randint(0, 1000, (rows,), generator=generator)
    return x, noise, t, torch.randint(0, 11, (rows,), generator=generator)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded": lambda x: x[:, :, :1].expand(-1, -1, 8, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("examples", "multiplicity"), [(1, 1), (7, 1), (1, 3), (3, 7), (0, 3)])
def test_unet_equals_brute_force(unet, examples, multiplicity, layout):
    x, *others = unet_rows(examples * multiplicity)
    check(unet, denoising_loss(unet), (LAYOUTS[layout](x), *others), multiplicity)


def test_unet_in_channels_last_weights():
    net = make_unet().to(memory_format=torch.channels_last)
    check(net, denoising_loss(net), unet_rows(6), 2)


def test_unet_in_float32():
    net = make_unet(torch.float32)
    check(net, denoising_loss(net), unet_rows(9, torch.float32), 3, tolerance=2e-6)


def test_unet_under_gradient_checkpointing():
    net = make_unet()
    net.enable_gradient_checkpointing()
    check(net, denoising_loss(net), unet_rows(6), 2)


def test_autocast_is_followed_and_leaves_full_precision_sums():
    net = make_unet(torch.float32)
    rows = unet_rows(6, torch.float32)
    bound = median_norm(net, denoising_loss(net), rows, 2)
    exact, _ = brute_force(net, denoising_loss(net), rows, 2, bound)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recorded, engine = engine_sum(net, denoising_loss(net), rows, 2, bound)
        looped, _ = engine_sum(net, denoising_loss(net), rows, 2, bound, mode="loop")
    assert engine.fallback_reason is None
    assert all(part.dtype == torch.float32 for part in recorded.values())
    assert 1e-6 * size(exact) < distance(recorded, exact) < 0.05 * size(exact)
    assert distance(recorded, looped) < 0.05 * size(exact)


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 7, None])
def test_chunks_do_not_matter(unet, mode, micro_batch_size):
    check(
        unet,
        denoising_loss(unet),
        unet_rows(15),
        3,
        micro_batch_size=micro_batch_size,
        mode=mode,
    )


def test_smaller_chunks_after_larger_ones_leave_nothing_behind(unet):
    loss = denoising_loss(unet)
    engine = ClippingEngine(unet, median_norm(unet, loss, unet_rows(6), 2))
    for rows in (12, 2, 6):
        found = sum_of(engine, loss, unet_rows(rows), 2)
        assert_same(found, brute_force(unet, loss, unet_rows(rows), 2, engine.max_grad_norm)[0])


# ------------------------------------------------------------------------- one layer at a time


class Around(nn.Module):
    """A layer inside a network."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def square_loss(net):
    def loss(x):
        y = net(x)
        return (
            (y.sin() * torch.arange(1, y[0].numel() + 1).view(y[0].shape))
            .square()
            .flatten(1)
            .sum(1)
        )

    return loss


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "linear over positions": (lambda: nn.Linear(5, 3), (7, 5)),
    "linear over a grid": (lambda: nn.Linear(5, 3), (2, 3, 5)),
    "linear of one": (lambda: nn.Linear(1, 1), (1,)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 5, 7)),
    "conv without bias": (lambda: nn.Conv2d(3, 5, 3, bias=False), (3, 5, 7)),
    "conv 1x1": (lambda: nn.Conv2d(3, 5, 1), (3, 2, 3)),
    "conv of large input": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 11, 13)),
    "conv to one position": (lambda: nn.Conv2d(3, 5, 3), (3, 3, 3)),
    "conv stride": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 8, 7)),
    "conv uneven": (lambda: nn.Conv2d(3, 5, (1, 3), (2, 1), (0, 2), (1, 2)), (3, 5, 6)),
    "conv dilated stride": (lambda: nn.Conv2d(3, 5, 2, stride=3, dilation=2), (3, 8, 11)),
    "conv groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 5, 4)),
    "conv depthwise": (lambda: nn.Conv2d(3, 6, 3, stride=2, groups=3, padding=1), (3, 5, 4)),
    "conv same": (lambda: nn.Conv2d(3, 5, (2, 3), padding="same"), (3, 5, 4)),
    "conv valid": (lambda: nn.Conv2d(3, 5, 3, padding="valid"), (3, 5, 4)),
    "conv circular": (
        lambda: nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="circular"),
        (3, 5, 4),
    ),
    "conv reflect": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (3, 5, 4)),
    "conv replicate": (
        lambda: nn.Conv2d(3, 5, 3, 2, padding=2, padding_mode="replicate"),
        (3, 5, 4),
    ),
    "group norm": (lambda: nn.GroupNorm(3, 6), (6, 5, 4)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 6), (6,)),
    "group norm of sequences": (lambda: nn.GroupNorm(1, 6), (6, 7)),
    "layer norm": (lambda: nn.LayerNorm(5), (5,)),
    "layer norm over positions": (lambda: nn.LayerNorm(5), (2, 3, 5)),
    "layer norm of shape": (lambda: nn.LayerNorm((3, 5)), (7, 3, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (7, 5)),
}


def randomize(net):
    """Norms start at weight 1 and bias 0, which hides mistakes."""
    torch.manual_seed(2)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn_like(param) * 0.5)
    return net.double()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("examples", "multiplicity"), [(1, 1), (7, 1), (1, 7), (3, 3), (0, 1)])
def test_layer_equals_brute_force(name, examples, multiplicity):
    make, shape = LAYERS[name]
    layer = make()
    net = randomize(Around(layer))
    x = torch.randn(examples * multiplicity, *shape, dtype=torch.float64)
    check(net, square_loss(net), (x,), multiplicity)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_passes_the_right_gradient_on(name):
    """A trained layer in front gets its gradient through this one's input gradient."""
    make, shape = LAYERS[name]
    first = nn.Linear(shape[-1], shape[-1])
    net = randomize(nn.Sequential(first, make()))
    x = torch.randn(6, *shape, dtype=torch.float64)
    check(net, square_loss(net), (x,), 2)


@pytest.mark.parametrize("name", [name for name in LAYERS if "without" not in name])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_half_frozen_layers(name, frozen):
    make, shape = LAYERS[name]
    net = randomize(Around(make()))
    getattr(net.layer, frozen).requires_grad_(False)
    x = torch.randn(6, *shape, dtype=torch.float64)
    check(net, square_loss(net), (x,), 2)
    assert getattr(net.layer, frozen).grad is None
    assert not getattr(net.layer, frozen).requires_grad


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize(("examples", "multiplicity"), [(1, 1), (7, 3), (0, 3)])
def test_embedding(examples, multiplicity, shape, padding_idx):
    net = randomize(nn.Embedding(5, 3, padding_idx=padding_idx))
    index = torch.randint(0, 5, (examples * multiplicity, *shape))
    check(net, square_loss(net), (index,), multiplicity)


@pytest.mark.parametrize("name", ["conv", "conv stride", "group norm"])
def test_layer_in_channels_last(name):
    make, shape = LAYERS[name]
    net = randomize(Around(make()))
    x = torch.randn(6, *shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    # The oracle gets contiguous rows: torch's own group norm backward crashes on
    # channels_last input that needs no gradient (seen with 2.13).
    bound = median_norm(net, square_loss(net), (x.contiguous(),), 2)
    expected, _ = brute_force(net, square_loss(net), (x.contiguous(),), 2, bound)
    found, _ = engine_sum(net, square_loss(net), (x,), 2, bound)
    assert_same(found, expected)


# --------------------------------------------------------------------------- awkward networks


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x):
        return self.norm(self.inner(self.norm(self.inner(x)).tanh()))


class Tied(nn.Module):
    """A table used for looking up and, as the same parameter, for projecting."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.table.weight

    def forward(self, index):
        return self.head(self.table(index).tanh())


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x) * self.scale


class Subclassed(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Positional(nn.Module):
    """Its table is looked up once for all rows: the rows are not in the leading dimension."""

    def __init__(self):
        super().__init__()
        self.places = nn.Embedding(4, 3)

    def forward(self, x):
        return x + self.places(torch.arange(4))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_a_module_called_twice_is_clipped_once(mode):
    net = randomize(Twice())
    check(net, square_loss(net), (torch.randn(6, 3).double(),), 2, mode=mode)


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_tied_parameters_are_one(mode):
    net = randomize(Tied())
    check(net, square_loss(net), (torch.randint(0, 5, (14, 2)),), 2, mode=mode)


def test_activation_checkpointing_records_once():
    net = randomize(Checkpointed(use_reentrant=False))
    check(net, square_loss(net), (torch.randn(6, 3).double(),), 2)


def test_unused_parameters_get_a_zero_gradient():
    net = randomize(nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)}))
    engine = ClippingEngine(net, 1.0)
    for _ in range(2):  # the second time into memory that has been used
        found = sum_of(engine, square_loss(net["used"]), (torch.randn(6, 3).double(),), 2)
        assert found["used.weight"].norm() > 0
        assert found["unused.weight"].norm() == 0


def test_only_part_of_a_network_is_trained(unet):
    net = make_unet()
    for name, param in net.named_parameters():
        param.requires_grad_("attentions" in name)
    check(net, denoising_loss(net), unet_rows(6), 2)
    assert all(p.requires_grad == ("attentions" in n) for n, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters() if not p.requires_grad)


def test_parameters_frozen_after_construction():
    net = randomize(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)))
    x = torch.randn(6, 3).double()
    engine = ClippingEngine(net, 0.5)
    sum_of(engine, square_loss(net), (x,), 2)
    net[0].requires_grad_(False)
    found = sum_of(engine, square_loss(net), (x,), 2)
    assert_same(found, brute_force(net, square_loss(net), (x,), 2, 0.5)[0])


@pytest.mark.parametrize(
    ("net", "layer", "rows"),
    [
        (Bare(), "the network itself (Bare)", torch.randn(6, 3)),
        (nn.Sequential(nn.Tanh(), Subclassed(3, 3)), "1 (Subclassed)", torch.randn(6, 3)),
        (nn.Sequential(nn.Conv1d(3, 2, 2)), "0 (Conv1d)", torch.randn(6, 3, 4)),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))),
            "0 (Param",
            torch.randn(6, 3),
        ),
        (Positional(), "places", torch.randn(6, 4, 3)),
        (
            nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2), nn.Unflatten(0, (-1, 4))),
            "1:",
            torch.randn(6, 4, 3),
        ),
    ],
    ids=["bare parameter", "subclass", "other layer", "parametrized", "positional", "flattened"],
)
def test_a_layer_without_a_rule_takes_the_loop(caplog, net, layer, rows):
    net = randomize(net)
    loss = square_loss(net)
    with caplog.at_level(logging.WARNING, logger="dp_synth"):
        engine = ClippingEngine(net, median_norm(net, loss, (rows.double(),), 2))
        for _ in range(2):
            found = sum_of(engine, loss, (rows.double(),), 2)
    assert layer in engine.fallback_reason
    assert [record.name for record in caplog.records] == ["dp_synth"], "told once"
    assert_same(found, brute_force(net, loss, (rows.double(),), 2, engine.max_grad_norm)[0])


def test_compiled_networks_take_the_loop():
    net = nn.Sequential(nn.Linear(3, 3))
    net[0].compile(backend="eager")
    assert ClippingEngine(net, 1.0).fallback_reason == "0: compiled"


def test_memory_bounds_the_chunks_where_no_size_is_given(monkeypatch):
    net = randomize(nn.Linear(3, 2))
    monkeypatch.setattr(engine_module, "_CPU_MATRIX_BYTES", 3 * 4096 * 8)  # of three examples
    sizes = []

    def loss(x):
        sizes.append(len(x))
        return square_loss(net)(x)

    x = torch.randn(14, 3).double()
    found, _ = engine_sum(net, loss, (x,), 2, 0.5)
    assert sizes == [6, 6, 2]
    assert_same(found, brute_force(net, square_loss(net), (x,), 2, 0.5)[0])


def test_a_frozen_layer_needs_no_rule():
    net = randomize(nn.Sequential(nn.Linear(3, 3), Subclassed(3, 3)))
    net[1].requires_grad_(False)
    check(net, square_loss(net), (torch.randn(6, 3).double(),), 2)


def test_a_replaced_forward_is_respected():
    net = randomize(nn.Sequential(nn.Linear(3, 3)))
    net[0].forward = lambda x: F.linear(x, net[0].weight) * 3
    check(net, square_loss(net), (torch.randn(6, 3).double(),), 2, recorded=False)
    assert "forward" in vars(net[0])


# ------------------------------------------------------------------------------- the guarantee


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_no_example_moves_the_sum_by_more_than_the_bound(unet, mode):
    loss = denoising_loss(unet)
    rows = unet_rows(14)
    examples, bound = 7, median_norm(unet, loss, unet_rows(14), 2)
    together, _ = engine_sum(unet, loss, rows, 2, bound, mode=mode)
    for i in range(examples):
        others = [n for n in range(14) if n % examples != i]
        without, _ = engine_sum(unet, loss, tuple(r[others] for r in rows), 2, bound, mode=mode)
        assert distance(together, without) <= bound * (1 + 1e-9)
        alone, _ = engine_sum(unet, loss, tuple(r[i::examples] for r in rows), 2, bound, mode=mode)
        assert size(alone) <= bound * (1 + 1e-9)
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
    assert 0 < distance(first, second) <= 2 * bound * (1 + 1e-9)


def test_identical_draws_count_once(unet):
    rows = unet_rows(3)
    repeated = tuple(torch.cat([tensor] * 5) for tensor in rows)
    bound = median_norm(unet, denoising_loss(unet), rows, 1)
    once, _ = engine_sum(unet, denoising_loss(unet), rows, 1, bound)
    often, _ = engine_sum(unet, denoising_loss(unet), repeated, 5, bound)
    assert_same(often, once)


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e200])
def test_an_example_without_a_finite_gradient_contributes_nothing(unet, mode, broken):
    loss = denoising_loss(unet)
    rows = unet_rows(10)
    rows[0][7, 0, 3, 3] = broken  # one draw of example 2
    rows[1][7, 0, 3, 3] = broken
    others = [n for n in range(10) if n % 5 != 2]
    found, engine = engine_sum(unet, loss, rows, 2, 0.1, mode=mode)
    expected, _ = brute_force(unet, loss, tuple(tensor[others] for tensor in rows), 2, 0.1)
    assert_same(found, expected)
    # and leaves nothing behind in the engine's memory
    assert_same(
        sum_of(engine, loss, unet_rows(10), 2), brute_force(unet, loss, unet_rows(10), 2, 0.1)[0]
    )


def test_an_example_with_a_zero_gradient_is_harmless():
    net = nn.Linear(3, 2, bias=False).double()
    x = torch.zeros(2, 3).double()
    found, _ = engine_sum(net, lambda x: net(x).sum(1), (x,), 1, 1.0)
    assert size(found) == 0.0


def test_norms_of_a_million_entries_keep_single_precision():
    net = nn.Linear(1500, 700, bias=False)
    x = torch.rand(2, 1500)
    found, _ = engine_sum(net, lambda x: net(x).sum(1), (x[:1],), 1, 1.0)
    assert abs(size(found) - 1.0) < 1e-6


# ------------------------------------------------------------------- what happens to the network


def test_sums_are_added_to_what_is_there():
    net = randomize(nn.Linear(3, 2))
    x = torch.randn(6, 3).double()
    once, engine = engine_sum(net, square_loss(net), (x,), 2, 0.5)
    engine.accumulate(square_loss(net), (x,), 2)
    assert_same({n: p.grad for n, p in net.named_parameters()}, {n: 2 * g for n, g in once.items()})


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_an_empty_batch_makes_zeros_and_does_not_call_the_loss(mode):
    net = nn.Linear(3, 2)

    def loss(x):
        raise AssertionError

    found, _ = engine_sum(net, loss, (torch.empty(0, 3),), 4, 1.0, mode=mode)
    assert size(found) == 0.0


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_the_network_is_untouched_between_calls(mode):
    net = make_unet()
    rows = unet_rows(6)

    def call():
        return net(rows[0], rows[2], class_labels=rows[3]).sample

    keys, modules, before = list(net.state_dict()), list(net.modules()), call()
    dictionaries = [dict(vars(module)) for module in modules]
    values = {name: value.clone() for name, value in net.state_dict().items()}
    engine = ClippingEngine(net, 1.0, mode=mode)
    engine.accumulate(denoising_loss(net), rows, 2)
    assert torch.equal(call(), before)
    assert list(net.state_dict()) == keys
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
    assert all(vars(m).keys() == d.keys() for m, d in zip(modules, dictionaries, strict=True))
    assert all(p.requires_grad for p in net.parameters())
    assert call().requires_grad

    engine.remove()
    assert [dict(vars(module)) for module in modules] == dictionaries
    with pytest.raises(RuntimeError, match="removed"):
        engine.accumulate(denoising_loss(net), rows, 2)


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_an_exception_in_the_loss_changes_nothing(mode):
    net = randomize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    calls = []

    def loss(x):
        net(x)
        calls.append(len(x))
        if len(calls) == 2:
            raise KeyError("mine")
        return net(x).square().sum(1)

    engine = ClippingEngine(net, 1.0, micro_batch_size=2, mode=mode)
    x = torch.randn(6, 3).double()
    with pytest.raises(KeyError, match="mine"):
        engine.accumulate(loss, (x,), 2)
    assert all(param.grad is None and param.requires_grad for param in net.parameters())
    assert not any("forward" in vars(module) for module in net.modules())
    found = sum_of(engine, square_loss(net), (x,), 2)
    assert_same(found, brute_force(net, square_loss(net), (x,), 2, 1.0)[0])


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_works_where_gradients_are_switched_off_and_rows_require_them(mode):
    net = randomize(nn.Linear(3, 2))
    x = torch.randn(6, 3).double().requires_grad_()
    with torch.no_grad():
        found, _ = engine_sum(net, square_loss(net), (x,), 2, 0.5, mode=mode)
    assert_same(found, brute_force(net, square_loss(net), (x,), 2, 0.5)[0])
    assert x.grad is None


# -------------------------------------------------------------------------------- user mistakes


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm"),
        ({"max_grad_norm": 1.0, "micro_batch_size": 0}, "micro_batch_size"),
        ({"max_grad_norm": 1.0, "mode": "ghost"}, "mode"),
    ],
)
def test_wrong_values_are_named(kwargs, word):
    with pytest.raises(UserError, match=word):
        ClippingEngine(nn.Linear(3, 2), **kwargs)


@pytest.mark.parametrize(
    ("rows", "multiplicity", "word"),
    [
        ((torch.zeros(7, 3),), 2, "multiplicity"),
        ((torch.zeros(6, 3),), 0, "multiplicity"),
        ((torch.zeros(6, 3), torch.zeros(4)), 2, "length"),
        ((), 2, "length"),
    ],
)
def test_wrong_rows_are_named(rows, multiplicity, word):
    net = nn.Linear(3, 2)
    with pytest.raises(UserError, match=word):
        ClippingEngine(net, 1.0).accumulate(lambda x, *_: net(x).sum(1), rows, multiplicity)


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_wrong_losses_are_named(mode):
    net = nn.Linear(3, 2)
    engine = ClippingEngine(net, 1.0, mode=mode)
    with pytest.raises(UserError, match="one value per row"):
        engine.accumulate(lambda x: net(x).mean(), (torch.zeros(6, 3),), 2)
    with pytest.raises(UserError, match="does not depend"):
        engine.accumulate(lambda x: x.sum(1), (torch.zeros(6, 3),), 2)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)]
)
def test_layers_that_remember_examples_are_refused(layer):
    with pytest.raises(UserError, match="1 .*GroupNorm"):
        ClippingEngine(nn.Sequential(nn.Conv2d(3, 3, 1), layer), 1.0)


def test_a_network_with_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="no trainable parameter"):
        ClippingEngine(nn.Linear(3, 2).requires_grad_(False), 1.0)
