"""From noise to eps and back, for Poisson-subsampled Gaussians, their composition and selection.

Every number is an upper bound, and says which accountant it came from.
"""

from dp_synth.privacy.accounting.calibration import calibrate
from dp_synth.privacy.accounting.composition import (
    ACCOUNTANTS,
    Spent,
    composed,
    delta_spent,
    epsilon,
    spent,
)
from dp_synth.privacy.accounting.mechanisms import (
    Mechanism,
    RandomStopping,
    SubsampledGaussian,
    mechanism_from_dict,
)
from dp_synth.privacy.accounting.random_stopping import (
    NumberOfRuns,
    PoissonRuns,
    TruncatedNegativeBinomialRuns,
)

__all__ = [
    "ACCOUNTANTS",
    "Mechanism",
    "NumberOfRuns",
    "PoissonRuns",
    "RandomStopping",
    "Spent",
    "SubsampledGaussian",
    "TruncatedNegativeBinomialRuns",
    "calibrate",
    "composed",
    "delta_spent",
    "epsilon",
    "mechanism_from_dict",
    "spent",
]
