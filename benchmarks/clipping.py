"""Times a private gradient against an ordinary one, and other exact ways of computing it.

Every engine computes the same thing, sum_i clip(mean_k grad_ik), on the same rows, in turn within
one process; medians of the ratios to the non-private backward are printed. An engine whose result
differs from the per-example loop's is marked.

    python benchmarks/clipping.py [--rounds 7] [--threads 2] [--out FILE.json]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dp_synth.diffusion import Diffusion, RowLoss, TimestepLaw
from dp_synth.files import write_atomically
from dp_synth.networks import unet
from dp_synth.privacy.clipping import ClippingEngine

SHAPES = ((32, 1), (16, 4), (8, 16), (4, 32))  # (B examples, K draws)
MAX_GRAD_NORM = 0.5
TOLERANCE = 1e-4

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
Engine = Callable[[Rows, int], None]  # adds the clipped sum to the gradients


def digits_network() -> nn.Module:
    """The network of ``model=unet_digits``."""
    return unet(
        (1, 8, 8),
        10,
        block_out_channels=[16, 32, 64],
        down_block_types=["DownBlock2D"] * 3,
        up_block_types=["UpBlock2D"] * 3,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    )


def random_rows(count: int) -> Rows:
    """x0, noise, t, y for ``count`` rows."""
    x0, noise = torch.rand(2, count, 1, 8, 8).unbind()
    return 2 * x0 - 1, noise, torch.randint(1000, (count,)), torch.randint(10, (count,))


def non_private(net: nn.Module, loss: RowLoss) -> Engine:
    """The ordinary backward of the summed loss."""

    def run(rows: Rows, multiplicity: int) -> None:
        (loss(*rows).sum() / multiplicity).backward()

    return run


def ours(net: nn.Module, loss: RowLoss) -> Engine:
    """The clipping engine."""
    engine = ClippingEngine(net, MAX_GRAD_NORM)
    return lambda rows, multiplicity: engine.accumulate(loss, rows, multiplicity)


def loop(net: nn.Module, loss: RowLoss) -> Engine:
    """One example's draws per ordinary backward."""
    engine = ClippingEngine(net, MAX_GRAD_NORM, mode="loop")
    return lambda rows, multiplicity: engine.accumulate(loss, rows, multiplicity)


def functorch(net: nn.Module, loss: RowLoss) -> Engine:
    """``vmap(grad)`` over examples, draws inside the loss."""
    wrapped = _Loss(net, loss)
    params = {name: p.detach() for name, p in wrapped.named_parameters()}

    def example_loss(values: dict[str, Tensor], *draws: Tensor) -> Tensor:
        return functional_call(wrapped, values, draws).mean()

    def run(rows: Rows, multiplicity: int) -> None:
        split = [row.unflatten(0, (multiplicity, -1)) for row in rows]
        grads = vmap(grad(example_loss), in_dims=(None, 1, 1, 1, 1))(params, *split)
        squares = torch.stack([g.flatten(1).double().square().sum(1) for g in grads.values()])
        factors = (MAX_GRAD_NORM / squares.sum(0).sqrt()).clamp(max=1).float()
        for name, param in wrapped.named_parameters():
            param.grad = torch.einsum("i,i...->...", factors, grads[name])

    return run


class _Loss(nn.Module):
    """The loss as a module, so that ``functional_call`` can swap the network's parameters."""

    def __init__(self, net: nn.Module, loss: RowLoss) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, *rows: Tensor) -> Tensor:
        return self.loss(*rows)


ENGINES: dict[str, Callable[[nn.Module, RowLoss], Engine]] = {
    "non-private": non_private,
    "dp_synth": ours,
    "per-example loop": loop,
    "vmap(grad)": functorch,
}


def gradient(net: nn.Module) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def measure(examples: int, multiplicity: int, rounds: int) -> dict[str, dict[str, float | bool]]:
    """Median time ratio to the non-private backward, and exactness, of each engine."""
    net = digits_network()
    loss = Diffusion("v_prediction", TimestepLaw([0, 1000], [1.0])).row_loss(net)
    engines = {name: make(net, loss) for name, make in ENGINES.items()}
    rows = random_rows(examples * multiplicity)
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    results: dict[str, Tensor] = {}
    for _ in range(rounds + 1):
        for name, engine in engines.items():
            net.zero_grad(set_to_none=True)
            begin = time.perf_counter()
            engine(rows, multiplicity)
            seconds[name].append(time.perf_counter() - begin)
            results[name] = gradient(net)
    truth = results["per-example loop"]
    table: dict[str, dict[str, float | bool]] = {}
    for name, times in seconds.items():
        pairs = zip(times[1:], seconds["non-private"][1:], strict=True)
        error = ((results[name] - truth).norm() / truth.norm()).item()
        table[name] = {
            "ratio": statistics.median(own / plain for own, plain in pairs),
            "exact": name == "non-private" or error < TOLERANCE,
        }
    return table


def main() -> None:
    """Print one table and, with --out, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tables = {shape: measure(*shape, options.rounds) for shape in SHAPES}
    print(f"time over the non-private backward, median of {options.rounds}; {platform.processor()}")
    print(f"{'engine':<18}" + "".join(f"{f'B={b} K={k}':>13}" for b, k in SHAPES))
    for name in ENGINES:
        cells = (tables[shape][name] for shape in SHAPES)
        marks = (f"{c['ratio']:.2f}{' ' if c['exact'] else '!'}" for c in cells)
        print(f"{name:<18}" + "".join(f"{mark:>13}" for mark in marks))
    print("! differs from the per-example loop")
    if options.out:
        content = {f"B={b} K={k}": tables[b, k] for b, k in SHAPES}
        write_atomically(options.out, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
