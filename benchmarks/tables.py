"""Judges what was measured and prints it: a column per (B, K), a row per engine."""

import statistics
from collections.abc import Callable
from typing import Any

from engines import ENGINES
from measure import MIB, Measurement, Settings
from networks import Point

BASELINE = "non-private"
# Relative errors from which on a result differs: what rounding explains, with a margin.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
MARKS = {"differs": "!", "other mechanism": "~"}

Summary = dict[str, Any]


def summarise(
    measurements: dict[str, Measurement], point: Point, settings: Settings
) -> dict[str, Summary]:
    """What is written for each engine: raw numbers, ratios to non-private and a verdict."""
    plain = measurements[BASELINE]
    summaries = {}
    for name, found in measurements.items():
        summary = {**vars(found), "verdict": verdict(name, found, point, settings)}
        if found.failure is None and plain.failure is None:
            pairs = zip(found.seconds, plain.seconds, strict=True)
            summary["time_ratio_median"] = statistics.median(own / other for own, other in pairs)
            summary["time_ratio_of_minima"] = min(found.seconds) / min(plain.seconds)
        if found.peak_bytes is not None and plain.peak_bytes:
            summary["memory_ratio"] = found.peak_bytes / plain.peak_bytes
        summaries[name] = summary
    return summaries


def verdict(name: str, found: Measurement, point: Point, settings: Settings) -> str:
    """One of "exact" (up to rounding), "differs", "other mechanism", "fails", "not private"."""
    engine = ENGINES[name]
    if found.failure is not None:
        return "fails"
    if found.relative_error is None:
        return "not private"
    if engine.clips_draws and point[1] > 1:
        return "other mechanism"
    limit = TOLERANCES["bf16" if settings.bf16_of(engine) else "fp32"]
    # What is not a number compares false with everything, and so differs.
    return "exact" if found.relative_error <= limit else "differs"


def print_tables(points: dict[str, dict[str, Any]], names: list[str], memory: bool) -> None:
    """Print time and error, then memory, then what the marks mean and why something failed."""
    title = "time over non-private: median of the rounds' ratios (ratio of minima), relative error"
    _print_table(title, points, names, _time_cell)
    if memory:
        _print_table("peak memory over non-private (MiB)", points, names, _memory_cell)
    print("! differs from brute force   ~ clips each draw: another mechanism where K > 1")
    for label, point in points.items():
        for name, summary in point["engines"].items():
            for reason in filter(None, (summary["failure"], summary["memory_failure"])):
                print(f"{label}, {name}: {reason}")


def _print_table(
    title: str,
    points: dict[str, dict[str, Any]],
    names: list[str],
    cell: Callable[[str, Summary], str],
) -> None:
    print(f"\n{title}\n{'':<18}" + "".join(f"{label:>24}" for label in points))
    for name in names:
        cells = (cell(name, point["engines"][name]) for point in points.values())
        print(f"{name:<18}" + "".join(f"{text:>24}" for text in cells))


def _time_cell(name: str, summary: Summary) -> str:
    if "time_ratio_median" not in summary:
        return "fails  "
    if name == BASELINE:
        seconds = summary["seconds"]
        return f"{1000 * statistics.median(seconds):.0f} ({1000 * min(seconds):.0f}) ms  "
    ratios = f"{summary['time_ratio_median']:.2f} ({summary['time_ratio_of_minima']:.2f})"
    error = "-" if summary["relative_error"] is None else f"{summary['relative_error']:.0e}"
    return f"{ratios} {error:>5} {MARKS.get(summary['verdict'], ' ')}"


def _memory_cell(name: str, summary: Summary) -> str:
    if "memory_ratio" not in summary:
        return "fails  "
    return f"{summary['memory_ratio']:.2f} ({summary['peak_bytes'] / MIB:.0f})  "
