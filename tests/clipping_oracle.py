"""Shared by the tests of the clipping engine: brute force, comparisons, and how to force a way.

The oracle loops over examples and draws with plain autograd, and does nothing clever.
"""

import torch
from torch import nn

from dp_synth.privacy.clipping import ClippingEngine, book_keeping
from dp_synth.privacy.clipping.tuning import LayerWays

torch.set_num_threads(1)

# (examples, draws) of one call: nothing, one, and primes on either side.
SIZES = [(0, 3), (1, 1), (7, 1), (1, 7), (3, 3), (7, 3)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def example_gradients(net, loss, rows, multiplicity):
    """Return each example's gradient {name: float64 tensor}, the mean over a backward per draw."""
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    examples = len(rows[0]) // multiplicity
    gradients = []
    for i in range(examples):
        mean = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
        for n in range(i, len(rows[0]), examples):
            value = loss(*(tensor[n : n + 1] for tensor in rows)).sum()
            parts = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            for name, part in zip(params, parts, strict=True):
                if part is not None:
                    mean[name] += part.double() / multiplicity
        gradients.append(mean)
    return gradients


def clip(gradients, bound, clipping="flat"):
    """Return the clipped sum of at least one gradient."""
    total = {name: torch.zeros_like(part) for name, part in gradients[0].items()}
    for gradient in gradients:
        norm = size(gradient)
        factor = bound / (norm + 0.01) if clipping == "automatic" else min(1.0, bound / norm)
        for name, part in gradient.items():
            total[name] += factor * part
    return total


def brute_force(net, loss, rows, multiplicity, bound, clipping="flat"):
    """Return the clipped sum of at least one example."""
    return clip(example_gradients(net, loss, rows, multiplicity), bound, clipping)


def median_norm(net, loss, rows, multiplicity):
    """Return a bound that clips about half of the examples."""
    return median([size(g) for g in example_gradients(net, loss, rows, multiplicity)])


def median(norms):
    """Return one of `norms` that about half of them exceed; slightly less, so that it clips."""
    ordered = sorted(norms)
    return ordered[len(ordered) // 2] * 0.999


def sum_of(engine, loss, rows, multiplicity):
    """Return what one call of an engine adds, as {name: tensor}."""
    for param in engine.net.parameters():
        param.grad = None
    engine.accumulate(loss, rows, multiplicity)
    return {n: p.grad.clone() for n, p in engine.net.named_parameters() if p.requires_grad}


def engine_sum(net, loss, rows, multiplicity, bound, **options):
    """Return what one call of a new engine adds, and the engine."""
    engine = ClippingEngine(net, bound, **options)
    return sum_of(engine, loss, rows, multiplicity), engine


def distance(a, b):
    """Return the L2 distance of two gradients, in float64."""
    return float(sum((a[name].double() - b[name].double()).square().sum() for name in b) ** 0.5)


def size(a):
    """Return the L2 norm of a gradient, in float64."""
    return float(sum(part.double().square().sum() for part in a.values()) ** 0.5)


def assert_same(found, expected, tolerance=1e-12):
    """The gradients are equal up to a relative error."""
    assert found.keys() == expected.keys()
    assert distance(found, expected) <= tolerance * size(expected)


def check(net, loss, rows, multiplicity, recorded=True, clipping="flat", **options):
    """A new engine equals brute force where about half of the examples are clipped; returns it."""
    dtype = next(net.parameters()).dtype
    gradients = example_gradients(net, loss, rows, multiplicity)
    bound = median([size(gradient) for gradient in gradients]) if gradients else 1.0
    found, engine = engine_sum(net, loss, rows, multiplicity, bound, clipping=clipping, **options)
    assert (engine.fallback_reason is None) == recorded
    if gradients:
        assert_same(found, clip(gradients, bound, clipping), TOLERANCE[dtype])
    else:
        assert size(found) == 0.0
    return engine


def force(monkeypatch, way):
    """Make every layer take this way where it can; return {layer: ways taken}, filled later.

    Book-keeping is let through for small layers, too, where it would only cost memory.
    """
    taken = {}
    monkeypatch.setattr(book_keeping, "is_possible", lambda x, weight, rows: True)

    def choose(self, call, x, ways, default):
        chosen = way if way in ways else next(iter(ways))
        taken.setdefault(call.name, set()).add(chosen)
        return ways[chosen]()

    monkeypatch.setattr(LayerWays, "choose", choose)
    return taken


class Around(nn.Module):
    """A layer inside a network, which may change its input's memory layout first."""

    def __init__(self, layer, layout=None):
        super().__init__()
        self.layer = layer
        self.layout = layout

    def forward(self, x):
        return self.layer(x if self.layout is None else self.layout(x))


def randomize(net, dtype=torch.float64, scale=0.5):
    """Norms start at weight 1 and bias 0, and LoRA's factors at 0, which hides mistakes."""
    torch.manual_seed(2)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn_like(param) * scale)
    return net.to(dtype)


def square_loss(net):
    """A loss whose gradient differs at every output entry; any shape of output."""

    def loss(x):
        y = net(x)
        weights = torch.arange(1, y[0].numel() + 1, dtype=y.dtype).view(y[0].shape)
        return (y.sin() * weights).square().flatten(1).sum(1)

    return loss


def make_unet(dtype=torch.float64, **options):
    """A diffusion U-Net of images [R, 2, 8, 8], timesteps and labels, with attention."""
    from diffusers import UNet2DModel  # after dp_synth, which makes its imports work everywhere

    torch.manual_seed(0)
    architecture = {
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 2,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "num_class_embeds": 11,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**(architecture | options)).to(dtype)


def denoising_loss(net):
    """The training loss of `make_unet`'s and of other networks with its inputs."""

    def loss(x, noise, t, y):
        prediction = net(x, t, class_labels=y, return_dict=False)[0]
        return (prediction[:, : noise.shape[1]] - noise).square().flatten(1).mean(1)

    return loss


def unet_rows(rows, dtype=torch.float64, seed=1):
    """Return x, noise, t and y of `rows` rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, 8, 8, generator=generator, dtype=dtype)
    noise = torch.randn(rows, 2, 8, 8, generator=generator, dtype=dtype)
    t = torch.randint(0, 1000, (rows,), generator=generator)
    return x, noise, t, torch.randint(0, 11, (rows,), generator=generator)
