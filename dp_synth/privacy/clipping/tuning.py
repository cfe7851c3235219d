"""Which way each layer's weight gradient is computed: by rule of thumb, or measured once."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dp_synth.files import cache_folder, write_atomically
from dp_synth.privacy.clipping.book_keeping import BookKept
from dp_synth.privacy.clipping.contributions import Contribution, squared_norms
from dp_synth.privacy.clipping.recording import Call, Ways

_REPEATS = 2
_SIZES = 5
# Another way than the default must be this much faster: below, it is noise.
_GAIN = 0.9
_WORTH_DOUBLING = 0.95


class LayerWays:
    """The ways in use by layer name; a layer that is new takes its rule's default."""

    def __init__(self) -> None:
        self._ways: dict[str, str] = {}

    def as_dict(self) -> dict[str, str]:
        """Return the way of each layer that has been called and has several, by name."""
        return dict(self._ways)

    def choose(self, call: Call, x: Tensor, ways: Ways, default: str) -> Contribution:
        """Return what the layer's way contributes."""
        way = self._ways.get(call.name, default)
        if way not in ways:  # it may not be possible in this precision, or for so many rows
            way = next(iter(ways))
        self._ways[call.name] = way
        return ways[way]()

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
    if all(time == math.inf for time in seconds.values()):
        return first
    best = min(seconds, key=lambda way: seconds[way])
    return best if seconds[best] < _GAIN * seconds[first] else first


def fastest_size(largest: int, work: Callable[[int], object]) -> int:
    """Return which of `largest`, its half, quarter .. makes `work` fast for its size.

    Twice the size takes twice the memory, and must gain a twentieth for it.
    """
    sizes = sorted({max(1, largest >> halvings) for halvings in range(_SIZES)})
    best, least = sizes[0], math.inf
    for size in sizes:
        seconds = fastest_seconds(partial(work, size)) / size
        if seconds >= _WORTH_DOUBLING * least:
            break  # larger ones are slower still, and take long to try
        best, least = size, seconds
    return best


def fastest_seconds(work: Callable[[], object]) -> float:
    """Return the least seconds of a few calls, after one that warms up; infinity if memory ends."""
    times = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        try:
            work()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return math.inf
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _make_and_use(make: Callable[[], Contribution], memory: Tensor) -> None:
    """Do with a contribution all that a clipped sum will: that is part of its cost."""
    contribution = make()
    if isinstance(contribution, BookKept):
        squares = contribution.squared_norms()
        contribution.weighted_sum(torch.ones_like(squares), some_left_out=False)
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
        ways: layer shape -> way; to be added to.
        sizes: network and rows -> examples at once; to be added to.
    """

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self._path = path
        if device.type == "cuda":
            kind = torch.cuda.get_device_name(device)
        else:
            kind = f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
        self._machine = f"{kind}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        ways, sizes = self._read("ways"), self._read("sizes")
        self.ways = {key: way for key, way in ways.items() if isinstance(way, str)}
        self.sizes = {key: n for key, n in sizes.items() if isinstance(n, int) and n >= 1}

    def save(self) -> None:
        """Add what is known to what the file holds by now."""
        if self._path is None:
            return
        known = {
            "ways": {**self._read("ways"), **self.ways},
            "sizes": {**self._read("sizes"), **self.sizes},
        }
        content = json.dumps({**self._content(), self._machine: known}, indent=1, sort_keys=True)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, content + "\n")

    def _read(self, part: str) -> dict[str, Any]:
        machine = self._content().get(self._machine)
        found = machine.get(part) if isinstance(machine, dict) else None
        return found if isinstance(found, dict) else {}

    def _content(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        try:
            content = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}


def timings_file() -> Path:
    """Where timings are kept between runs."""
    return cache_folder() / "clipping_timings.json"
