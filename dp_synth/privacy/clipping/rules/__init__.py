"""One rule per layer type: its forward, its input gradient, and its gradients per example."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dp_synth.privacy.clipping.network import layers_with_trainable
from dp_synth.privacy.clipping.recording import Call, Recording, UnsupportedInput
from dp_synth.privacy.clipping.rules.convolution import (
    recorded_convolution,
    recorded_transposed_convolution,
)
from dp_synth.privacy.clipping.rules.embedding import recorded_embedding
from dp_synth.privacy.clipping.rules.linear import recorded_linear
from dp_synth.privacy.clipping.rules.normalization import recorded_group_norm, recorded_layer_norm

RECORDED: dict[type[nn.Module], Callable[[Any, Call, Tensor], Tensor]] = {
    nn.Linear: recorded_linear,
    nn.Conv1d: recorded_convolution,
    nn.Conv2d: recorded_convolution,
    nn.Conv3d: recorded_convolution,
    nn.ConvTranspose1d: recorded_transposed_convolution,
    nn.ConvTranspose2d: recorded_transposed_convolution,
    nn.ConvTranspose3d: recorded_transposed_convolution,
    nn.GroupNorm: recorded_group_norm,
    nn.LayerNorm: recorded_layer_norm,
    nn.Embedding: recorded_embedding,
}


def why_unsupported(module: nn.Module) -> str | None:
    """Return why no rule covers this module's own trainable parameters, or None if one does.

    The type must match exactly: a subclass may compute anything.
    """
    own = {name for name, param in module.named_parameters(recurse=False) if param.requires_grad}
    if type(module) not in RECORDED or not own <= {"weight", "bias"}:
        return "no rule for this layer type"
    if "forward" in vars(module):
        return "its forward has been replaced"
    if isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq):
        return "max_norm and scale_grad_by_freq act across rows"
    return None


def why_unrecorded(net: nn.Module) -> str | None:
    """Return why gradients of this network cannot be recorded, with the layer's name, or None."""
    for name, module in net.named_modules():
        # Compiled code has read the forwards already, so that swapping them would record nothing.
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return f"{name or 'the network itself'}: compiled"
    for name, module in layers_with_trainable(net):
        reason = why_unsupported(module)
        if reason is not None:
            return f"{name} ({type(module).__name__}): {reason}"
    return None


def recorded_forward(name: str, module: nn.Module, recording: Recording) -> Callable[..., Tensor]:
    """Return a forward for `module` that computes the same, and records gradients on the way back.

    Its input must hold the recording's rows in its leading dimension, else it raises
    `UnsupportedInput`. An input whose leading dimension is another thing of by chance the same
    length cannot be told: the self-check, which runs with another number of rows, finds it.
    """
    record = RECORDED[type(module)]
    call = Call(name, module, recording)

    # `input` is torch's own name: callers may pass it by keyword.
    def forward(input: Tensor, *more: Any, **options: Any) -> Tensor:
        if more or options:
            raise UnsupportedInput(f"{name}: called with more than its input")
        if input.dim() == 0 or len(input) != recording.rows:
            raise UnsupportedInput(f"{name}: its input's leading dimension is not the rows")
        try:
            return record(module, call, input)
        except UnsupportedInput as error:
            raise UnsupportedInput(f"{name}: {error}") from None

    return forward
