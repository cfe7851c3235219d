"""The step rules by name."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dp_synth.checks import one_of
from dp_synth.errors import UserError
from dp_synth.sampling.heun import Heun
from dp_synth.sampling.rule import Rule
from dp_synth.sampling.schedulers import DDIM, DDPM, DPMSolver, UniPC

RULES: dict[str, type[Rule]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "dpm_solver": DPMSolver,
    "unipc": UniPC,
    "heun": Heun,
}


def make_rule(name: str, options: Mapping[str, Any]) -> Rule:
    """The step rule of a name, with options of its own.

    Raises:
        UserError: an unknown name, an option that the rule has not, or a wrong value of one.
    """
    one_of("sampler.rule", name, tuple(RULES))
    known = [field.name for field in fields(RULES[name])]
    for key in options:
        if key not in known:
            raise UserError(
                f"sampler.{key} is unknown to sampler={name}; "
                + (
                    f"its own keys are {', '.join(known)}."
                    if known
                    else "it has no keys of its own."
                )
            )
    return RULES[name](**options)
