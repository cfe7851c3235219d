"""What the engines ask of a network: its trainable parameters, and that it keeps examples apart."""

from collections.abc import Iterator

from torch import nn

from dp_synth.errors import UserError


def trainable_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name. Raises UserError where there is none."""
    params = {name: param for name, param in net.named_parameters() if param.requires_grad}
    if not params:
        raise UserError("the network has no trainable parameter: nothing to clip")
    return params


def layers_with_trainable(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for each module that owns a trainable parameter directly."""
    for name, module in net.named_modules():
        if any(param.requires_grad for param in module.parameters(recurse=False)):
            yield name or "the network itself", module


def refuse_batch_statistics(net: nn.Module) -> None:
    """Refuse layers that mix examples, or keep statistics of private images in their buffers."""
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and (
            isinstance(module, nn.modules.batchnorm._BatchNorm) or module.track_running_stats
        ):
            raise UserError(
                f"{name} ({type(module).__name__}) keeps statistics over examples, which no"
                " clipping bounds: use GroupNorm in its place"
            )
