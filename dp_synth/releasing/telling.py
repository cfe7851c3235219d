"""What the command says of a release: what left, what stayed and why, what to think of."""

from collections.abc import Iterator
from pathlib import Path

from dp_synth.privacy.audit.record import read_record
from dp_synth.releasing.inventory import Inventory
from dp_synth.releasing.papers import Terms
from dp_synth.reporting.copying import read_copying
from dp_synth.reporting.numbers import Numbers
from dp_synth.runs import Run

_WHAT = {
    "README.md": "what is here",
    "SHA256SUMS": "checksums of every file",
    "metrics.json": "metrics",
    "metrics_meta.json": "what each metric is",
    "model": "the model and its card",
    "privacy.html": "the statement in plain words",
    "privacy.json": "the privacy statement",
    "report.html": "the images and what was measured, on a page",
}
_FLAG = "memorization/flagged"


def print_parts(run: Run, out: Path, inventory: Inventory) -> None:
    """A line for each part: those that left, then those that stayed."""
    released = [
        (path.name, _WHAT.get(path.name, "synthetic images and their card"))
        for path in sorted(out.iterdir())
    ]
    width = max(len(name) for name, _ in released + inventory.stays)
    print(f"Released in {out}")
    for name, what in released:
        print(f"  {name:<{width}}  {what}")
    if inventory.stays:
        print(f"Stays in {run.path}, because")
    for name, why in inventory.stays:
        print(f"  {name:<{width}}  {why}")


def warnings(run: Run, terms: Terms) -> Iterator[str]:
    """What somebody should know who hands the release on, in sentences."""
    if _copies_suspected(run):
        yield (
            f"{_FLAG} struck: synthetic images may repeat training images; look at the nearest "
            "pairs in local/ before anything leaves."
        )
    if terms.license is None:
        yield "no licence is chosen, so nobody may use the release; release.license=... sets it."


def _copies_suspected(run: Run) -> bool:
    copying = read_copying(Numbers(run.metrics(), run.metrics_meta()))
    audited = read_record(run.audit_path)["memorization"].get(_FLAG, {"value": 0})
    return bool(copying is not None and copying.flagged) or audited["value"] > 0
