"""The self-check lets honest engines pass, and names what is wrong with the others."""

import pytest
import torch
import torch.nn.functional as F
from clipping_oracle import denoising_loss, force, make_unet
from torch import nn

from dp_synth.errors import UserError
from dp_synth.privacy.clipping import ClippingEngine, check_engine, gradients
from dp_synth.privacy.clipping.book_keeping import BookKept
from dp_synth.privacy.clipping.contributions import Dense
from dp_synth.privacy.clipping.gradients import ExampleGradients
from dp_synth.privacy.clipping.recording import Call

torch.set_num_threads(1)

EXAMPLES, DRAWS = 5, 2
WAYS = ["grouped", "example-wise", "windows", "book-keeping", "tables", "product"]


class AllLayers(nn.Module):
    """Layers of each type that has a rule; images [R, 2, 6, 6] and labels [R] to images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.group_norm = nn.GroupNorm(3, 6)
        self.embedding = nn.Embedding(7, 6)
        self.dropout = nn.Dropout(0.5)
        self.conv_1d = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.conv_3d = nn.Conv3d(2, 2, (3, 2, 3), padding=(1, 0, 1))
        self.transposed = nn.ConvTranspose2d(6, 6, 2)
        self.layer_norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 6)

    def forward(self, x, y):
        x = self.group_norm(self.conv(x).tanh()) + self.embedding(y)[:, :, None, None]
        x = self.conv_1d(x.flatten(2)).view(len(x), 2, 3, 6, 6)
        x = self.transposed(self.conv_3d(x).flatten(1, 2).tanh())
        x = self.layer_norm(self.dropout(x).permute(0, 2, 3, 1)).sin()
        return self.linear(x)


def make(net_class=AllLayers, dtype=torch.float32):
    torch.manual_seed(0)
    return net_class().to(dtype)


def loss_of(net):
    def loss(x, y):
        return net(x, y).cos().square().flatten(1).sum(1) * (1 + x.flatten(1).mean(1).square())

    return loss


def random_rows(dtype=torch.float32, examples=EXAMPLES, draws=DRAWS):
    generator = torch.Generator().manual_seed(1)
    rows = examples * draws
    x = torch.randn(rows, 2, 6, 6, generator=generator).to(dtype)
    return x, torch.randint(0, 7, (rows,), generator=generator)


def self_check(net, mode="auto", clipping="flat"):
    engine = ClippingEngine(net, 1.0, EXAMPLES * DRAWS, mode=mode, clipping=clipping)
    check_engine(engine, loss_of(net), random_rows(next(net.parameters()).dtype), DRAWS)
    assert engine.fallback_reason is None


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_honest_engines_pass(mode, dtype, clipping):
    self_check(make(dtype=dtype), mode, clipping)


@pytest.mark.parametrize("way", WAYS)
def test_honest_engines_pass_in_every_way(monkeypatch, way):
    taken = force(monkeypatch, way)
    self_check(make())
    assert any(way in ways for ways in taken.values())


@pytest.mark.parametrize("micro_batch_size", [1, 4, 7, None])
def test_honest_engines_pass_in_chunks(micro_batch_size):
    net = make()
    engine = ClippingEngine(net, 1.0, micro_batch_size)
    check_engine(engine, loss_of(net), random_rows(), DRAWS)


def test_honest_engines_pass_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        self_check(make())


def test_a_diffusion_unet_passes_with_one_image_layout_and_another():
    net = make_unet(torch.float32, in_channels=1, out_channels=1)
    engine, loss = ClippingEngine(net, 1.0), denoising_loss(net)
    x, noise = torch.randn(2, EXAMPLES * DRAWS, 1, 8, 8)
    t, y = torch.arange(EXAMPLES * DRAWS) * 90, torch.arange(EXAMPLES * DRAWS)
    check_engine(engine, loss, (x, noise, t, y), DRAWS)
    check_engine(engine, loss, (x.to(memory_format=torch.channels_last), noise, t, y), DRAWS)
    assert engine.fallback_reason is None


class LowRank(AllLayers):
    """A frozen linear layer with a trained low-rank update whose second factor starts at zero."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        self.down = nn.Linear(6, 2, bias=False)
        self.up = nn.Linear(2, 6, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x, y):
        x = super().forward(x, y)
        return x + self.up(self.down(x))


# ------------------------------------------------------------------------------- planted faults

CONV = ["grouped", "example-wise"]
WAYS_OF_WEIGHTS = {
    "conv": [*CONV, "windows", "book-keeping"],
    "conv_1d": CONV,
    "conv_3d": CONV,
    "transposed": CONV,
    "linear": ["product", "book-keeping"],
    "embedding": ["tables", "book-keeping"],
    "group_norm": ["no choice"],
    "layer_norm": ["no choice"],
}
WEIGHTS = [(f"{layer}.weight", way) for layer, ways in WAYS_OF_WEIGHTS.items() for way in ways]
BIASES = [(f"{layer}.bias", "no choice") for layer in WAYS_OF_WEIGHTS if layer != "embedding"]
BOOK_KEPT = [param for param, way in WEIGHTS if way == "book-keeping"]

