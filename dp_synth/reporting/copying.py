"""Whether samples repeat training images: the ``memorization/*`` of a run, sorted for the page."""

from dataclasses import dataclass

from dp_synth.reporting.numbers import Metric, Numbers

_PREFIX = "memorization/"
_FLAG = "memorization/flagged"
_TESTS = ("closer_to_train", "p_value", "distance_ratio", "copies", "copies_expected",
          "copies_p_value")  # fmt: skip
_BEFORE = ".public_only"
_SPACES = {"pixels": "In pixels", "classifier": "In features of a classifier of public images"}


@dataclass(frozen=True)
class SpaceOfCopies:
    """What was found in one feature space; what was not measured is None.

    Attributes:
        label: where distances were measured.
        before: whether it is of images of the model before private training, as a control.
        closer_to_train: share of the samples that are nearer to training than to held-out images.
        p_value: of that share, if nothing was memorised.
        distance_ratio: mean distance to training over that to held-out images.
        copies: samples as near to one training image as few real images are.
        copies_expected: as many of fresh real images would be.
        copies_p_value: of as many copies, if nothing was memorised.
    """

    label: str
    before: bool
    closer_to_train: Metric | None = None
    p_value: Metric | None = None
    distance_ratio: Metric | None = None
    copies: Metric | None = None
    copies_expected: Metric | None = None
    copies_p_value: Metric | None = None


@dataclass(frozen=True)
class Copying:
    """The tests for memorisation.

    Attributes:
        flagged: whether one of them struck; None where there is no verdict.
        spaces: by feature space.
        n: samples that were looked at, if known.
    """

    flagged: bool | None
    spaces: list[SpaceOfCopies]
    n: int | None


def read_copying(numbers: Numbers) -> Copying | None:
    """The tests for memorisation of a run; None where there was none."""
    found = numbers.under(_PREFIX)
    if not found:
        return None
    flag = numbers.find(_FLAG)
    names = sorted({name.partition(".")[2] for name in found} - {""}, key=_order)
    return Copying(
        flagged=None if flag is None else flag.value > 0,
        spaces=[_space(numbers, name) for name in names],
        n=next((metric.n for metric in found.values() if metric.n is not None), None),
    )


def _order(name: str) -> tuple[bool, str]:
    """Pixels first, each space's control behind it."""
    space = name.removesuffix(_BEFORE)
    return space != "pixels", name


def _space(numbers: Numbers, name: str) -> SpaceOfCopies:
    space = name.removesuffix(_BEFORE)
    return SpaceOfCopies(
        label=_SPACES.get(space, f"In features of {space.replace('_', ' ')}"),
        before=name.endswith(_BEFORE),
        **{test: numbers.find(f"{_PREFIX}{test}.{name}") for test in _TESTS},
    )
