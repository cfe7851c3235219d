"""Which way each layer's weight gradient is computed: by rule of thumb, or measured once."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dp_synth.files import write_atomically
from dp_synth.privacy.clipping.book_keeping import BookKept
from dp_synth.privacy.clipping.contributions import Contribution, squared_norms
from dp_synth.privacy.clipping.recording import Call, Ways

_REPEATS = 2
# Another way than the default must be this much faster: below, it is noise.
_GAIN = 0.9


class LayerWays:
    """The ways in use by layer name; a layer that is new takes its rule's default."""

    def __init__(self) -> None:
        self._ways: dict[str, str] = {}

    def as_dict(self) -> dict[str, str]:
        """Return the way of each layer that has been called and has several, by name."""
        return dict(self._ways)

    def choose(self, call: Call, x: Tensor, ways: Ways, default: str) -> Contribution:
        """Return what the layer's way contributes."""
        way = self._ways.setdefault(call.name, default)
        # The first way is always possible; another may not be in this precision.
        return ways[way if way in ways else next(iter(ways))]()

    def take(self, measured: Mapping[str, str]) -> None:
        """Use these ways, by layer name."""
        self._ways.update(measured)


class Tuner:
    """Times every way of each layer on the tensors of one backward, each shape once.

    Args:
        known: ways by layer shape, from an earlier time on this machine; added to.
    """

    def __init__(self, known: dict[str, str]) -> None:
        self.known = known
        self.ways: dict[str, str] = {}

    def choose(self, call: Call, x: Tensor, ways: Ways, default: str) -> Contribution:
        """Return what the fastest way contributes."""
        shape = _describe(call, x)
        if self.known.get(shape) not in ways:
            memory = call.recording.grads.memory_for(call.weight)
            self.known[shape] = _fastest(ways, default, memory)
        self.ways[call.name] = self.known[shape]
        return ways[self.known[shape]]()


def _describe(call: Call, x: Tensor) -> str:
    layer = f"{type(call.layer).__name__}({call.layer.extra_repr()})"
    return (
        f"{layer} of {str(x.dtype).removeprefix('torch.')} {list(x.shape)}, K={call.multiplicity}"
    )


def _fastest(ways: Ways, default: str, memory: Tensor) -> str:
    first = default if default in ways else next(iter(ways))
    seconds = {way: fastest_seconds(partial(_make_and_use, ways[way], memory)) for way in ways}
    best = min(seconds, key=lambda way: seconds[way])
    return best if seconds[best] < _GAIN * seconds[first] else first


def fastest_seconds(work: Callable[[], object]) -> float:
    """Return the least seconds of a few calls, after one that warms up."""
    times = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _make_and_use(make: Callable[[], Contribution], memory: Tensor) -> None:
    """Do with a contribution all that a clipped sum will: that is part of its cost."""
    contribution = make()
    if isinstance(contribution, BookKept):
        squares = contribution.squared_norms()
        contribution.weighted_sum(torch.ones_like(squares))
    else:
        contribution.write(memory, first=True)
        flat = memory.flatten(1)
        squared_norms(flat)
        torch.mv(flat.t(), flat.new_ones(len(flat)))


class TimingsCache:
    """What was fastest on this machine, by what was timed, in a JSON file that runs share.

    A file that cannot be read or written costs a measurement, and nothing else.

    Args:
        path: of the file, which need not exist; None keeps nothing.
        device: what is timed; with torch's version and its number of threads it tells machines
            apart.

    Attributes:
        known: what was timed -> what was fastest; to be added to.
    """

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self._path = path
        if device.type == "cuda":
            kind = torch.cuda.get_device_name(device)
        else:
            kind = f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
        self._machine = f"{kind}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        self.known = {str(what): str(it) for what, it in self._read_machine().items()}

    def save(self) -> None:
        """Add what is known to what the file holds by now."""
        if self._path is None:
            return
        known = {**self._read_machine(), **self.known}
        content = {**self._read(), self._machine: known}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(content, indent=1, sort_keys=True) + "\n")

    def _read_machine(self) -> dict[str, str]:
        return self._read().get(self._machine, {})

    def _read(self) -> dict[str, dict[str, str]]:
        if self._path is None:
            return {}
        try:
            content = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        sound = isinstance(content, dict) and all(isinstance(v, dict) for v in content.values())
        return content if sound else {}
