"""The words of the privacy statement: what is assumed, promised and not covered; eps as it is shown."""

import math
from collections.abc import Mapping
from typing import Any

GUARANTEE = "(eps, delta) differential privacy under the assumptions listed here"
VOID = "void: privacy.unsafe_repeatable_randomness makes the noise known"
NO_GUARANTEE = "none: trained without differential privacy"

_TRUST_MODEL = (
    "A trusted curator holds the private images and runs the training; the adversary sees whatever "
    "is released of the run (final weights, samples, this statement), and nothing else."
)

EXAMPLE = "example"  # the unit of privacy where no other is named

MANY_IMAGES = (
    "People with several images: the unit is one image (example), so that someone who has many is "
    "protected less, by each image's eps together."
)

MANY_UNITS = (
    "People in several units: someone whose images stand under more than one value of the unit is "
    "protected less, by each one's eps together."
)

_REAL_ARITHMETIC = (
    "Floating point: the accounting assumes real arithmetic and ideal Gaussian noise.",
    "The noise generator: started from the operating system's entropy, but no cryptographic one.",
)
_SECURE_NOISE = (
    (
        "Floating point: the noise is ideal Gaussian noise rounded to a grid and added exactly, so "
        "that no digit of what is released tells more than the noised sum; rounding inside the sum "
        "of clipped gradients itself, by which neighbours may differ a little more than by "
        "max_grad_norm, is not covered."
    ),
    (
        "The noise generator: AES-256 in counter mode under keys from the operating system that are "
        "kept nowhere; the guarantee holds against whoever cannot break it."
    ),
    (
        "An example's own draws (timestep, image noise, dropout): from a generator started from the "
        "operating system's entropy, but no cryptographic one; none of them is released."
    ),
)
_NEVER_COVERED = (
    (
        "Hyper-parameter search: further runs on the same private data, of these or other settings, "
        "and choosing among them, spend eps of their own (the ledger composes them)."
    ),
    "Evaluation on private images: a metric computed on them is released without noise.",
    "The test split: the guarantee covers the training split.",
    "The public data: what the pre-training images or weights reveal about their own subjects.",
    "The number of examples (num_examples), the class names and the image size: taken as public.",
    "Checkpoints of an unfinished run: they hold optimizer state and are not meant for release.",
    "Time, memory and other side channels of the machine that trains.",
)


def not_covered(*, secure_noise: bool) -> tuple[str, ...]:
    """What no plan's guarantee speaks of, in sentences."""
    return (*_NEVER_COVERED, *(_SECURE_NOISE if secure_noise else _REAL_ARITHMETIC))


ASSUMPTIONS = {
    "adjacency": "zero_out",
    "sampling": "poisson",
    "world_size": 1,
    "trust_model": _TRUST_MODEL,
}


def is_void(statement: Mapping[str, Any]) -> bool:
    """Whether a run was made with repeatable randomness, so that its eps does not hold."""
    return str(statement.get("guarantee", "")).startswith("void")


def round_up(eps: float) -> str:
    """eps with 4 significant digits, never below its value: ``9.992292`` becomes ``9.993``."""
    if eps <= 0 or not math.isfinite(eps):
        return f"{eps:g}"
    step = 10.0 ** (math.floor(math.log10(eps)) - 3)
    # The subtraction forgives a product that binary arithmetic put just above a whole number.
    return f"{math.ceil(eps / step - 1e-9) * step:.4g}"


def eps_at_delta(eps: float, delta: float) -> str:
    """The guarantee in a line: ``eps = 9.993 at delta = 0.0001``."""
    return f"eps = {round_up(eps)} at delta = {delta:g}"
