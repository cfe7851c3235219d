"""Every layer type and every way to its gradients, alone in a network, against brute force."""

import pytest
import torch
import torch.nn.functional as F
from clipping_oracle import (
    SIZES,
    Around,
    assert_same,
    check,
    clip,
    engine_sum,
    example_gradients,
    force,
    median,
    randomize,
    size,
    square_loss,
)
from torch import nn

from dp_synth.privacy.clipping.rules.convolution import Convolution, window_inner_products

# Torch says that even kernels cost a copy; here they are wanted.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

GROUPED = ["grouped", "example-wise"]
CONV2D = ["grouped", "example-wise", "windows", "book-keeping"]
LINEAR = ["product", "book-keeping"]
NO_CHOICE = [None]

# name: (layer, shape of a row, ways)
LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (5,), LINEAR),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (5,), LINEAR),
    "linear over positions": (lambda: nn.Linear(5, 3), (7, 5), LINEAR),
    "linear over a grid": (lambda: nn.Linear(5, 3), (2, 3, 5), LINEAR),
    "linear over three dimensions": (lambda: nn.Linear(3, 5), (2, 3, 2, 3), LINEAR),
    "linear of one": (lambda: nn.Linear(1, 1), (1,), LINEAR),
    "conv": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 5, 7), CONV2D),
    "conv without bias": (lambda: nn.Conv2d(3, 5, 3, bias=False), (3, 5, 7), CONV2D),
    "conv 1x1": (lambda: nn.Conv2d(3, 5, 1), (3, 2, 3), CONV2D),
    "conv 1x1 with stride": (lambda: nn.Conv2d(3, 5, 1, stride=2), (3, 5, 4), CONV2D),
    "conv to one position": (lambda: nn.Conv2d(3, 5, 3), (3, 3, 3), CONV2D),
    "conv of one pixel": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 1, 1), CONV2D),
    "conv stride": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 6, 7), CONV2D),
    "conv stride that leaves pixels": (lambda: nn.Conv2d(2, 3, 2, stride=3), (2, 7, 6), CONV2D),
    "conv uneven": (lambda: nn.Conv2d(3, 5, (1, 3), (2, 1), (0, 2), (1, 2)), (3, 5, 6), CONV2D),
    "conv uneven, other way": (
        lambda: nn.Conv2d(2, 3, (4, 2), (1, 3), (3, 1), (2, 1)),
        (2, 5, 7),
        CONV2D,
    ),
    "conv dilated stride": (lambda: nn.Conv2d(3, 5, 2, stride=3, dilation=2), (3, 8, 9), CONV2D),
    "conv padded more than the image": (lambda: nn.Conv2d(2, 3, 3, padding=4), (2, 2, 1), CONV2D),
    "conv same": (lambda: nn.Conv2d(3, 5, (2, 3), padding="same"), (3, 5, 4), CONV2D),
    "conv same dilated": (
        lambda: nn.Conv2d(3, 5, (2, 4), padding="same", dilation=(3, 1)),
        (3, 5, 4),
        CONV2D,
    ),
    "conv valid": (lambda: nn.Conv2d(3, 5, 3, padding="valid"), (3, 5, 4), CONV2D),
    "conv circular": (
        lambda: nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="circular"),
        (3, 5, 4),
        CONV2D,
    ),
    "conv reflect": (
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
        (3, 5, 4),
        CONV2D,
    ),
    "conv replicate": (
        lambda: nn.Conv2d(3, 5, 3, 2, padding=2, padding_mode="replicate"),
        (3, 5, 4),
        CONV2D,
    ),
    "conv groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 5, 4), GROUPED),
    "conv depthwise": (
        lambda: nn.Conv2d(3, 6, 3, stride=2, groups=3, padding=1),
        (3, 5, 4),
        GROUPED,
    ),
    "conv circular groups": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2),
        (4, 4, 3),
        GROUPED,
    ),
    "conv 1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1, dilation=2), (3, 8), GROUPED),
    "conv 1d groups without bias": (
        lambda: nn.Conv1d(4, 6, 2, groups=2, bias=False),
        (4, 7),
        GROUPED,
    ),
    "conv 1d same": (
        lambda: nn.Conv1d(3, 5, 4, padding="same", padding_mode="replicate"),
        (3, 7),
        GROUPED,
    ),
    "conv 3d": (
        lambda: nn.Conv3d(2, 3, (1, 2, 3), (2, 1, 1), (0, 1, 2), (1, 2, 1)),
        (2, 3, 4, 2),
        GROUPED,
    ),
    "conv 3d depthwise": (lambda: nn.Conv3d(3, 3, 2, groups=3), (3, 3, 2, 4), GROUPED),
    "transposed 1d": (
        lambda: nn.ConvTranspose1d(3, 5, 3, stride=2, padding=1, output_padding=1),
        (3, 4),
        GROUPED,
    ),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 3), (3, 4, 3), GROUPED),
    "transposed with stride, without bias": (
        lambda: nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1, bias=False),
        (3, 3, 4),
        GROUPED,
    ),
    "transposed uneven": (
        lambda: nn.ConvTranspose2d(2, 3, (2, 3), (3, 2), (0, 1), (2, 1), dilation=(1, 2)),
        (2, 3, 2),
        GROUPED,
    ),
    "transposed groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2),
        (4, 3, 2),
        GROUPED,
    ),
    "transposed depthwise": (
        lambda: nn.ConvTranspose2d(3, 3, 2, stride=2, groups=3),
        (3, 3, 2),
        GROUPED,
    ),
    "transposed 3d": (
        lambda: nn.ConvTranspose3d(2, 4, 2, stride=(1, 2, 1), groups=2, output_padding=(0, 1, 0)),
        (2, 2, 3, 2),
        GROUPED,
    ),
    "group norm": (lambda: nn.GroupNorm(3, 6), (6, 5, 4), NO_CHOICE),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 6), (6,), NO_CHOICE),
    "group norm of sequences": (lambda: nn.GroupNorm(1, 6), (6, 7), NO_CHOICE),
    "group norm of volumes": (lambda: nn.GroupNorm(4, 4), (4, 2, 3, 2), NO_CHOICE),
    "layer norm": (lambda: nn.LayerNorm(5), (5,), NO_CHOICE),
    "layer norm over positions": (lambda: nn.LayerNorm(5), (2, 3, 5), NO_CHOICE),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((3, 5)), (7, 3, 5), NO_CHOICE),
    "layer norm of whole rows": (lambda: nn.LayerNorm((3, 5)), (3, 5), NO_CHOICE),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (7, 5), NO_CHOICE),
}
LAYERS_AND_WAYS = [(name, way) for name, (_, _, ways) in LAYERS.items() for way in ways]


