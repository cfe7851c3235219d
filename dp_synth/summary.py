"""The closing lines of a command."""

from pathlib import Path

from dp_synth.metrics.names import split_accuracies
from dp_synth.privacy.wording import eps_at_delta, is_void
from dp_synth.runs import Run

_ROWS = (
    ("public data alone (eps = 0)", "utility/accuracy.public_only"),
    ("synthetic data", "utility/accuracy"),
    ("real training data", "utility/accuracy.real"),
)


def print_summary(run: Run) -> None:
    """Where everything is, what it cost, what it is worth."""
    statement = run.statement()
    print(f"\nRun        {shown(run.path)}")
    if statement["eps"] is None:
        print("Privacy    none")
    elif is_void(statement):
        print(f"Privacy    {statement['guarantee']}")
    else:
        print(
            f"Privacy    {eps_at_delta(statement['eps'], statement['delta'])}, "
            f"{statement['steps']} steps ({shown(run.privacy_path)})"
        )
    if run.samples_dir.is_dir():
        print(f"Samples    {shown(run.samples_dir)}")
    print_metrics(run.metrics())
    if run.report_path.is_file():
        print(f"Report     {shown(run.report_path)}")


def shown(path: Path) -> Path:
    """A path as a user in the working directory would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def print_metrics(metrics: dict[str, float]) -> None:
    """Downstream accuracy beside its baselines, with 95 % intervals."""
    rows = [(label, key) for label, key in _ROWS if key in metrics]
    rows += [
        (f"synthetic data, on {split}", key) for split, key in split_accuracies(metrics).items()
    ]
    if rows:
        print("Accuracy of a classifier on real test images, trained on")
    for label, key in rows:
        low, high = metrics[f"{key}.ci_low"], metrics[f"{key}.ci_high"]
        print(f"  {label:<28} {metrics[key]:6.1%}   [{low:.1%}, {high:.1%}]")
