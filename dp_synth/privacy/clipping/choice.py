"""Chooses the engine that a plan asks for."""

import os
from pathlib import Path

from torch import nn

from dp_synth.errors import UserError
from dp_synth.privacy.clipping.engine import ClippingEngine
from dp_synth.privacy.clipping.opacus import OpacusEngine
from dp_synth.privacy.plan import PrivacyPlan

Engine = ClippingEngine | OpacusEngine


def make_engine(
    net: nn.Module,
    plan: PrivacyPlan,
    micro_batch_size: int | None = None,
    memory_mib: float | None = None,
) -> Engine:
    """The engine of `plan.engine`, on `net`, with the plan's clipping; see the engines' arguments.

    Raises UserError where the engine cannot do the network.
    """
    if plan.engine == "opacus":
        if memory_mib is not None:
            raise UserError(
                "trainer.memory_mib is not for privacy.engine=opacus;"
                " trainer.micro_batch_size bounds its memory"
            )
        return OpacusEngine(net, plan.max_grad_norm, micro_batch_size, clipping=plan.clipping)
    return ClippingEngine(
        net,
        plan.max_grad_norm,
        micro_batch_size,
        mode=plan.engine,
        clipping=plan.clipping,
        memory_mib=memory_mib,
    )


def timings_cache() -> Path:
    """Where the engine's timings are kept between runs: in ``$DP_SYNTH_CACHE`` or ``~/.cache/dp_synth``."""
    folder = os.environ.get("DP_SYNTH_CACHE") or "~/.cache/dp_synth"
    return Path(folder).expanduser() / "clipping_timings.json"
