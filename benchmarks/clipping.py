"""Times private gradients against an ordinary backward, and measures their memory and error.

Every engine computes sum_i clip(mean_k grad_ik) of the same rows on a copy of the same network, in
turn, round after round; a loop over examples and draws is what their results are compared with.
benchmarks/README.md says how to read the tables.
"""

import argparse
import json
import os
import platform
import re
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from engines import ENGINES
from measure import Settings, compare, measure_memory
from networks import NETWORKS, Point
from tables import BASELINE, print_tables, summarise

from dp_synth.files import write_atomically

EPILOG = """examples:
  python benchmarks/clipping.py --networks small --points 8x16 --rounds 3
  python benchmarks/clipping.py --networks small paper --memory --out cpu.json
  python benchmarks/clipping.py --networks paper-80m --device cuda --precision bf16 --memory"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table per network and quantity, and write all numbers if asked to."""
    options = parse(arguments)
    settings = Settings(
        options.device, options.precision == "bf16", options.threads, options.rounds
    )
    settings.apply()
    names = [
        name
        for name, engine in ENGINES.items()
        if name in {BASELINE, *options.engines} and not (settings.bf16 and engine.bf16)
    ]
    networks: dict[str, dict[str, Any]] = {}
    report = {"machine": machine(options), "networks": networks}
    print(", ".join(f"{key} {value}" for key, value in machine(options).items()))
    for key in options.networks:
        network = NETWORKS[key]
        params = sum(param.numel() for param in network.build("cpu").parameters())
        points: dict[str, dict[str, Any]] = {}
        networks[key] = {"parameters": params, "points": points}
        for point in options.points or network.points:
            max_grad_norm, measurements = compare(network, point, names, settings)
            if options.memory:
                measure_memory(key, point, measurements, settings)
            points["B={} K={}".format(*point)] = {
                "max_grad_norm": max_grad_norm,
                "engines": summarise(measurements, point, settings),
            }
            if options.out:
                write_atomically(options.out, json.dumps(report, indent=2) + "\n")
        shape = "x".join(str(length) for length in network.image_shape)
        print(f"\n{key}: images {shape}, {params / 1e6:.1f} M parameters")
        print_tables(points, names, options.memory)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=["small", "paper"], metavar="NAME",
        help=f"{', '.join(NETWORKS)} (default: small paper)")  # fmt: skip
    add("--points", nargs="+", type=_point, metavar="BxK",
        help="examples x draws, as in 8x16 (default: the network's own)")  # fmt: skip
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="NAME",
        help=f"{', '.join(ENGINES)} (default: all); {BASELINE} always runs")  # fmt: skip
    add("--rounds", type=int, default=5, help="timed rounds after one that warms up (default: 5)")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--precision", choices=["fp32", "bf16"], default="fp32",
        help="of all engines, bf16 by autocast; the engines called bf16 are so anyway")  # fmt: skip
    add("--memory", action="store_true", help="peak memory too, in a new process per engine")
    add("--out", type=Path, metavar="FILE.json", help="write all numbers here")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no GPU")
    return options


def _point(text: str) -> Point:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not examples x draws, as in 8x16")
    return int(found[1]), int(found[2])


def machine(options: argparse.Namespace) -> dict[str, str]:
    """Where and when this runs."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = model[1] if model else cpu
    on_gpu = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{cpu}, {options.threads} threads",
        "precision": options.precision,
        "torch": torch.__version__,
        "opacus": version("opacus"),
        "diffusers": version("diffusers"),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
