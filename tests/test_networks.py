"""Networks: shapes, labels, public weights carried over, what trains."""

import pytest
import torch
from conftest import tiny_net, weights_of
from diffusers import UNet2DModel

from dp_synth.errors import UserError
from dp_synth.networks import carry_over, choose_trainable, unet

PUBLIC_CLASSES = ("cat", "dog", "fish", "bird")


def labels_of(net):
    return net.class_embedding.weight.detach().clone()


def everything_but_labels(net):
    return {
        name: value for name, value in net.state_dict().items() if "class_embedding" not in name
    }


@pytest.mark.parametrize("num_classes", [1, 2, 13])
def test_the_label_table_has_one_row_more_than_there_are_classes(num_classes):
    net = tiny_net(num_classes=num_classes)
    assert net.config.num_class_embeds == len(labels_of(net)) == num_classes + 1
    x = torch.zeros(num_classes + 1, 1, 4, 4)
    out = net(x, torch.zeros(len(x)).long(), class_labels=torch.arange(num_classes + 1)).sample
    assert out.shape == x.shape and len(out.flatten(1).unique(dim=0)) == len(x)


@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 4, 7)])
def test_an_image_that_cannot_be_halved_is_refused(shape):
    with pytest.raises(UserError, match=r"model\.network\.block_out_channels.*multiples of 2"):
        unet(shape, 3, block_out_channels=[4, 8])


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 4, 6)])
def test_the_shape_is_read_off_the_images(shape):
    options = {
        "block_out_channels": [4, 8],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 2,
    }
    net = unet(shape, 3, **options)
    x = torch.zeros(2, *shape)
    assert net(x, torch.tensor([0, 1]), class_labels=torch.tensor([0, 3])).sample.shape == x.shape


@pytest.mark.parametrize(
    "classes",
    [
        PUBLIC_CLASSES,
        ("dog", "cat"),
        ("horse",),
        ("bird", "horse", "cat", "tree", "dog", "house"),
    ],
)
def test_public_weights_are_carried_over_by_class_name(classes):
    prior = tiny_net(seed=1, num_classes=len(PUBLIC_CLASSES))
    net = tiny_net(seed=2, num_classes=len(classes))
    public = labels_of(prior)
    carry_over(prior, PUBLIC_CLASSES, net, classes)
    for row, name in enumerate(classes):
        if name in PUBLIC_CLASSES:
            assert torch.equal(labels_of(net)[row], public[PUBLIC_CLASSES.index(name)])
        else:
            assert torch.equal(labels_of(net)[row], public[-1])
    assert torch.equal(labels_of(net)[-1], public[-1])
    theirs = everything_but_labels(prior)
    assert all(torch.equal(v, theirs[name]) for name, v in everything_but_labels(net).items())


def test_carrying_over_leaves_the_public_model_alone_and_shares_nothing():
    prior, net = tiny_net(seed=1), tiny_net(seed=2)
    before = weights_of(prior)
    carry_over(prior, "abc", net, "abc")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert torch.equal(weights_of(prior), before)
    assert all(parameter.requires_grad for parameter in net.parameters())


def prior_without_labels(**architecture):
    """As others publish them: no label table, or one that says nothing of its classes."""
    torch.manual_seed(1)
    return UNet2DModel(**(settings_of(tiny_net()) | {"num_class_embeds": None} | architecture))


def settings_of(net):
    """The arguments that a network was built with."""
    return {key: value for key, value in net.config.items() if not key.startswith("_")}


def test_a_prior_without_labels_is_what_every_class_starts_from():
    prior, net = prior_without_labels(), tiny_net(seed=2)
    carry_over(prior, None, net, "abc")
    x, t = torch.randn(4, 1, 4, 4), torch.tensor([0, 7, 400, 999])
    with torch.no_grad():
        expected, found = prior(x, t).sample, net(x, t, class_labels=torch.arange(4)).sample
    assert expected.abs().max() > 0 and torch.equal(found, expected)


def test_unnamed_labels_become_their_mean():
    prior, net = prior_without_labels(num_class_embeds=5), tiny_net(seed=2)
    carry_over(prior, None, net, "abc")
    torch.testing.assert_close(labels_of(net), labels_of(prior).mean(0).expand(4, -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_learned_variance_is_left_out(channels):
    shape = {"in_channels": channels, "out_channels": 2 * channels}
    prior = prior_without_labels(**shape)
    net = UNet2DModel(**(settings_of(prior) | {"out_channels": channels, "num_class_embeds": 3}))
    carry_over(prior, None, net, "ab")
    x, t, y = torch.randn(2, channels, 4, 4), torch.tensor([3, 500]), torch.tensor([0, 2])
    with torch.no_grad():
        mean, _ = prior(x, t).sample.chunk(2, dim=1)
        torch.testing.assert_close(net(x, t, class_labels=y).sample, mean)


@pytest.mark.parametrize(
    "architecture",
    [
        {"block_out_channels": [4, 4]},
        {"layers_per_block": 2},
        {"down_block_types": ["DownBlock2D", "DownBlock2D"]},
    ],
)
def test_a_public_model_of_another_architecture_is_refused(architecture):
    other = tiny_net(**architecture)
    for prior, net in ((other, tiny_net()), (tiny_net(), other)):
        with pytest.raises(UserError, match="does not fit model.network"):
            carry_over(prior, "abc", net, "abc")


def test_all_or_attention_trains():
    net = tiny_net()
    choose_trainable(net, "attention")
    chosen = {name for name, p in net.named_parameters() if p.requires_grad}
    assert "class_embedding.weight" in chosen and any("attentions" in name for name in chosen)
    assert not any("conv" in name or "time_embedding" in name for name in chosen)
    choose_trainable(net, "all")
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(UserError, match=r"model\.trainable=nothing"):
        choose_trainable(net, "nothing")
