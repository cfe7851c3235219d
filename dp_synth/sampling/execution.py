"""How the network is run while sampling: as is fastest on the machine at hand, measured once."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from dp_synth.sampling.sampler import Sampler

# Another way than the simpler one must be this much faster: below, it is noise.
_GAIN = 0.9
# Work ahead, in seconds, of which saving a part is worth measuring, and worth compiling for, which
# itself takes a minute or more. Short work also stays the same from one time to the next.
_WORTH_MEASURING = 60.0
_WORTH_COMPILING = 900.0
_REPEATS = 3


@dataclass(frozen=True)
class Execution:
    """How the network is run; it decides no image but by rounding, which bf16 makes visible.

    Attributes:
        precision: "32-true", or "bf16": bfloat16 autocast, weights and images in float32.
        channels_last: whether tensors lie in memory pixel by pixel.
        compile: whether torch.compile makes kernels for it.
    """

    precision: str = "32-true"
    channels_last: bool = False
    compile: bool = False

    def describe(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """The line that is shown."""
        extras = [name for name in ("channels_last", "compile") if getattr(self, name)]
        return ", ".join([f"precision {self.precision}", *extras])


def asked_for(sampler: Sampler) -> dict[str, Any]:
    """What the user has fixed of an execution."""
    asked = {name: getattr(sampler, name) for name in Execution().describe()}
    return {name: value for name, value in asked.items() if value != "auto"}


class ExecutedNetwork:
    """A network that is called like it was, and runs as an execution says.

    Args:
        net: in evaluation mode; its weights' layout is changed where the execution says so.
        execution: where compiling fails, the network runs without, and a sentence says so.
    """

    def __init__(self, net: UNet2DModel, execution: Execution) -> None:
        self.config = net.config
        self.device = net.device
        self._net = net
        self._bf16 = execution.precision == "bf16"
        self._layout = torch.channels_last if execution.channels_last else torch.contiguous_format
        net.to(memory_format=self._layout)
        # Each size of batch by itself: kernels for any size would round as the first one's do not.
        compiled = torch.compile(net, dynamic=False) if execution.compile else net
        self._forward: Callable[..., Any] = compiled

    def __call__(
        self, x: Tensor, t: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The network's output in float32."""
        x = x.contiguous(memory_format=self._layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            output = self._run(x, t, class_labels)
        return (output.float(),)

    def _run(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        try:
            output: Tensor = self._forward(x, t, class_labels=y, return_dict=False)[0]
        except Exception as error:  # compilers raise whatever they like
            if self._forward is self._net:
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            print(
                f"torch.compile failed, so that sampling goes on without it: {reason}",
                file=sys.stderr,
            )
            self._forward = self._net
            output = self._forward(x, t, class_labels=y, return_dict=False)[0]
        return output


def choose(
    asked: dict[str, Any],
    calls: int,
    seconds: Callable[[Execution], float],
    native_bf16: bool,
) -> Execution:
    """The fastest execution with what is asked for; the simplest where none wins clearly.

    Args:
        asked: what is fixed, by the names of ``Execution``'s attributes.
        calls: network calls ahead.
        seconds: measures a network call; it is asked about nothing whose gain could not matter.
        native_bf16: whether bfloat16 is the device's own: emulated it may win, and rounds for little.
    """
    best = Execution(**asked)
    candidates: list[tuple[dict[str, Any], float]] = [
        ({"precision": "bf16"}, _WORTH_MEASURING),
        ({"channels_last": True}, _WORTH_MEASURING),
        ({"compile": True}, _WORTH_COMPILING),
    ]
    open_ones = [
        (change, worth)
        for change, worth in candidates
        if not change.keys() & asked.keys() and (native_bf16 or "precision" not in change)
    ]
    if not open_ones:
        return best
    best_seconds = seconds(best)
    for change, worth in open_ones:
        if calls * best_seconds < worth:
            continue
        candidate = replace(best, **change)
        candidate_seconds = seconds(candidate)
        if candidate_seconds < _GAIN * best_seconds:
            best, best_seconds = candidate, candidate_seconds
    return best


def measured(net: UNet2DModel, sampler: Sampler) -> Execution:
    """The execution for a sampler's work on the network's device, measured on a batch of its size.

    Args:
        net: in evaluation mode.
        sampler: what is to be drawn.
    """
    rows = min(sampler.batch_size, sampler.num_images)
    shape = (rows, net.config.in_channels, *net.config.sample_size)
    x, t = torch.randn(shape, device=net.device), torch.ones(rows, device=net.device)
    y = torch.arange(rows, device=net.device) % net.config.num_class_embeds
    return choose(
        asked_for(sampler),
        -(-sampler.num_images // rows) * sampler.network_calls,
        lambda execution: _seconds(ExecutedNetwork(net, execution), x, t, y),
        native_bf16=_has_native_bf16(net.device),
    )


@torch.no_grad()
def _seconds(net: ExecutedNetwork, x: Tensor, t: Tensor, y: Tensor) -> float:
    """Median seconds of a call, after one that warms up."""
    times = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        net(x, t, class_labels=y)
        if net.device.type == "cuda":
            torch.cuda.synchronize(net.device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Nothing public tells: torch.backends.cpu says AVX512 with and without it.
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, ask, bool)() for ask in asks)
