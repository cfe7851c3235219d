"""The sentences of the privacy statement: what is assumed, what is promised, what is not covered."""

GUARANTEE = "(eps, delta) differential privacy under the assumptions listed here"
VOID = "void: privacy.unsafe_repeatable_randomness makes the noise known"
NO_GUARANTEE = "none: trained without differential privacy"

_TRUST_MODEL = (
    "A trusted curator holds the private images and runs the training; the adversary sees whatever "
    "is released of the run (final weights, samples, this statement), and nothing else."
)

NOT_COVERED = (
    (
        "Hyper-parameter search: runs of other settings on the same private data, and choosing among "
        "them, spend eps of their own."
    ),
    "Evaluation on private images: a metric computed on them is released without noise.",
    "Floating point: the accounting assumes real arithmetic and ideal Gaussian noise.",
    "The test split: the guarantee covers the training split.",
    "The public data: what the pre-training images or weights reveal about their own subjects.",
    "The number of examples: num_examples is taken as public.",
    "Checkpoints of an unfinished run: they hold optimizer state and are not meant for release.",
    "Time, memory and other side channels of the machine that trains.",
)

ASSUMPTIONS = {
    "adjacency": "zero_out",
    "unit": "example",
    "sampling": "poisson",
    "world_size": 1,
    "trust_model": _TRUST_MODEL,
}
