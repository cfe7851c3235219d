"""Times a step's noise: privacy.secure_noise=true against torch's generator, and its memory.

A step here is all that the noising optimizer does once the clipped sum is there: draw noise for
every parameter, add it, divide by the batch size, and update by plain SGD. The two take turns, round
after round, on the same network; memory is measured in a new process for each. Processor time, of
all threads, tells what a ratio would be where nothing else runs.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from networks import NETWORKS
from torch import nn

from dp_synth.files import write_atomically
from dp_synth.privacy.optimizer import NoisingOptimizer
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.randomness import PrivateRandomness

PLAN = PrivacyPlan(
    eps=10,
    delta=1e-6,
    max_grad_norm=1.0,
    batch_size=4096,
    steps=1000,
    num_examples=50_000,
    noise_multiplier=2.0,
)
SOURCES = {"torch": False, "secure": True}
MIB = 2**20


class Seconds(NamedTuple):
    """What something took."""

    clock: float
    processors: float


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write all numbers if asked to."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    networks: dict[str, dict[str, Any]] = {}
    report = {"machine": machine(options), "networks": networks}
    print(", ".join(f"{key} {value}" for key, value in machine(options).items()))
    for name in options.networks:
        peaks = {source: in_new_process(name, source, options.threads) for source in SOURCES}
        networks[name] = measure(name, options.rounds) | {"peak_bytes": peaks}
    print_table(networks)
    if options.out:
        write_atomically(options.out, json.dumps(report, indent=2) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=["small", "paper-80m"], metavar="NAME",
        help=f"{', '.join(NETWORKS)} (default: small paper-80m)")  # fmt: skip
    add("--rounds", type=int, default=9, help="timed rounds after one that warms up (default: 9)")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    add("--out", type=Path, metavar="FILE.json", help="write all numbers here")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


def measure(network: str, rounds: int) -> dict[str, Any]:
    """Seconds of each source in each round, by the clock and of processors, and their ratios."""
    net, optimizers = prepared(network, *SOURCES)
    measured: dict[str, list[Seconds]] = {source: [] for source in SOURCES}
    for round_number in range(rounds + 1):  # the first one warms up
        for source, optimizer in optimizers.items():
            seconds = timed_step(net, optimizer)
            if round_number > 0:
                measured[source].append(seconds)
    turns = list(zip(*measured.values(), strict=True))
    return {
        "parameters": sum(param.numel() for param in net.parameters()),
        "seconds": measured,
        **{
            f"ratio_by_{kind}": statistics.median(
                getattr(secure, kind) / getattr(plain, kind) for plain, secure in turns
            )
            for kind in Seconds._fields
        },
    }


def prepared(network: str, *sources: str) -> tuple[nn.Module, dict[str, NoisingOptimizer]]:
    """The network, and an optimizer of its parameters for each source."""
    net = NETWORKS[network].build("cpu")
    optimizers = {}
    for source in sources:
        plan = PrivacyPlan(**PLAN.to_dict() | {"secure_noise": SOURCES[source]})
        optimizers[source] = NoisingOptimizer(torch.optim.SGD(net.parameters(), lr=1e-3), plan)
    return net, optimizers


def timed_step(net: nn.Module, optimizer: NoisingOptimizer) -> Seconds:
    """What a step takes from random sums, which are made before."""
    optimizer.zero_grad()
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    begin, processors = time.perf_counter(), time.process_time()
    optimizer.begin_step(PrivateRandomness(), 0, "cpu")
    optimizer.step()
    seconds = Seconds(time.perf_counter() - begin, time.process_time() - processors)
    optimizer.zero_grad()
    return seconds


def in_new_process(*args: Any) -> int:
    """``peak_bytes`` where nothing else has used memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_bytes, *args).result()


def peak_bytes(network: str, source: str, threads: int) -> int:
    """What the process holds at most during steps, beyond the network and a gradient."""
    torch.set_num_threads(threads)
    tiny, optimizers = prepared("digits", source)
    timed_step(tiny, optimizers[source])  # what is loaded at first use is not what is asked for
    net, optimizers = prepared(network, source)
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    before = _peak()
    for _ in range(2):
        timed_step(net, optimizers[source])
    return _peak() - before


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def print_table(networks: dict[str, dict[str, Any]]) -> None:
    """One row per network."""
    heads = ("parameters", "torch", "secure", "ratio", "by clock", "memory (MiB)")
    print(f"\n{'':10}" + "".join(f"{head:>14}" for head in heads))
    for name, found in networks.items():
        cells = [f"{found['parameters'] / 1e6:.1f} M"]
        for source in SOURCES:
            taken = statistics.median(step.processors for step in found["seconds"][source])
            cells.append(f"{1000 * taken:,.0f} ms")
        cells += [f"{found[f'ratio_by_{kind}']:.2f}" for kind in ("processors", "clock")]
        cells.append(" -> ".join(f"{found['peak_bytes'][key] / MIB:,.0f}" for key in SOURCES))
        print(f"{name:10}" + "".join(f"{cell:>14}" for cell in cells))


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where and when this runs."""
    return {
        "threads": options.threads,
        "torch": torch.__version__,
        "cryptography": version("cryptography"),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
