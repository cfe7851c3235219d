"""The clipping engine with awkward networks, networks it leaves as they were, and user mistakes."""

import logging

import pytest
import torch
import torch.nn.functional as F
from clipping_oracle import (
    assert_same,
    brute_force,
    check,
    denoising_loss,
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
from torch.utils.checkpoint import checkpoint

from dp_synth.errors import UserError
from dp_synth.privacy.clipping import ClippingEngine


@pytest.fixture(scope="module")
def unet():
    return make_unet()


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
        assert_same(found, brute_force(unet, loss, unet_rows(rows), 2, engine.max_grad_norm))


# --------------------------------------------------------------------------- awkward networks


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x):
        return self.norm(self.inner(self.norm(self.inner(x)).tanh()))


class TwiceConvolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        return self.inner(self.inner(x).tanh()[..., :2])


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


USED_TWICE = {
    "linear": (Twice, lambda: torch.randn(14, 3).double(), ["product", "book-keeping"]),
    "convolution": (
        TwiceConvolved,
        lambda: torch.randn(14, 2, 3, 4).double(),
        ["grouped", "example-wise", "windows", "book-keeping"],
    ),
    "tied": (Tied, lambda: torch.randint(0, 5, (14, 2)), ["tables", "product", "book-keeping"]),
}


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name, (_, _, ways) in USED_TWICE.items() for way in ways]
)
def test_a_parameter_used_twice_is_clipped_once(monkeypatch, name, way, micro_batch_size):
    """The norm is that of the sum over uses, which the uses' own norms do not tell."""
    make, make_rows, _ = USED_TWICE[name]
    taken = force(monkeypatch, way)
    net = randomize(make())
    check(net, square_loss(net), (make_rows(),), 2, micro_batch_size=micro_batch_size)
    assert any(way in ways for ways in taken.values())


@pytest.mark.parametrize("name", USED_TWICE)
def test_a_parameter_used_twice_is_clipped_once_by_the_loop(name):
    make, make_rows, _ = USED_TWICE[name]
    net = randomize(make())
    check(net, square_loss(net), (make_rows(),), 2, mode="loop")


class SometimesTwice(nn.Module):
    """Calls its layer once or twice, by a switch: what an engine learnt may stop being so."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.twice = False

    def forward(self, x):
        x = self.inner(x)
        return self.inner(x.tanh()) if self.twice else x


@pytest.mark.parametrize("way", ["product", "book-keeping"])
@pytest.mark.parametrize("first", [False, True])
def test_calls_that_differ_from_the_first(monkeypatch, way, first):
    force(monkeypatch, way)
    net = randomize(SometimesTwice())
    loss, x = square_loss(net), torch.randn(6, 3).double()
    engine = ClippingEngine(net, 1.0)
    for twice in (first, not first, first):
        net.twice = twice
        engine.max_grad_norm = median_norm(net, loss, (x,), 2)
        found = sum_of(engine, loss, (x,), 2)
        assert_same(found, brute_force(net, loss, (x,), 2, engine.max_grad_norm))


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
    assert_same(found, brute_force(net, square_loss(net), (x,), 2, 0.5))


@pytest.mark.parametrize(
    ("net", "layer", "rows"),
    [
        (Bare(), "the network itself (Bare)", torch.randn(6, 3)),
        (nn.Sequential(nn.Tanh(), Subclassed(3, 3)), "1 (Subclassed)", torch.randn(6, 3)),
        (nn.Sequential(nn.PReLU(3)), "0 (PReLU)", torch.randn(6, 3, 4)),
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
    assert_same(found, brute_force(net, loss, (rows.double(),), 2, engine.max_grad_norm))


def test_compiled_networks_take_the_loop():
    net = nn.Sequential(nn.Linear(3, 3))
    net[0].compile(backend="eager")
    assert ClippingEngine(net, 1.0).fallback_reason == "0: compiled"


def test_a_frozen_layer_needs_no_rule():
    net = randomize(nn.Sequential(nn.Linear(3, 3), Subclassed(3, 3)))
    net[1].requires_grad_(False)
    check(net, square_loss(net), (torch.randn(6, 3).double(),), 2)


def test_a_replaced_forward_is_respected():
    net = randomize(nn.Sequential(nn.Linear(3, 3)))
    net[0].forward = lambda x: F.linear(x, net[0].weight) * 3
    check(net, square_loss(net), (torch.randn(6, 3).double(),), 2, recorded=False)
    assert "forward" in vars(net[0])


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
    assert_same(found, brute_force(net, square_loss(net), (x,), 2, 1.0))


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_works_where_gradients_are_switched_off_and_rows_require_them(mode):
    net = randomize(nn.Linear(3, 2))
    x = torch.randn(6, 3).double().requires_grad_()
    with torch.no_grad():
        found, _ = engine_sum(net, square_loss(net), (x,), 2, 0.5, mode=mode)
    assert_same(found, brute_force(net, square_loss(net), (x,), 2, 0.5))
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
        ({"max_grad_norm": 1.0, "clipping": "per layer"}, "clipping.*flat or automatic"),
        ({"max_grad_norm": 1.0, "memory_mib": 0}, "memory_mib"),
        ({"max_grad_norm": 1.0, "memory_mib": float("nan")}, "memory_mib"),
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


# ------------------------------------------------------------------- a network that changes


def test_a_forward_replaced_later_is_respected_and_kept():
    net = randomize(nn.Sequential(nn.Linear(3, 3)))
    x = torch.randn(6, 3).double()
    engine = ClippingEngine(net, 0.5)
    sum_of(engine, square_loss(net), (x,), 2)
    net[0].forward = lambda x: F.linear(x, net[0].weight) * 3
    found = sum_of(engine, square_loss(net), (x,), 2)
    assert "forward" in vars(net[0])
    assert_same(found, brute_force(net, square_loss(net), (x,), 2, 0.5))


def test_a_module_replaced_around_the_same_parameters_is_noticed():
    net = randomize(nn.Sequential(nn.Linear(3, 3)))
    x = torch.randn(6, 3).double()
    engine = ClippingEngine(net, 0.5)
    sum_of(engine, square_loss(net), (x,), 2)
    other = nn.Linear(3, 3)
    other.weight, other.bias = net[0].weight, net[0].bias
    net[0] = other
    found = sum_of(engine, square_loss(net), (x,), 2)
    assert_same(found, brute_force(net, square_loss(net), (x,), 2, 0.5))


def test_a_network_converted_later_is_summed_in_its_own_precision():
    net = nn.Linear(3, 2)
    engine = ClippingEngine(net, 0.5)
    sum_of(engine, square_loss(net), (torch.randn(6, 3),), 2)
    net.double()
    x = torch.randn(6, 3).double()
    found = sum_of(engine, square_loss(net), (x,), 2)
    assert_same(found, brute_force(net, square_loss(net), (x,), 2, 0.5))


@pytest.mark.parametrize("mode", ["auto", "loop"])
def test_whatever_else_the_loss_depends_on_gets_no_gradient(mode):
    """An unclipped one, which an optimizer might take for private."""
    net, scale = randomize(nn.Linear(3, 2)), nn.Parameter(torch.ones(2).double())
    engine = ClippingEngine(net, 0.5, mode=mode)
    engine.accumulate(lambda x: (net(x) * scale).square().sum(1), (torch.randn(6, 3).double(),), 2)
    assert scale.grad is None
