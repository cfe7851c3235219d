"""The Opacus engine against brute force and against ours; what it refuses; that it leaves no trace."""

import json
import warnings

import pytest
import torch
from conftest import SHORT, tiny_diffusion, tiny_net
from torch import nn

from dp_synth import plan as plan_command
from dp_synth import train
from dp_synth.errors import UserError
from dp_synth.privacy.clipping import ClippingEngine, check_engine
from dp_synth.privacy.clipping import opacus as opacus_module
from dp_synth.privacy.clipping.choice import make_engine
from dp_synth.privacy.clipping.opacus import OpacusEngine
from dp_synth.privacy.plan import PrivacyPlan

PLAN = PrivacyPlan(
    eps=1, delta=1e-3, max_grad_norm=0.25, batch_size=2, steps=1, num_examples=7, engine="opacus"
)
GAMMA = 0.01  # of automatic clipping, in the paper


def random_rows(examples, dtype=torch.float64):
    generator = torch.Generator().manual_seed(examples)
    x0, noise = torch.randn(2, examples, 1, 4, 4, generator=generator, dtype=dtype)
    t = torch.randint(0, 50, (examples,), generator=generator)
    return x0, noise, t, torch.randint(0, 4, (examples,), generator=generator)


def example_gradients(net, loss, rows):
    """One backward per example, [B, weights]; the order is that of the trainable parameters."""
    params = [p for p in net.parameters() if p.requires_grad]
    found = torch.zeros(len(rows[0]), sum(p.numel() for p in params), dtype=params[0].dtype)
    for i in range(len(rows[0])):
        value = loss(*(tensor[i : i + 1] for tensor in rows)).sum()
        parts = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
        found[i] = torch.cat([part.flatten() for part in parts])
    return found


def engine_sum(engine, loss, rows):
    engine.net.zero_grad(set_to_none=True)
    engine.accumulate(loss, rows)
    assert not any(p.grad is not None and p.grad.requires_grad for p in engine.net.parameters())
    return torch.cat([p.grad.flatten() for p in engine.net.parameters() if p.requires_grad])


def distance(found, expected):
    """Relative, and absolute where zero is expected."""
    return float((found - expected).norm() / (expected.norm() or 1))


@pytest.fixture(scope="module")
def unet():
    return tiny_net().double()


@pytest.fixture(scope="module")
def loss(unet):
    return tiny_diffusion().row_loss(unet)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
@pytest.mark.parametrize("examples", [0, 1, 7])
def test_a_unet_equals_brute_force_and_our_engine(unet, loss, examples, micro_batch_size, clipping):
    rows = random_rows(examples)
    gradients = example_gradients(unet, loss, rows)
    norms = gradients.norm(dim=1)
    bound = float(norms.median()) if examples else 1.0  # about half of the examples are clipped
    factors = {
        "flat": (bound / norms).clamp(max=1),
        "automatic": bound / (norms + GAMMA),
    }[clipping]
    engine = OpacusEngine(unet, bound, micro_batch_size, clipping=clipping)
    found = engine_sum(engine, loss, rows)
    assert distance(found, factors @ gradients) <= 1e-10
    ours = engine_sum(ClippingEngine(unet, bound, clipping=clipping), loss, rows)
    assert distance(found, ours) <= 1e-10
    engine.accumulate(loss, rows)
    twice = torch.cat([p.grad.flatten() for p in unet.parameters()])
    assert distance(twice, 2 * found) <= 1e-10


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 2e-6), (True, 0.05)])
def test_lower_precision(autocast, tolerance):
    net = tiny_net()
    loss, rows = tiny_diffusion().row_loss(net), random_rows(7, torch.float32)
    gradients = example_gradients(net, loss, rows).double()
    norms = gradients.norm(dim=1)
    expected = (norms.median() / norms).clamp(max=1) @ gradients
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = engine_sum(OpacusEngine(net, float(norms.median())), loss, rows)
    assert found.dtype == torch.float32
    assert distance(found.double(), expected) <= tolerance


def test_a_long_gradient_in_float32_is_clipped_to_the_bound_and_not_further():
    """Summing a million squares in float32 is 1e-5 off, or more."""
    torch.manual_seed(0)
    net = nn.Linear(1500, 1500, bias=False)
    found = engine_sum(
        OpacusEngine(net, 1.0), lambda x: net(x).square().sum(1), (torch.randn(1, 1500),)
    )
    assert 1 - 2e-6 <= float(found.double().norm()) <= 1