def make(name, dtype=torch.float64):
    return randomize(Around(LAYERS[name][0]()), dtype)


def make_rows(name, rows, dtype=torch.float64):
    return torch.randn(rows, *LAYERS[name][1], dtype=dtype)


def taken_by(way, examples=1):
    """What a forced way leaves in the record of the one layer of a network."""
    return {"layer": {way}} if way is not None and examples else {}


@pytest.mark.parametrize(("examples", "multiplicity"), SIZES)
@pytest.mark.parametrize(("name", "way"), LAYERS_AND_WAYS)
def test_layer_equals_brute_force(monkeypatch, name, way, examples, multiplicity):
    taken = force(monkeypatch, way)
    net = make(name)
    rows = make_rows(name, examples * multiplicity)
    check(net, square_loss(net), (rows,), multiplicity, micro_batch_size=21)
    assert taken == taken_by(way, examples)


@pytest.mark.parametrize(("name", "way"), LAYERS_AND_WAYS)
def test_layer_equals_brute_force_in_float32(monkeypatch, name, way):
    taken = force(monkeypatch, way)
    net = make(name, torch.float32)
    check(net, square_loss(net), (make_rows(name, 21, torch.float32),), 3)
    assert taken == taken_by(way)


@pytest.mark.parametrize(("name", "way"), LAYERS_AND_WAYS)
def test_several_chunks_of_a_layer(monkeypatch, name, way):
    """The first chunk finds out which gradients are written out; later ones know."""
    taken = force(monkeypatch, way)
    net = make(name)
    check(net, square_loss(net), (make_rows(name, 21),), 3, micro_batch_size=7)
    assert taken == taken_by(way)


@pytest.mark.parametrize(("name", "way"), LAYERS_AND_WAYS)
def test_layer_passes_the_right_gradient_on(monkeypatch, name, way):
    """A trained layer in front gets its gradient through this one's input gradient."""
    taken = force(monkeypatch, way)
    make_layer, shape, _ = LAYERS[name]
    net = randomize(nn.Sequential(nn.Linear(shape[-1], shape[-1]), make_layer()))
    check(net, square_loss(net), (make_rows(name, 6),), 2, micro_batch_size=6)
    assert way is None or taken["1"] == {way}


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name, way in LAYERS_AND_WAYS if "without" not in name]
)
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_half_frozen_layers(monkeypatch, name, way, frozen):
    taken = force(monkeypatch, way)
    net = make(name)
    param = getattr(net.layer, frozen)
    param.requires_grad_(False)
    check(net, square_loss(net), (make_rows(name, 6),), 2, micro_batch_size=6)
    assert taken == (taken_by(way) if frozen == "bias" else {})
    assert param.grad is None
    assert not param.requires_grad


