"""Names of metrics that more than one module must know."""

from collections.abc import Iterable

_ACCURACY = "utility/accuracy."
# What follows it without being the name of a split.
_NO_SPLITS = frozenset(
    {
        "public_only",
        "real",
        "dp_classifier",
        "non_private_generator",
        "ensemble",
        "fresh",
        "synthetic_validation",
        "ci_low",
        "ci_high",
    }
)


def is_split_name(name: str) -> bool:
    """Whether ``utility/accuracy.<name>`` can be the accuracy on a split: the name is still free."""
    return name.isidentifier() and name not in _NO_SPLITS


def split_accuracies(metrics: Iterable[str]) -> dict[str, str]:
    """Return, for each split beside ``test`` that synthetic data were tested on, the metric's name.

    Args:
        metrics: names of all metrics of a run.
    """
    suffixes = (name.removeprefix(_ACCURACY) for name in metrics if name.startswith(_ACCURACY))
    return {split: _ACCURACY + split for split in suffixes if is_split_name(split)}