# Of gradients [b, *shape].
FAULTS = {
    "scaled": lambda grads: grads * 1.01,
    "zero": torch.zeros_like,
    "negated": lambda grads: -grads,
    "flipped": lambda grads: grads.flip(-1),
    "of one example for all": lambda grads: grads[:1].expand_as(grads),
    "not a number": lambda grads: grads * float("nan"),
}
# Of squared norms [b].
NORM_FAULTS = {
    "scaled up": lambda squares: squares * 1.01,
    "scaled down": lambda squares: squares * 0.99,
    "zero": torch.zeros_like,
    "of other examples": lambda squares: squares.roll(1),
    "of one example for all": lambda squares: squares[:1].expand_as(squares),
    "not a number": lambda squares: squares * float("nan"),
}


def plant(monkeypatch, net, param, spoil):
    """Spoil what a layer contributes to one of its parameters; its input gradients stay right."""
    honest = ExampleGradients.add

    def add(grads, to, contribution):
        if to is net.get_parameter(param):
            contribution = spoil(contribution)
        honest(grads, to, contribution)

    monkeypatch.setattr(ExampleGradients, "add", add)


def spoilt_gradients(fault):
    """A book-kept parameter's gradients are seen in the weighted sum, as are others'."""

    def spoil(contribution):
        spoilt = Dense(fault(contribution.dense()))
        if isinstance(contribution, BookKept):
            return SpoiltBookKept(contribution, total=spoilt.weighted_sum)
        return spoilt

    return spoil


def spoilt_book_keeping(norms=lambda squares: squares, total=lambda weighted: weighted):
    def spoil(contribution):
        assert isinstance(contribution, BookKept)
        return SpoiltBookKept(
            contribution, norms, lambda *args: total(contribution.weighted_sum(*args))
        )

    return spoil


class SpoiltBookKept(BookKept):
    """Book-kept gradients that lie about their norms, or their sum."""

    def __init__(self, honest, norms=lambda squares: squares, total=None):
        self.dense = honest.dense
        self.squared_norms = lambda: norms(honest.squared_norms())
        self.weighted_sum = total


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("param", "way"), WEIGHTS + BIASES)
def test_a_fault_in_a_rule_is_caught_and_named(monkeypatch, param, way, fault):
    force(monkeypatch, way)
    net = make()
    plant(monkeypatch, net, param, spoilt_gradients(FAULTS[fault]))
    # Without a norm all examples are left out, so that every parameter is equally off.
    named = "" if fault == "not a number" and way != "book-keeping" else f"{param}:"
    with pytest.raises(UserError, match=f"self-check failed at parameter {named}"):
        self_check(net)


def test_the_loop_uses_no_rule(monkeypatch):
    def add_nothing(call, *_):
        raise AssertionError

    monkeypatch.setattr(Call, "add", add_nothing)
    monkeypatch.setattr(Call, "add_weight", add_nothing)
    self_check(make(), mode="loop")


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("fault", NORM_FAULTS)
@pytest.mark.parametrize("param", BOOK_KEPT)
def test_a_wrong_book_kept_norm_is_caught(monkeypatch, param, fault, clipping):
    """One layer's norm is a small part of the whole one: double precision shows the difference."""
    taken = force(monkeypatch, "book-keeping")
    net = make(dtype=torch.float64)
    plant(monkeypatch, net, param, spoilt_book_keeping(norms=NORM_FAULTS[fault]))
    with pytest.raises(UserError, match="self-check failed at parameter"):
        self_check(net, clipping=clipping)
    assert "book-keeping" in taken[param.removesuffix(".weight")]


@pytest.mark.parametrize("fault", ["scaled", "zero", "negated", "flipped", "not a number"])
@pytest.mark.parametrize("param", BOOK_KEPT)
def test_a_wrong_book_kept_sum_is_caught_and_named(monkeypatch, param, fault):
    force(monkeypatch, "book-keeping")
    net = make()
    plant(monkeypatch, net, param, spoilt_book_keeping(total=FAULTS[fault]))
    with pytest.raises(UserError, match=f"self-check failed at parameter {param}:"):
        self_check(net)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda factors: factors * 0.98,
        lambda factors: factors * 1.02,
        torch.ones_like,
        lambda factors: factors.roll(1),
    ],
    ids=["too small", "too large", "not clipped", "of other examples"],
)
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_wrong_factors_are_caught(monkeypatch, clipping, wrong, way):
    force(monkeypatch, way)
    honest = gradients.clip_factors
    monkeypatch.setattr(gradients, "clip_factors", lambda *args: wrong(honest(*args)))
    with pytest.raises(UserError, match="self-check failed"):
        self_check(make(), clipping=clipping)