@pytest.mark.parametrize("way", ["tables", "book-keeping"])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize(("examples", "multiplicity"), SIZES)
def test_embedding(monkeypatch, examples, multiplicity, shape, padding_idx, way):
    taken = force(monkeypatch, way)
    net = randomize(Around(nn.Embedding(5, 3, padding_idx=padding_idx)))
    index = torch.randint(0, 5, (examples * multiplicity, *shape))
    if examples:
        index[: examples * multiplicity] %= 4  # one entry is never looked up
        index.view(examples * multiplicity, -1)[:, 0] = 0  # and every row's gradient is not zero
    check(net, square_loss(net), (index,), multiplicity, micro_batch_size=14)
    assert taken == taken_by(way, examples)


# ------------------------------------------------------------------------------- memory layouts


def every_other(x):
    return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]


def reversed_dimensions(x):
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def from_the_middle(x):
    return F.pad(x, (1, 2), value=float("nan"))[..., 1:-2]


LAYOUTS = {
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "reversed dimensions": reversed_dimensions,
    "every other": every_other,
    "expanded": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "from the middle": from_the_middle,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "way"), LAYERS_AND_WAYS)
def test_inputs_in_any_layout(monkeypatch, name, way, layout):
    taken = force(monkeypatch, way)
    net, oracle = make(name), make(name)
    net.layout = LAYOUTS[layout]
    # torch's own group norm crashes on channels-last input that needs no gradient (seen with 2.13).
    oracle.layout = lambda x: LAYOUTS[layout](x).contiguous()
    rows = (make_rows(name, 6),)
    gradients = example_gradients(oracle, square_loss(oracle), rows, 2)
    bound = median([size(gradient) for gradient in gradients])
    found, _ = engine_sum(net, square_loss(net), rows, 2, bound, micro_batch_size=6)
    assert_same(found, clip(gradients, bound))
    assert taken == taken_by(way)


@pytest.mark.parametrize("after", ["expanded", "transposed"])
@pytest.mark.parametrize(("name", "way"), LAYERS_AND_WAYS)
def test_output_gradients_in_any_layout(monkeypatch, name, way, after):
    taken = force(monkeypatch, way)
    net = make(name)

    def loss(x):
        y = net(x)
        if after == "expanded":  # the gradient of a sum is one number, expanded
            return y.flatten(1).sum(1)
        y = y.transpose(1, -1).contiguous()
        return (y.cos() * torch.arange(1, y.shape[-1] + 1)).square().flatten(1).sum(1)

    check(net, loss, (make_rows(name, 6),), 2, micro_batch_size=6)
    assert taken == taken_by(way)


# ----------------------------------------------------- the arithmetic of book-kept convolutions


@pytest.mark.parametrize("multiplicity", [1, 3])
@pytest.mark.parametrize(
    ("image", "kernel", "stride", "padding", "dilation"),
    [
        ((4, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
        ((5, 3), (1, 1), (1, 1), (0, 0), (1, 1)),
        ((5, 4), (1, 1), (2, 3), (0, 0), (1, 1)),
        ((6, 7), (3, 2), (2, 1), (1, 0), (1, 1)),
        ((6, 5), (2, 3), (1, 2), (0, 2), (3, 1)),
        ((7, 5), (2, 2), (3, 2), (2, 1), (2, 3)),
        ((1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    ],
)
def test_window_inner_products_are_those_of_unfolded_windows(
    image, kernel, stride, padding, dilation, multiplicity
):
    torch.manual_seed(3)
    examples, channels = 3, 2
    x = torch.randn(multiplicity * examples, channels, *image, dtype=torch.float64)
    weight = torch.empty(5, channels, *kernel)
    windows = F.unfold(x, kernel, dilation, padding, stride)  # [K * b, c * area, positions]
    out = F.conv2d(x, weight.double(), None, stride, padding, dilation).shape[2:]
    by_example = windows.unflatten(0, (multiplicity, examples)).permute(1, 0, 3, 2).flatten(1, 2)
    expected = by_example @ by_example.transpose(1, 2)

    conv = Convolution(stride, padding, dilation, False, (0, 0), 1)
    found = window_inner_products(x, weight, out, conv, multiplicity)
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-13 * expected.norm()
