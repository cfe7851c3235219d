"""Chooses the engine that a plan asks for."""

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
