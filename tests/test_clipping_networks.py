"""Whole networks of the field against brute force, however the engine cuts up the work."""

import pytest
import torch
import torch.nn.functional as F
from clipping_oracle import (
    assert_same,
    check,
    clip,
    denoising_loss,
    distance,
    engine_sum,
    example_gradients,
    force,
    make_unet,
    median,
    randomize,
    size,
    sum_of,
    unet_rows,
)
from torch import nn

from dp_synth.privacy.clipping import ClippingEngine

EXAMPLES, DRAWS = 3, 3
WAYS = ["grouped", "example-wise", "windows", "book-keeping"]


# ------------------------------------------------------------------------------------ networks


def make_conditional_unet(dtype):
    """Cross attention to a text, and gated feed-forwards."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=6,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).to(dtype)


def make_dit(dtype):
    """A transformer whose blocks are modulated by timestep and label; without label dropout."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=11,
        norm_num_groups=1,
    )
    # It starts as the identity, with gradients of zero.
    return randomize(net, dtype, scale=0.2).eval()


class TransposedUpsampling(nn.Module):
    """What older U-Nets sample up with."""

    def __init__(self):
        super().__init__()
        from diffusers.models.upsampling import Upsample2D

        self.enter = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.up = Upsample2D(4, use_conv_transpose=True, out_channels=4)
        self.times = nn.Embedding(1000, 4)
        self.labels = nn.Embedding(11, 4)
        self.leave = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x, t, class_labels, return_dict):
        condition = (self.times(t) + self.labels(class_labels))[:, :, None, None]
        return (self.leave(F.silu(self.up(self.enter(x) + condition))),)


def conditional_loss(net):
    def loss(x, noise, t, y):
        text = F.one_hot((y[:, None] + torch.arange(3)) % 6, 6)
        prediction = net(
            x, t, encoder_hidden_states=text.to(x) + x[:, 0, :3, :6], return_dict=False
        )
        return (prediction[0] - noise).square().flatten(1).mean(1)

    return loss


NO_ATTENTION = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
NETWORKS = {
    "unet": (make_unet, denoising_loss),
    "unet without attention": (
        lambda dtype: make_unet(dtype, **NO_ATTENTION),
        denoising_loss,
    ),
    "unet with scale and shift": (
        lambda dtype: make_unet(dtype, resnet_time_scale_shift="scale_shift"),
        denoising_loss,
    ),
    "unet of residual sampling": (
        lambda dtype: make_unet(dtype, downsample_type="resnet", upsample_type="resnet"),
        denoising_loss,
    ),
    "transposed upsampling": (
        lambda dtype: randomize(TransposedUpsampling(), dtype),
        denoising_loss,
    ),
    "conditional unet": (make_conditional_unet, conditional_loss),
    "dit": (make_dit, denoising_loss),
}


def build(name, dtype=torch.float64):
    make, loss_of = NETWORKS[name]
    net = make(dtype)
    return net, loss_of(net)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_brute_force(name, dtype):
    net, loss = build(name, dtype)
    check(net, loss, unet_rows(EXAMPLES * DRAWS, dtype), DRAWS)


@pytest.mark.parametrize("name", ["unet", "conditional unet", "dit"])
@pytest.mark.parametrize("way", WAYS)
def test_network_equals_brute_force_in_every_way(monkeypatch, name, way):
    taken = force(monkeypatch, way)
    net, loss = build(name)
    check(net, loss, unet_rows(EXAMPLES * DRAWS), DRAWS)
    assert any(way in ways for ways in taken.values())


@pytest.mark.parametrize("name", ["unet", "conditional unet", "dit"])
def test_network_under_gradient_checkpointing(name):
    net, loss = build(name)
    net.enable_gradient_checkpointing()
    net.train()
    for module in net.modules():  # what is checkpointed in training, but without dropout
        module.training = not isinstance(module, nn.Dropout) and "Label" not in str(type(module))
    check(net, loss, unet_rows(EXAMPLES * DRAWS), DRAWS)


