"""The self-check lets honest engines pass, and names what is wrong with the others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dp_synth.errors import UserError
from dp_synth.privacy.clipping import ClippingEngine, check_engine, layers
from dp_synth.privacy.clipping.gradients import ExampleGradients

torch.set_num_threads(1)

EXAMPLES, DRAWS = 5, 2


class AllLayers(nn.Module):
    """One layer of each type that has a rule; images [R, 2, 6, 6] and labels [R] to images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.group_norm = nn.GroupNorm(3, 6)
        self.embedding = nn.Embedding(7, 6)
        self.dropout = nn.Dropout(0.5)
        self.layer_norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 6)

    def forward(self, x, y):
        x = self.group_norm(self.conv(x).tanh()) + self.embedding(y)[:, :, None, None]
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


def self_check(net, mode="auto", **kwargs):
    dtype = next(net.parameters()).dtype
    check_engine(
        ClippingEngine(net, 1.0, mode=mode), loss_of(net), random_rows(dtype), DRAWS, **kwargs
    )


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_honest_engines_pass(mode, dtype):
    self_check(make(dtype=dtype), mode)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 7])
def test_honest_engines_pass_in_chunks(micro_batch_size):
    net = make()
    engine = ClippingEngine(net, 1.0, micro_batch_size)
    check_engine(engine, loss_of(net), random_rows(), DRAWS)


def test_honest_engines_pass_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        self_check(make())


def test_a_diffusion_unet_passes_with_one_image_layout_and_another():
    from diffusers import UNet2DModel  # after dp_synth, which makes its imports work everywhere

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=11,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    engine = ClippingEngine(net, 1.0)

    def loss(x, noise, t, y):
        prediction = net(x, t, class_labels=y, return_dict=False)[0]
        return (prediction - noise).square().flatten(1).mean(1)

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

RULES = {
    "linear_weight_grads": "linear.weight",
    "linear_bias_grads": "linear.bias",
    "conv2d_weight_grads": "conv.weight",
    "conv2d_bias_grads": "conv.bias",
    "layer_norm_affine_grads": "layer_norm.(weight|bias)",
    "group_norm_grads": "group_norm.(weight|bias)",
    "embedding_weight_grads": "embedding.weight",
}
FAULTS = {
    "scaled": lambda grads: grads * 1.01,
    "zero": torch.zeros_like,
    "negated": lambda grads: -grads,
    "transposed": lambda grads: grads.flip(-1),
    "of one example for all": lambda grads: grads[:1].expand_as(grads),
    "not a number": lambda grads: grads * float("nan"),
}


def plant(monkeypatch, rule, fault):
    """Spoil what a rule returns for the parameters; input gradients stay right."""
    honest = getattr(layers, rule)

    def spoilt(*args):
        grads = honest(*args)
        if isinstance(grads, tuple):
            parameters = 1 if rule == "group_norm_grads" else 0
            return grads[:parameters] + tuple(fault(part) for part in grads[parameters:])
        return fault(grads)

    monkeypatch.setattr(layers, rule, spoilt)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rule", RULES)
def test_a_fault_in_a_rule_is_caught_and_named(monkeypatch, rule, fault):
    net = make()
    plant(monkeypatch, rule, FAULTS[fault])
    with pytest.raises(UserError, match=RULES[rule] if fault != "not a number" else "parameter"):
        self_check(net)
    self_check(net, mode="loop")  # which uses no rule


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
    self_check(make(LowRank))
    plant(monkeypatch, "linear_weight_grads", FAULTS["zero"])
    with pytest.raises(UserError, match="(up|down).weight"):
        self_check(make(LowRank))


class Bypassed(AllLayers):
    """Uses a layer's weight without calling the layer."""

    def forward(self, x, y):
        x = self.group_norm(self.conv(x)) + self.embedding(y)[:, :, None, None]
        x = self.layer_norm(x.permute(0, 2, 3, 1))
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
        plant(monkeypatch, "linear_weight_grads", FAULTS["scaled"])
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