def test_frozen_parameters_have_no_part(loss, unet):
    rows = random_rows(5)
    try:
        for name, param in unet.named_parameters():
            param.requires_grad_("attentions" in name or name.endswith("norm1.bias"))
        gradients = example_gradients(unet, loss, rows)
        bound = float(gradients.norm(dim=1).median())
        factors = (bound / gradients.norm(dim=1)).clamp(max=1)
        found = engine_sum(OpacusEngine(unet, bound), loss, rows)
        assert distance(found, factors @ gradients) <= 1e-10
        assert all((p.grad is None) != p.requires_grad for p in unet.parameters())
    finally:
        unet.requires_grad_(True)


class CalledTwice(nn.Module):
    """One layer twice in a row: its two gradients add up before the norm."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.first(self.first(x).tanh()))


def test_a_layer_called_twice_is_clipped_once():
    net = CalledTwice().double()

    def loss(x):
        return net(x).square().sum(1)

    rows = (torch.randn(5, 3, dtype=torch.float64),)
    gradients = example_gradients(net, loss, rows)
    bound = float(gradients.norm(dim=1).median())
    factors = (bound / gradients.norm(dim=1)).clamp(max=1)
    assert distance(engine_sum(OpacusEngine(net, bound), loss, rows), factors @ gradients) <= 1e-10


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_contributes_nothing(unet, loss, broken):
    x0, *others = random_rows(5)
    x0[2] = broken
    kept = [0, 1, 3, 4]
    engine = OpacusEngine(unet, 0.5)
    found = engine_sum(engine, loss, (x0, *others))
    expected = engine_sum(engine, loss, tuple(tensor[kept] for tensor in (x0, *others)))
    assert distance(found, expected) <= 1e-10


# ------------------------------------------------------------------- nothing is left on the network


def traces(net):
    """Everything about a network that its user could see change, but for values."""
    return (
        list(net.state_dict()),
        [(type(m), m.training, sorted(vars(m))) for m in net.modules()],
        [(len(m._forward_hooks), len(m._backward_hooks)) for m in net.modules()],
        [sorted(vars(p)) for p in net.parameters()],
        [p.requires_grad for p in net.parameters()],
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_untouched_between_calls(unet, loss, training):
    rows = random_rows(3)
    unet.train(training)
    before, prediction = traces(unet), loss(*rows)
    engine = OpacusEngine(unet, 0.5, micro_batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine_sum(engine, loss, rows)
    assert traces(unet) == before
    assert torch.equal(loss(*rows), prediction)

    def failing(*rows):
        loss(*rows)
        raise KeyError("in the loss")

    unet.zero_grad(set_to_none=True)
    with pytest.raises(KeyError, match="in the loss"):
        engine.accumulate(failing, rows)
    assert traces(unet) == before
    assert all(p.grad is None for p in unet.parameters())
    unet.train()


def test_after_remove_there_are_no_more_sums(unet, loss):
    engine = OpacusEngine(unet, 0.5)
    engine.remove()
    with pytest.raises(RuntimeError, match="removed"):
        engine.accumulate(loss, random_rows(2))


# ------------------------------------------------------------------------------- the self-check


def test_the_self_check_passes(unet, loss):
    check_engine(OpacusEngine(unet, 0.5, micro_batch_size=2), loss, random_rows(5), multiplicity=1)


def test_the_self_check_finds_a_wrong_use_of_opacus(unet, loss, monkeypatch):
    def expecting_a_mean(net, loss_reduction, force_functorch):
        return opacus_grad_sample(net, loss_reduction="mean", force_functorch=force_functorch)

    opacus_grad_sample = opacus_module.GradSampleModule
    monkeypatch.setattr(opacus_module, "GradSampleModule", expecting_a_mean)
    with pytest.raises(UserError, match="self-check failed at parameter"):
        check_engine(OpacusEngine(unet, 0.5), loss, random_rows(5), multiplicity=1)


# ------------------------------------------------------------------------------- what is refused


def test_several_draws_are_refused(unet, loss):
    message = r"privacy\.multiplicity=1 or privacy\.engine=auto would work"
    with pytest.raises(UserError, match=message):
        OpacusEngine(unet, 0.5).accumulate(loss, random_rows(4), multiplicity=2)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_grad_norm", [0, -1.0, float("nan"), float("inf")]),
        ("micro_batch_size", [0, -1, 1.5]),
        ("clipping", ["none", None]),
    ],
)
def test_a_value_out_of_range_is_named(unet, name, values):
    for value in values:
        with pytest.raises(UserError, match=f"{name}="):
            OpacusEngine(**({"net": unet, "max_grad_norm": 1.0} | {name: value}))


def test_rows_of_unlike_length_are_refused(unet, loss):
    x0, noise, t, y = random_rows(3)
    with pytest.raises(UserError, match="common length"):
        OpacusEngine(unet, 0.5).accumulate(loss, (x0, noise, t, y[:2]))


class WithOwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.layer = nn.Linear(3, 2)


class WithBuffer(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.register_buffer("offset", torch.ones(2))


def sharing():
    layer = nn.Linear(3, 3)
    return nn.Sequential(nn.Sequential(layer), nn.Sequential(layer))


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (sharing, r"1\.0\.weight"),
        (tied, r"1\.weight"),
        (WithOwnParameter, "the network itself"),
        (WithBuffer, "WithBuffer"),
        (lambda: nn.Sequential(nn.EmbeddingBag(3, 3)), "EmbeddingBag"),
        (lambda: nn.Sequential(nn.LSTM(3, 3)), "LSTM"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), "1, which works in place"),
    ],
)
def test_a_network_that_opacus_cannot_do_is_refused_by_name(make, named):
    message = rf"Opacus cannot do .*{named}.*privacy\.engine=auto would work"
    with pytest.raises(UserError, match=message):
        OpacusEngine(make(), 1.0)


def test_statistics_over_examples_are_refused():
    with pytest.raises(UserError, match="1 .BatchNorm1d. keeps statistics over examples"):
        OpacusEngine(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), 1.0)


def test_a_network_without_trainable_parameters_is_refused():
    with pytest.raises(UserError, match="no trainable parameter"):
        OpacusEngine(nn.Linear(3, 2).requires_grad_(False), 1.0)


def test_a_use_that_opacus_does_not_see_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))

    def loss(x):
        return (net[1](x) @ net[0].weight[:2]).square().sum(1)

    with pytest.raises(UserError, match=r"0\.weight.*privacy\.engine=auto would work"):
        OpacusEngine(net, 1.0).accumulate(loss, (torch.randn(5, 3),))


def test_a_layer_that_sees_other_rows_than_examples_is_refused():
    net = nn.Linear(3, 2)

    def loss(x):
        return net(x.repeat(2, 1)).square().sum(1).view(2, -1).sum(0)

    with pytest.raises(UserError, match=r"weight.*privacy\.engine=auto would work"):
        OpacusEngine(net, 1.0).accumulate(loss, (torch.randn(5, 3),))


def test_checkpointed_activations_are_refused():
    net = tiny_net()
    net.enable_gradient_checkpointing()
    net.train()
    before = traces(net)
    with pytest.raises(UserError, match=r"checkpointed\): privacy\.engine=auto would work"):
        OpacusEngine(net, 1.0).accumulate(
            tiny_diffusion().row_loss(net), random_rows(3, torch.float32)
        )
    assert traces(net) == before


# ------------------------------------------------------------------------- chosen by privacy.engine


def test_the_plan_chooses_the_engine(unet):
    for engine in ("auto", "loop"):
        plan = PrivacyPlan(**(PLAN.to_dict() | {"engine": engine, "clipping": "automatic"}))
        made = make_engine(unet, plan, micro_batch_size=3)
        assert isinstance(made, ClippingEngine) and made.mode == engine
        assert made.clipping == "automatic"
    made = make_engine(unet, PLAN, micro_batch_size=3)
    assert isinstance(made, OpacusEngine) and made.clipping == "flat"
    assert made.max_grad_norm == 0.25 and made.micro_batch_size == 3


def test_a_run_with_opacus(command, tmp_path):
    with_opacus = ("privacy.engine=opacus", "privacy.multiplicity=1")
    run = command(train, *SHORT, *with_opacus, f"run_dir={tmp_path / 'run'}")
    assert run.code == 0, run.err
    assert json.loads((tmp_path / "run" / "privacy.json").read_text())["engine"] == "opacus"
    planned = command(plan_command, *SHORT, *with_opacus)
    assert planned.code == 0, planned.err


@pytest.mark.parametrize("module", [train, plan_command])
def test_opacus_with_several_draws_ends_with_one_sentence(command, tmp_path, module):
    run = command(module, "privacy.engine=opacus", "privacy.multiplicity=4", "run_dir=run")
    assert run.code == 2 and run.err.count("\n") == 1
    assert "privacy.multiplicity=4; privacy.multiplicity=1 or privacy.engine=auto" in run.err
    assert list(tmp_path.iterdir()) == []
