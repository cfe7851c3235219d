"""Weights of guided-diffusion: diffusers' network computes what theirs computes."""

import re

import pytest
import torch
from diffusers import UNet2DModel
from guided_diffusion_net import GuidedDiffusionNet
from safetensors.torch import save_file

from dp_synth.errors import UserError
from dp_synth.guided_diffusion import GuidedDiffusionWeights
from dp_synth.guided_diffusion_layout import Layout

# What the papers train, small: (what the network is, the width of its attention heads).
IMPROVED_CIFAR = {
    "num_res_blocks": 3,
    "channel_mult": (1, 2, 2),
    "attention": (1, 2),
    "use_scale_shift_norm": True,
    "learn_sigma": True,
}
GUIDED_64 = {
    "num_res_blocks": 2,
    "channel_mult": (1, 2, 3),
    "attention": (1, 2),
    "use_new_attention_order": True,
    "learn_sigma": True,
    "num_classes": 5,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
DP_PAPER = {"num_res_blocks": 2, "channel_mult": (1, 2, 2, 2), "attention": (1,)}
ARCHITECTURES = {
    "improved, CIFAR-10": (IMPROVED_CIFAR, 16),
    "improved, LSUN: additive time, one head": ({"learn_sigma": True}, None),
    "guided, 64x64": (GUIDED_64, 16),
    "the same, old order": (GUIDED_64 | {"use_new_attention_order": False}, 16),
    "Ghalebikesabi et al.": (DP_PAPER, 32),
    "attention at the finest level, none at the coarsest": (
        {"channel_mult": (1, 2, 1), "attention": (0, 1), "resblock_updown": True},
        16,
    ),
    "attention in the middle alone": ({"attention": (), "in_channels": 1}, 64),
    "one level": ({"channel_mult": (1,), "attention": (), "num_classes": 1}, 8),
}


def heads_of(width):
    return lambda channels: 1 if width is None else channels // width


def theirs(seed=0, width=None, **options):
    """Their network; random weights in the layers that they would begin at zero, too."""
    torch.manual_seed(seed)
    net = GuidedDiffusionNet(heads=heads_of(width), **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net


def saved(net, path):
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.parametrize(("options", "width"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_both_networks_compute_the_same(options, width, tmp_path):
    oracle = theirs(width=width, **options)
    path = saved(oracle, tmp_path / "model.pt")
    new_order = options.get("use_new_attention_order", False)
    net = GuidedDiffusionWeights(path, width, new_order).network().eval()
    x = torch.randn(3, options.get("in_channels", 3), 8, 16)
    t = torch.tensor([0, 13, 999])
    y = torch.arange(3) % options["num_classes"] if "num_classes" in options else None
    with torch.no_grad():
        expected, found = oracle(x, t, y), net(x, t, class_labels=y).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", ["width", "order"])
def test_what_the_weights_do_not_tell_matters(wrong, tmp_path):
    """Else the test above would pass whatever the two hints are."""
    oracle = theirs(width=16, **GUIDED_64)
    path = saved(oracle, tmp_path / "model.pt")
    net = GuidedDiffusionWeights(path, 32 if wrong == "width" else 16, wrong != "order").network()
    x, t, y = torch.randn(1, 3, 8, 8), torch.tensor([500]), torch.tensor([2])
    with torch.no_grad():
        difference = (net(x, t, class_labels=y).sample - oracle(x, t, y)).abs().max()
    assert difference > 1e-3


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        # Ghalebikesabi et al. 2023 report 80.4 M parameters.
        ({"num_channels": 192, **DP_PAPER}, 80.4),
        # File names in the README of improved-diffusion: cifar10_uncond_50M, imagenet64_cond_270M.
        ({"num_channels": 128, **IMPROVED_CIFAR, "channel_mult": (1, 2, 2, 2)}, 50),
        # Dhariwal and Nichol 2021, table 4: ADM at 64x64 has 296 M.
        (
            {
                "num_channels": 192,
                **GUIDED_64,
                "num_res_blocks": 3,
                "channel_mult": (1, 2, 3, 4),
                "attention": (1, 2, 3),
                "num_classes": 1000,
            },
            296,
        ),
    ],
)
def test_networks_of_full_size_have_the_published_number_of_parameters(options, millions):
    with torch.device("meta"):
        oracle = GuidedDiffusionNet(**options)
        layout = Layout.of(oracle.state_dict())
        net = UNet2DModel(**layout.architecture(), attention_head_dim=64)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert parameters == sum(parameter.numel() for parameter in oracle.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.001 if millions != 50 else 0.06)


@pytest.mark.parametrize("kind", ["pt", "old pt", "safetensors", "float16"])
def test_every_way_of_saving_gives_the_same_network(kind, tmp_path):
    weights = theirs(width=16).state_dict()
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(
            {name: value.half() for name, value in weights.items()}
            if kind == "float16"
            else weights,
            path,
            _use_new_zipfile_serialization=kind != "old pt",
        )
    net = GuidedDiffusionWeights(path, 16, False).network()
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    expected = weights["input_blocks.0.0.weight"]
    atol = 1e-3 if kind == "float16" else 0
    torch.testing.assert_close(net.conv_in.weight.detach(), expected, rtol=0, atol=atol)


def refused(path, message, width=16):
    for method in ("architecture", "network"):
        with pytest.raises(UserError, match=message) as caught:
            getattr(GuidedDiffusionWeights(path, width, False), method)()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_truncated_file_is_refused(share, suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    weights = theirs().state_dict()
    if suffix == "pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "cannot be read as weights")


class Attack:
    """Unpickled carelessly, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"time_embed.0.weight": Attack(tmp_path / "ran")}, path)
    refused(path, "objects other than tensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        {},
        [torch.zeros(1)],
        {"state_dict": {"out.2.weight": torch.zeros(1)}},
        {"conv1.weight": torch.zeros(3, 3)},
        {"output_blocks": torch.zeros(3)},
        {"output_blocks.x.0": torch.zeros(3)},
        {0: torch.zeros(3)},
        {name: torch.tensor(0.0) for name in theirs().state_dict()},
    ],
)
def test_other_contents_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "is not a U-Net of guided-diffusion")


@pytest.mark.parametrize("half", ["input_blocks", "output_blocks", "out", "time_embed"])
def test_a_network_that_lacks_a_part_is_refused(half, tmp_path):
    """A classifier of guided-diffusion has no output blocks; levels that are resampled without
    weights leave a gap among the blocks."""
    weights = theirs().state_dict()
    kept = {name: value for name, value in weights.items() if not name.startswith(f"{half}.")}
    torch.save(kept, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "is not a U-Net of guided-diffusion")
    gap = {name: value for name, value in weights.items() if ".op." not in name}
    torch.save(gap, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "learned down- and up-sampler")


def test_no_weight_is_missing_left_over_or_of_another_shape(tmp_path):
    path, weights = tmp_path / "model.pt", theirs().state_dict()
    mutations = [
        weights | {"input_blocks.1.0.extra.weight": torch.zeros(1)},
        weights | {"extra.weight": torch.zeros(1)},
        {name: value for name, value in weights.items() if name != "middle_block.1.norm.bias"},
        weights | {"middle_block.1.norm.bias": torch.zeros(7)},
        weights | {"middle_block.1.qkv.weight": torch.zeros(7, 7, 1)},
        weights | {"middle_block.1.qkv.weight": torch.tensor(0.0)},
    ]
    for mutated in mutations:
        torch.save(mutated, path)
        with pytest.raises(UserError, match="missing, left over or of another shape"):
            GuidedDiffusionWeights(path, 16, False).network()


def test_what_diffusers_cannot_express_is_refused(tmp_path):
    path = saved(theirs(channel_mult=(2, 2)), tmp_path / "model.pt")
    refused(path, re.escape("embedded in 32 channels, and its first level has 64"))
    path = saved(theirs(), tmp_path / "model.pt")
    refused(path, r"public\.attention_head_dim=24 does not divide the 64 channels", width=24)
