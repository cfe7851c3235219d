"""Measures engines: time in interleaved rounds, error to brute force, peak memory."""

import gc
import multiprocessing
import re
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from engines import ENGINES, Engine, Run
from networks import NETWORKS, Network, Point, Rows, row_loss
from torch import Tensor, nn

MIB = 2**20
# Share of the free memory that the gradients which an engine holds may take: activations come on
# top, and being killed for memory would end the whole table.
_LARGEST_SHARE = 0.5

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What is the same for all engines of a table."""

    device: str
    bf16: bool
    threads: int
    rounds: int

    def apply(self) -> None:
        """Set this process up: fp32 means fp32, not TF32; rivals' warnings stay out of the table."""
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        warnings.simplefilter("ignore")

    def bf16_of(self, engine: Engine) -> bool:
        """Whether this engine runs under bfloat16 autocast."""
        return self.bf16 or engine.bf16


@dataclass
class Measurement:
    """What was found out about one engine at one point; a failure says why something was not."""

    seconds: list[float] = field(default_factory=list)
    relative_error: float | None = None
    failure: str | None = None
    peak_bytes: int | None = None
    memory_failure: str | None = None


def brute_force(net: nn.Module, rows: Rows, examples: int) -> tuple[Gradient, float]:
    """The clipped sum and the bound that it was clipped to: the median of the examples' norms.

    One float32 backward per row, sums in float64, and nothing shared with any engine.
    """
    names, params = zip(*net.named_parameters(), strict=True)
    loss = row_loss(net, bf16=False)
    gradients = []
    for i in range(examples):
        draws = range(i, len(rows[0]), examples)
        mean = [torch.zeros_like(param, dtype=torch.float64) for param in params]
        for n in draws:
            value = loss(*(tensor[n : n + 1] for tensor in rows)).sum()
            for total, part in zip(mean, torch.autograd.grad(value, params), strict=True):
                total += part / len(draws)
        gradients.append([part.float().cpu() for part in mean])
    norms = torch.stack([_norm(gradient) for gradient in gradients])
    max_grad_norm = norms.median()
    factors = (max_grad_norm / norms).clamp(max=1)
    clipped = [
        sum(factor * part.double() for factor, part in zip(factors, parts, strict=True))
        for parts in zip(*gradients, strict=True)
    ]
    return dict(zip(names, clipped, strict=True)), max_grad_norm.item()


def compare(
    network: Network, point: Point, names: list[str], settings: Settings
) -> tuple[float, dict[str, Measurement]]:
    """Time the named engines in turn, round after round, each on a copy of the same network.

    The results that the last round left are compared with brute force. Whatever an engine raises
    becomes its ``failure``, and the others go on. Also returns the bound.
    """
    rows = network.random_rows(point, settings.device)
    expected, max_grad_norm = brute_force(network.build(settings.device), rows, point[0])
    measurements = {name: Measurement() for name in names}
    attached: dict[str, tuple[nn.Module, Run]] = {}
    for round_number in range(settings.rounds + 1):  # the first one warms up
        for name in names if round_number == 0 else list(attached):
            try:
                if round_number == 0:
                    net = network.build(settings.device)
                    attached[name] = net, _attach(name, net, point, max_grad_norm, settings)
                seconds = _time(*attached[name], rows, point[1], settings.device)
            except Exception as error:  # noqa: BLE001  one engine's fault must not end the table
                measurements[name].failure = _reason(error)
                attached.pop(name, None)
            else:
                if round_number > 0:
                    measurements[name].seconds.append(seconds)
            if name not in attached:
                _release_memory()  # not while the error holds its frames
    for name, (net, _) in attached.items():
        if ENGINES[name].private:
            grads = {key: param.grad for key, param in net.named_parameters()}
            measurements[name].relative_error = relative_error(grads, expected)
    return max_grad_norm, measurements


def _attach(
    name: str, net: nn.Module, point: Point, max_grad_norm: float, settings: Settings
) -> Run:
    engine = ENGINES[name]
    size = sum(param.numel() * param.element_size() for param in net.parameters())
    held, free = engine.gradients_held(point) * size, _free_memory(settings.device)
    if held > _LARGEST_SHARE * free:
        raise MemoryError(
            f"skipped: holds {engine.gradients_held(point)} gradients, {held // MIB} MiB, and"
            f" {free // MIB} MiB are free"
        )
    return engine.make(net, row_loss(net, settings.bf16_of(engine)), max_grad_norm)


def _time(net: nn.Module, run: Run, rows: Rows, multiplicity: int, device: str) -> float:
    net.zero_grad()
    _wait(device)
    begin = time.perf_counter()
    run(rows, multiplicity)
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def relative_error(found: Mapping[str, Tensor | None], expected: Gradient) -> float:
    """The norm of the difference over the norm of what is expected; a missing part is zero."""
    differences = []
    for name, part in expected.items():
        grad = found[name]
        differences.append(part if grad is None else part - grad.cpu().double())
    return (_norm(differences) / _norm(list(expected.values()))).item()


def _norm(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.double().square().sum() for part in parts]).sum().sqrt()


def measure_memory(
    network: str, point: Point, measurements: dict[str, Measurement], settings: Settings
) -> None:
    """Fill in the bytes that each engine's first call takes at most beyond network and rows.

    Each in a new process: memory that was once taken and given back hides what is taken next.
    """
    _release_memory()
    spawn = multiprocessing.get_context("spawn")  # a forked process would start from our memory
    for name, measurement in measurements.items():
        if measurement.failure is not None:
            continue
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            try:
                peak = pool.submit(_peak_bytes, network, point, name, settings)
                measurement.peak_bytes = peak.result()
            except Exception as error:  # noqa: BLE001  the engine's own, or its process was killed
                measurement.memory_failure = _reason(error)


def _peak_bytes(network: str, point: Point, name: str, settings: Settings) -> int:
    settings.apply()
    _load_code(name, settings)
    net = NETWORKS[network].build(settings.device)
    rows = NETWORKS[network].random_rows(point, settings.device)
    run = _attach(name, net, point, 1.0, settings)
    if settings.device == "cuda":
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(rows, point[1])
        return torch.cuda.max_memory_allocated() - base
    base = _kernel_says("/proc/self/status", "VmRSS")
    run(rows, point[1])
    return _kernel_says("/proc/self/status", "VmHWM") - base


def _load_code(name: str, settings: Settings) -> None:
    """Call the engine once on a tiny network: the code that this loads is not what is asked for."""
    tiny = NETWORKS["digits"]
    run = _attach(name, tiny.build(settings.device), (2, 1), 1.0, settings)
    run(tiny.random_rows((2, 1), settings.device), 1)


def _free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _kernel_says("/proc/meminfo", "MemAvailable")


def _kernel_says(path: str, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{path} does not tell {key}")
    return int(found[1]) * 1024


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