@pytest.mark.parametrize(("taken", "wanted"), [("flat", "automatic"), ("automatic", "flat")])
def test_the_other_clipping_is_caught(monkeypatch, taken, wanted):
    honest = gradients.clip_factors

    def other(norms, bound, clipping, dtype):
        return honest(norms, bound, "flat" if bound == float("inf") else taken, dtype)

    monkeypatch.setattr(gradients, "clip_factors", other)
    with pytest.raises(UserError, match="clipped sum"):
        self_check(make(), clipping=wanted)


@pytest.mark.parametrize("factor", [0.5, 0.98, 1.02, float("nan")])
def test_a_fault_in_the_norm_is_caught(monkeypatch, factor):
    honest = ExampleGradients.norms
    monkeypatch.setattr(ExampleGradients, "norms", lambda grads: honest(grads) * factor)
    with pytest.raises(UserError, match="self-check failed"):
        self_check(make())


def test_draws_clipped_one_by_one_are_caught(monkeypatch):
    net = make()
    engine = ClippingEngine(net, 1.0)
    honest = engine.accumulate

    def each_draw(loss, rows, multiplicity):
        honest(lambda *draw: loss(*draw) / multiplicity, rows, 1)

    monkeypatch.setattr(engine, "accumulate", each_draw)
    with pytest.raises(UserError, match="clipped sum"):
        check_engine(engine, loss_of(net), random_rows(), DRAWS)


def test_a_fault_that_only_trained_low_rank_factors_show_is_caught(monkeypatch):
    net = make(LowRank)
    self_check(net)
    plant(monkeypatch, net, "down.weight", spoilt_gradients(FAULTS["zero"]))
    with pytest.raises(UserError, match="down.weight"):
        self_check(net)


class Bypassed(AllLayers):
    """Uses a layer's weight without calling the layer."""

    def forward(self, x, y):
        x = self.group_norm(self.conv(x)) + self.embedding(y)[:, :, None, None]
        x = self.conv_3d(self.conv_1d(x.flatten(2)).view(len(x), 2, 3, 6, 6)).flatten(1, 2)
        x = self.layer_norm(self.transposed(x).permute(0, 2, 3, 1))
        return F.linear(x, self.linear.weight, self.linear.bias)


def test_a_parameter_that_the_engine_does_not_cover_is_named():
    with pytest.raises(UserError, match="linear.(weight|bias)"):
        self_check(make(Bypassed))


def test_a_loss_that_mixes_rows_is_caught():
    net = make()
    honest = loss_of(net)

    def loss(x, y):
        losses = honest(x, y)
        return losses * losses.mean()

    with pytest.raises(UserError, match="self-check failed"):
        check_engine(ClippingEngine(net, 1.0), loss, random_rows(), DRAWS)


def test_unsound_losses_and_too_few_rows_are_refused():
    net = make()
    engine = ClippingEngine(net, 1.0)
    with pytest.raises(UserError, match="not finite"):
        check_engine(engine, lambda x, y: loss_of(net)(x, y) * float("nan"), random_rows(), DRAWS)
    with pytest.raises(UserError, match="at least 2"):
        check_engine(engine, loss_of(net), random_rows(examples=1), DRAWS)


# --------------------------------------------------------------------------- nothing is left behind


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(monkeypatch, fails):
    net = make()
    net.conv.eval()  # an uneven mode, to be kept
    net.embedding.weight.requires_grad_(False)
    net.linear.weight.grad = torch.ones_like(net.linear.weight)
    values = {name: value.clone() for name, value in net.state_dict().items()}
    grads = {name: param.grad for name, param in net.named_parameters()}
    modes = [module.training for module in net.modules()]
    trained = [param.requires_grad for param in net.parameters()]
    engine = ClippingEngine(net, 0.125)
    random_state = torch.get_rng_state()
    if fails:
        plant(monkeypatch, net, "linear.weight", spoilt_gradients(FAULTS["scaled"]))
        with pytest.raises(UserError):
            check_engine(engine, loss_of(net), random_rows(), DRAWS)
    else:
        check_engine(engine, loss_of(net), random_rows(), DRAWS)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert engine.max_grad_norm == 0.125
    assert [module.training for module in net.modules()] == modes
    assert [param.requires_grad for param in net.parameters()] == trained
    assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
    assert all(param.grad is grads[name] for name, param in net.named_parameters())
    assert torch.equal(net.linear.weight.grad, torch.ones_like(net.linear.weight))
    assert not any("forward" in vars(module) for module in net.modules())
