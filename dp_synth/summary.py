"""The closing lines of a command."""

from collections.abc import Mapping
from pathlib import Path

from dp_synth.metrics.names import split_accuracies
from dp_synth.privacy.wording import eps_at_delta, is_void
from dp_synth.reporting.closeness import DISTANCES
from dp_synth.reporting.numbers import Metric, Numbers, figures
from dp_synth.runs import Run

_ROWS = (
    ("public data alone (eps = 0)", "utility/accuracy.public_only"),
    ("synthetic data", "utility/accuracy"),
    ("synthetic data, drawn anew each epoch", "utility/accuracy.fresh"),
    ("synthetic data, an ensemble", "utility/accuracy.ensemble"),
    ("real data, trained with DP", "utility/accuracy.dp_classifier"),
    ("synthetic data, no privacy", "utility/accuracy.non_private_generator"),
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


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Downstream accuracy beside its baselines, then a line for each other part of the evaluation."""
    numbers = Numbers(metrics, {})
    rows = [
        *_ROWS,
        *((f"synthetic data, on {name}", key) for name, key in split_accuracies(metrics).items()),
    ]
    found = [(label, m) for label, key in rows if (m := numbers.find(key)) is not None]
    if found:
        print("Accuracy of a classifier on real test images, trained on")
    width = max((len(label) for label, _ in found), default=0)
    for label, metric in found:
        print(f"  {label:<{width}} {metric.value:6.1%}{_interval(metric)}")
    for line in (_distance(numbers), _tuning(numbers), _memorization(numbers)):
        if line:
            print(line)


def _interval(metric: Metric) -> str:
    low, high = metric.interval.ends
    return f"   [{low:.1%}, {high:.1%}]" if metric.interval.known() else ""


def _distance(numbers: Numbers) -> str:
    for key, label in DISTANCES:
        if (synthetic := numbers.find(key)) is None:
            continue
        beside = [
            f"{name} {figures(metric.value, 3)}"
            for name, suffix in (("public alone", "public_only"), ("real images", "real_floor"))
            if (metric := numbers.find(f"{key}.{suffix}")) is not None
        ]
        compared = f" ({', '.join(beside)}; smaller is closer)" if beside else ""
        return f"Fidelity   {label} {figures(synthetic.value, 3)}{compared}"
    return ""


def _tuning(numbers: Numbers) -> str:
    chosen, random = numbers.find("tuning/regret"), numbers.find("tuning/regret_of_random")
    if chosen is None:
        return ""
    against = "" if random is None else f", one chosen at random {random.value:.1%}"
    return f"Tuning     a setting chosen on synthetic data loses {chosen.value:.1%}{against}"


def _memorization(numbers: Numbers) -> str:
    flagged = numbers.find("memorization/flagged")
    if flagged is None:
        return ""
    if flagged.value > 0:
        return "Copies     SUSPECTED: look at local/ and at the report before anything is released"
    return "Copies     no sign that training images are repeated"
