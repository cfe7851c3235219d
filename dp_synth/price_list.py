"""The price of a run as lines to read."""

from collections import Counter
from typing import Any

from dp_synth.privacy.wording import eps_at_delta, round_up

_SHOWN_CLASSES = 10
_PHASES = (
    ("Pre-training", "pretraining"),
    ("Fine-tuning", "fine_tuning"),
    ("Sampling", "sampling"),
)


def print_price(price: dict[str, Any]) -> None:
    """Print what ``pricing.plan_run`` found."""
    print(f"\nPlan for dataset={price['dataset']}; no image was opened.\n")
    if price["folder"]:
        _print_folder(price["folder"])
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
    _print_decoding(price["folder"])
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
    _print_other_units(price["other_units"])
    curve = "  ".join(f"{steps}: {eps:.2f}" for steps, eps in price["eps_curve"])
    print(f"eps after steps     {curve}")


def _print_folder(folder: dict[str, Any]) -> None:
    classes = folder["classes"]
    shown = ", ".join(classes[:_SHOWN_CLASSES]) + (", ..." if len(classes) > _SHOWN_CLASSES else "")
    found = "no folder: published numbers"
    if folder["num_files"] is not None:
        found = f"{folder['num_files']:,} images by name"
    if "cache_mib" in folder:
        found += f", {folder['cache_mib']:,.1f} MiB decoded"
    print(f"Data                {folder['layout']}, {found}; {len(classes)} classes ({shown})")


def _print_decoding(folder: dict[str, Any] | None) -> None:
    if folder and "hours_decoding" in folder:
        hours = _duration(folder["hours_decoding"])
        print(f"Decoding            {hours} if files are of 96x96 pixels; once")


def _print_other_units(units: dict[str, dict[str, Any]]) -> None:
    for unit, price in units.items():
        print(
            f"Not protected       a {unit} with all its images: dataset.unit={unit} has N = "
            f"{price['num_examples']:,},\n                    noise multiplier "
            f"{price['noise_multiplier']:.4g} at batches of {price['batch_size']:,}, "
            f"{price['noise_ratio']:,.3g} times the noise in each step"
        )


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