@pytest.mark.parametrize("examples_and_draws", [(0, 3), (1, 1), (7, 1), (1, 7)])
def test_unet_of_awkward_batches(examples_and_draws):
    examples, draws = examples_and_draws
    net, loss = build("unet")
    check(net, loss, unet_rows(examples * draws), draws)


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "expanded": lambda x: x[:, :, :1].expand(-1, -1, 8, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unet_of_images_in_any_layout(layout):
    net, loss = build("unet")
    x, *others = unet_rows(EXAMPLES * DRAWS)
    check(net, loss, (LAYOUTS[layout](x), *others), DRAWS)


def test_unet_in_channels_last_weights():
    net = make_unet().to(memory_format=torch.channels_last)
    x, *others = unet_rows(EXAMPLES * DRAWS)
    rows = (x.to(memory_format=torch.channels_last), *others)
    check(net, denoising_loss(net), rows, DRAWS)


def test_autocast_is_followed_and_leaves_full_precision_sums():
    net = make_unet(torch.float32)
    loss, rows = denoising_loss(net), unet_rows(6, torch.float32)
    gradients = example_gradients(net, loss, rows, 2)
    bound = median([size(gradient) for gradient in gradients])
    exact = clip(gradients, bound)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recorded, engine = engine_sum(net, loss, rows, 2, bound)
        looped, _ = engine_sum(net, loss, rows, 2, bound, mode="loop")
    assert engine.fallback_reason is None
    assert all(part.dtype == torch.float32 for part in recorded.values())
    assert 1e-6 * size(exact) < distance(recorded, exact) < 0.05 * size(exact)
    assert distance(recorded, looped) < 0.05 * size(exact)


# ------------------------------------------------------------------------ cutting up the work


@pytest.fixture(scope="module")
def unet_and_expected():
    """A U-Net, its loss and rows, a bound that half of the examples exceed, the clipped sum."""
    net, loss = build("unet")
    rows = unet_rows(5 * DRAWS)
    gradients = example_gradients(net, loss, rows, DRAWS)
    bound = median([size(gradient) for gradient in gradients])
    return net, loss, rows, bound, clip(gradients, bound)


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, DRAWS, DRAWS + 1, 7, None])
def test_chunks_do_not_matter(unet_and_expected, mode, micro_batch_size):
    net, loss, rows, bound, expected = unet_and_expected
    seen = []

    def counted(*chunk):
        seen.append(len(chunk[0]))
        return loss(*chunk)

    found, engine = engine_sum(
        net, counted, rows, DRAWS, bound, micro_batch_size=micro_batch_size, mode=mode
    )
    assert_same(found, expected)
    assert engine.fallback_reason is None
    if micro_batch_size is not None:
        assert sum(seen) == len(rows[0]), "each row has one forward"
        assert max(seen) <= micro_batch_size


@pytest.mark.parametrize("mode", ["auto", "loop"])
@pytest.mark.parametrize("memory_mib", [3, 4, 6, 100])
def test_memory_budgets_do_not_matter(unet_and_expected, memory_mib, mode):
    """The smallest holds one draw of an example, the largest all rows at once."""
    net, loss, rows, bound, expected = unet_and_expected
    found, engine = engine_sum(net, loss, rows, DRAWS, bound, memory_mib=memory_mib, mode=mode)
    assert_same(found, expected)
    assert engine.fallback_reason is None


def test_smaller_chunks_after_larger_ones_leave_nothing_behind(unet_and_expected):
    net, loss, _, bound, _ = unet_and_expected
    engine = ClippingEngine(net, bound)
    for rows in (12, 2, 6):
        found = sum_of(engine, loss, unet_rows(rows), 2)
        assert_same(found, clip(example_gradients(net, loss, unet_rows(rows), 2), bound))


# ------------------------------------------------------------------------------ low-rank updates


class LowRank(nn.Module):
    """A frozen layer and a trained update of low rank, as adapters have it."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        if isinstance(layer, nn.Conv2d):
            self.down = nn.Conv2d(
                layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False
            )
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x, *args, **kwargs):
        return self.layer(x) + self.up(self.down(x)) * 0.5


ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "conv1")


def add_low_rank_by_hand(net):
    net.requires_grad_(False)
    for name, module in list(net.named_modules()):
        if name.endswith(ADAPTED) and isinstance(module, (nn.Linear, nn.Conv2d)):
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, LowRank(module))
    return net


def add_low_rank_by_peft(net):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=list(ADAPTED))
    return peft.inject_adapter_in_model(config, net)


ADD_LOW_RANK = {"by hand": add_low_rank_by_hand, "by peft": add_low_rank_by_peft}


def build_low_rank(name, how, dtype):
    """A network with its adapters in use: at first their second factor is zero."""
    make, loss_of = NETWORKS[name]
    net = ADD_LOW_RANK[how](make(dtype)).to(dtype)
    torch.manual_seed(7)
    with torch.no_grad():
        for param in net.parameters():
            if param.requires_grad:
                param.copy_(torch.randn_like(param) * 0.1)
    return net, loss_of(net)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("how", ADD_LOW_RANK)
@pytest.mark.parametrize("name", ["unet", "conditional unet", "dit"])
def test_low_rank_updates_equal_brute_force(name, how, dtype):
    net, loss = build_low_rank(name, how, dtype)
    trained = {n for n, param in net.named_parameters() if param.requires_grad}
    assert trained
    assert len(trained) < len(list(net.parameters())) / 2
    check(net, loss, unet_rows(EXAMPLES * DRAWS, dtype), DRAWS)
    assert {n for n, param in net.named_parameters() if param.grad is not None} == trained


@pytest.mark.parametrize("way", WAYS)
def test_low_rank_updates_in_every_way(monkeypatch, way):
    taken = force(monkeypatch, way)
    net, loss = build_low_rank("unet", "by peft", torch.float64)
    check(net, loss, unet_rows(EXAMPLES * DRAWS), DRAWS, micro_batch_size=6)
    assert any("lora" in layer and way in ways for layer, ways in taken.items())


def test_peft_models_are_followed():
    """What ``get_peft_model`` returns, with its own names and a dropout that is off."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["to_q", "to_v"], lora_dropout=0.5)
    net = peft.get_peft_model(make_dit(torch.float64), config).eval()
    with torch.no_grad():
        for param in net.parameters():
            if param.requires_grad:
                param.copy_(torch.randn_like(param) * 0.1)
    check(net, denoising_loss(net), unet_rows(EXAMPLES * DRAWS), DRAWS)


def test_low_rank_updates_in_the_loop():
    net, loss = build_low_rank("unet", "by peft", torch.float64)
    check(net, loss, unet_rows(EXAMPLES * DRAWS), DRAWS, mode="loop", micro_batch_size=2)
