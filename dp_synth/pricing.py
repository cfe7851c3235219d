"""The price of a run in eps, noise, memory and hours, before any image is opened."""

import warnings
from dataclasses import asdict, replace
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from dp_synth.building import check_config, is_on
from dp_synth.costs import measure_costs, measure_decoding
from dp_synth.data.survey import Survey
from dp_synth.declaration import declare
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan

_CURVE_POINTS = 11
_SHOWN_UNITS = 3  # a table may have dozens of columns that no one would protect
_MECHANISM = (
    "eps",
    "delta",
    "eps_rdp",
    "accountant",
    "noise_multiplier",
    "sample_rate",
    "batch_size",
    "steps",
    "multiplicity",
    "max_grad_norm",
    "clipping",
    "num_examples",
    "unit",
    "adjacency",
)


def plan_run(cfg: DictConfig) -> dict[str, Any]:
    """What the run of a config would cost.

    The mechanism is computed from declared facts alone; time and memory are measured on this
    machine with random images of the declared shape.

    Returns:
        A dict fit for JSON: the mechanism in the words of ``privacy.json``, ``eps_curve`` as
        (steps, eps) pairs, ``sampled_images``, and what ``costs.measure_costs`` gives.

    Raises:
        UserError: the run itself would be refused.
    """
    survey = declare(cfg)
    plan = instantiate(cfg.privacy).calibrate()
    check_config(cfg, plan)
    return {
        "dataset": cfg.dataset.name,
        "folder": None if survey is None else _folder(cfg, survey),
        **mechanism(plan),
        "other_units": other_units(plan, survey),
        "sampled_images": cfg.sampler.num_images if is_on(cfg.sampler) else 0,
        **measure_costs(cfg, plan),
    }


def mechanism(plan: PrivacyPlan | PublicPlan) -> dict[str, Any]:
    """The part of the price that is paid in privacy, in the words of ``privacy.json``."""
    statement = plan.statement(plan.steps, status="planned")
    found = {key: statement[key] for key in _MECHANISM if key in statement}
    if isinstance(plan, PrivacyPlan):
        found["eps_curve"] = plan.epsilon_curve(_CURVE_POINTS)
    return found


def _folder(cfg: DictConfig, survey: Survey) -> dict[str, Any]:
    """What names tell, and what decoding the files costs where training needs that."""
    decoding = {}
    if "resolution" in cfg.dataset and survey.num_files is not None:
        decoding = measure_decoding(cfg, survey.num_files)
    return asdict(survey) | decoding


def other_units(plan: PrivacyPlan | PublicPlan, survey: Survey | None) -> dict[str, dict[str, Any]]:
    """What the same eps would cost for larger units of privacy that the data set's names tell of.

    Returns:
        By unit (patient, slide): how many there are, the noise multiplier, and ``noise_ratio``, by
        how much more noise than the plan's own each step's mean gradient would get. Empty where
        the plan protects such a unit already.
    """
    if survey is None or not isinstance(plan, PrivacyPlan) or plan.unit is not None:
        return {}
    most = sorted(survey.units.items(), key=lambda item: item[1], reverse=True)[:_SHOWN_UNITS]
    return {unit: _price_of_unit(plan, unit, count) for unit, count in most}


def _price_of_unit(plan: PrivacyPlan, unit: str, count: int) -> dict[str, Any]:
    batch_size = min(plan.batch_size, count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a delta above 1 / N, of a plan that nobody asked for
        other = replace(
            plan, unit=unit, num_examples=count, batch_size=batch_size, noise_multiplier=None
        ).calibrate()
    return {
        "num_examples": count,
        "batch_size": batch_size,
        "noise_multiplier": other.noise_multiplier,
        "noise_ratio": _noise_of_mean(other) / _noise_of_mean(plan),
    }


def _noise_of_mean(plan: PrivacyPlan) -> float:
    """The noise on a step's mean gradient, as a multiple of ``max_grad_norm``."""
    assert plan.noise_multiplier is not None
    return plan.noise_multiplier / plan.batch_size
