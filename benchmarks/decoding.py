"""Times the cache of decoded images against Pillow alone, and measures its memory.

Pillow alone is as many processes as there are cores, each of which opens and loads its share of
the same PNG files and keeps nothing. The cache also checks, crops, resizes, writes and journals.
They take turns, round after round, each in processes of its own. Processor time tells what the
share would be where nothing else runs; where it and the clock disagree, the machine was busy.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from dp_synth.data import cache
from dp_synth.data.listing import Listing
from dp_synth.data.sources import Folder
from dp_synth.files import write_atomically

ALONE = "Pillow alone"
PER_FOLDER = 1000


def main(arguments: list[str] | None = None) -> None:
    """Make the images, measure, print a table, and write all numbers if asked to."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        images = Path(directory) / "images"
        make_images(images, options.images, options.side, options.cores)
        rounds = [
            measure(images, options.resolutions, options.cores) for _ in range(options.rounds + 1)
        ]
        file_bytes = sum(path.stat().st_size for path in images.rglob("*.png"))
    report = {
        "machine": machine(options),
        "bytes_per_file": round(file_bytes / options.images),
        "results": summarise(rounds[1:], options.images),  # the first round warms up
    }
    print_table(report)
    if options.out:
        write_atomically(options.out, json.dumps(report, indent=2) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=_count, default=20_000, metavar="N", help="PNG files (default: 20000)")
    add("--side", type=_count, default=96, help="their side in pixels (default: 96)")
    add("--resolutions", nargs="+", type=_count, default=[96, 32], metavar="SIDE",
        help="what to cache them at (default: 96 32)")  # fmt: skip
    add("--rounds", type=_count, default=3, help="timed rounds after one that warms up")
    add("--cores", type=_count, default=os.cpu_count(), help="processes of Pillow alone")
    add("--directory", type=Path, help="where to put images and caches, for a while")
    add("--out", type=Path, metavar="FILE.json", help="write all numbers here")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def make_images(root: Path, number: int, side: int, cores: int) -> None:
    """Write ``root/<folder>/<number>.png``: crops of a grainy texture, as hard to pack as tissue."""
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        folders = range(0, number, PER_FOLDER)
        jobs = [
            pool.submit(_make_folder, root / f"{first:08d}", min(PER_FOLDER, number - first), side)
            for first in folders
        ]
        for job in jobs:
            job.result()


def _make_folder(folder: Path, number: int, side: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(int(folder.name))
    smooth = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    smooth = smooth.resize((512, 512), Image.Resampling.BICUBIC)
    grain = rng.integers(-8, 9, (512, 512, 3))
    texture = (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)
    texture = np.tile(texture, (side // 512 + 2, side // 512 + 2, 1))
    for place in range(number):
        top, left = rng.integers(0, 512, 2)
        picture = Image.fromarray(texture[top : top + side, left : left + side])
        picture.save(folder / f"{place}.png")


def measure(images: Path, resolutions: list[int], cores: int) -> dict[str, dict[str, float]]:
    """Run everything once: seconds and processor seconds of each, and the cache's memory."""
    measured = {ALONE: pillow_alone(images, cores)}
    for resolution in resolutions:
        measured[f"cache at {resolution}"] = in_new_process(cached, images, resolution)
    return measured


def pillow_alone(images: Path, cores: int) -> dict[str, float]:
    """What plain processes need to open and load every file."""
    paths = sorted(str(path) for path in images.rglob("*.png"))
    # Forked, so that they begin at once; they have nothing to import.
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_load_all, args=(paths[i::cores],)) for i in range(cores)]
    began, cpu_before = time.perf_counter(), _children_cpu_seconds()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": _children_cpu_seconds() - cpu_before,
    }


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _load_all(paths: list[str]) -> None:
    for path in paths:
        with Image.open(path) as picture:
            picture.load()


def cached(images: Path, resolution: int) -> dict[str, float]:
    """What it takes to fill a cache, and peak resident memory of this process, before and after."""
    source = Folder(images)
    names = list(source.walk())
    listing = Listing(source, names, np.zeros(len(names), np.int64), ("all",))
    directory = images.with_name("cache")
    before = _peak_bytes()
    began, cpu_before = time.perf_counter(), time.process_time()
    cache.load(listing, resolution=resolution, channels=3, directory=directory)
    filled, cpu = time.perf_counter() - began, time.process_time() - cpu_before
    peak = _peak_bytes()
    began = time.perf_counter()
    cache.load(listing, resolution=resolution, channels=3, directory=directory)
    again = time.perf_counter() - began
    shutil.rmtree(directory)
    return {
        "seconds": filled,
        "cpu_seconds": cpu,
        "seconds_again": again,
        "peak_bytes": peak,
        "peak_bytes_before": before,
    }


def _peak_bytes() -> int:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if platform.system() == "Darwin" else kilobytes * 1024


def in_new_process(function: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """Call a function where nothing else has used memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def summarise(
    rounds: list[dict[str, dict[str, float]]], images: int
) -> dict[str, dict[str, float]]:
    """Medians over rounds; a share of Pillow's rate is the median of the shares within rounds."""
    results: dict[str, dict[str, float]] = {}
    for name in rounds[0]:
        median = {
            quantity: statistics.median(entry[name][quantity] for entry in rounds)
            for quantity in rounds[0][name]
        }
        shares = {
            f"share_by_{quantity}": statistics.median(
                entry[ALONE][quantity] / entry[name][quantity] for entry in rounds
            )
            for quantity in ("seconds", "cpu_seconds")
        }
        results[name] = {"images_per_second": images / median["seconds"], **shares, **median}
    return results


def print_table(report: dict[str, Any]) -> None:
    """One row per contestant."""
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"files of {report['bytes_per_file']:,} bytes")
    print(
        f"{'':16}{'images/s':>10}{'of Pillow':>11}{'by CPU':>8}{'again':>9}{'peak memory (before)':>24}"
    )
    for name, row in report["results"].items():
        line = f"{name:16}{row['images_per_second']:10,.0f}{row['share_by_seconds']:11.0%}"
        line += f"{row['share_by_cpu_seconds']:8.0%}"
        if "peak_bytes" in row:
            peak, before = row["peak_bytes"] / 2**20, row["peak_bytes_before"] / 2**20
            memory = f"{peak:,.0f} ({before:,.0f}) MiB"
            line += f"{row['seconds_again']:7.2f} s{memory:>24}"
        print(line)


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where and when this runs, and on what."""
    return {
        "cores": options.cores,
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "images": options.images,
        "side": options.side,
        "rounds": options.rounds,
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
