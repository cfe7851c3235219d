"""``python -m dp_synth.plan``: the price of a run, before any image is opened."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from dp_synth.building import check_config, is_on
from dp_synth.cli import command
from dp_synth.costs import measure_costs
from dp_synth.errors import UserError
from dp_synth.files import write_atomically
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.privacy.wording import eps_at_delta, round_up

_CURVE_POINTS = 11
_PHASES = (
    ("Pre-training", "pretraining"),
    ("Fine-tuning", "fine_tuning"),
    ("Sampling", "sampling"),
)
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
    plan = instantiate(cfg.privacy).calibrate()
    check_config(cfg, plan)
    return {
        "dataset": cfg.dataset.name,
        **mechanism(plan),
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


def _print_price(price: dict[str, Any]) -> None:
    print(f"\nPlan for dataset={price['dataset']}; no image was opened.\n")
    if price["eps"] is None:
        print("Privacy             none")
    else:
        _print_mechanism(price)
    print(
        f"\nNetwork             {price['parameters']:,} parameters, "
        f"{price['trainable_parameters']:,} of them trained"
    )
    if price["backward"]:
        _print_backward(price["backward"])
    print(f"Memory              {price['memory_mib']:,.0f} MiB on {price['device']}")
    for label, phase in _PHASES:
        print(f"{label:<20}{_duration(price[f'hours_{phase}'])}")
    print("Times are extrapolated from a few calls on random images; evaluation is not included.")


def _print_mechanism(price: dict[str, Any]) -> None:
    print(
        f"Privacy             {eps_at_delta(price['eps'], price['delta'])} by "
        f"{price['accountant']} ({round_up(price['eps_rdp'])} by rdp)"
    )
    print(
        f"Protects            one {price['unit']} of N = {price['num_examples']:,}, "
        f"{price['adjacency'].replace('_', '-')} adjacency"
    )
    print(f"Noise multiplier    {price['noise_multiplier']:.4f}")
    print(
        f"Batches             {price['steps']:,} of expected size {price['batch_size']:,} "
        f"(q = {price['sample_rate']:.4g}), {price['multiplicity']} draws per example"
    )
    curve = "  ".join(f"{steps}: {eps:.2f}" for steps, eps in price["eps_curve"])
    print(f"eps after steps     {curve}")


def _print_backward(backward: dict[str, Any]) -> None:
    if "ways" not in backward:
        print(f"Clipping            by {backward['engine']}")
        return
    print(
        f"Clipping            {backward['examples_per_backward']:,} examples x "
        f"{backward['draws_per_backward']} draws a backward, {backward['memory_mib']:,.0f} MiB "
        "beside the weights"
    )
    ways = Counter(backward["ways"].values())
    if ways:
        counts = ", ".join(f"{way} {count}" for way, count in ways.most_common())
        print(f"Layers clipped by   {counts}")
    if backward["fallback_reason"]:
        print(f"                    one example at a time: {backward['one_at_a_time']}")


def _duration(hours: float) -> str:
    if hours == 0:
        return "nothing to do"
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} seconds"
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours"


@command("plan")
def main(cfg: DictConfig) -> None:
    """Print the price of a run; with ``plan.out`` write it as JSON too."""
    out = Path(cfg.plan.out) if cfg.plan.out else None
    if out is not None and not out.parent.is_dir():
        raise UserError(f"plan.out={out} lies in no existing folder; make {out.parent} first.")
    price = plan_run(cfg)
    if out is not None:
        write_atomically(out, json.dumps(price, indent=2) + "\n")
    _print_price(price)


if __name__ == "__main__":
    main()
