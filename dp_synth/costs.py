"""What a run needs of this machine: measured on random images, then multiplied out."""

import io
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image

from dp_synth.building import build_module, build_network, is_on
from dp_synth.data.cache import cores
from dp_synth.data.decoding import decode
from dp_synth.data.module import Batch
from dp_synth.fitting import build_trainer
from dp_synth.module import DiffusionModule, GradientEngine, MeanGradient
from dp_synth.pretraining import is_cached
from dp_synth.privacy.clipping import ClippingEngine
from dp_synth.privacy.clipping.choice import make_engine
from dp_synth.privacy.clipping.tuning import timings_file
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan

_REPEATS = 3
_DEFAULT_ROWS = 256  # measured at once where trainer.micro_batch_size is null
_DECODED_SIDE = 96  # pixels: a patch of Camelyon17


def measure_costs(cfg: DictConfig, plan: PrivacyPlan | PublicPlan) -> dict[str, Any]:
    """Parameters, memory and hours of each phase, on the device that the trainer would take.

    Args:
        cfg: the config of a run; ``dataset.image_shape`` and ``dataset.num_classes`` stand for the
            images, none of which is opened.
        plan: calibrated.

    Returns:
        ``device``, ``parameters``, ``trainable_parameters``, ``hours_fine_tuning``,
        ``hours_pretraining`` (0 if the cache has the public model), ``hours_sampling`` and
        ``memory_mib``: the peak of this process on a CPU, of the allocator on a GPU; ``backward``,
        what the engine does: ``EnginePlan``'s facts, or its name alone where it is another's (None
        without privacy).

    Raises:
        UserError: the trainer's device is not there.
    """
    trainer = build_trainer(cfg.trainer)
    device = trainer.strategy.root_device
    net = build_network(cfg, tuple(cfg.dataset.image_shape), cfg.dataset.num_classes).to(device)
    module = build_module(cfg, net, plan, lr=cfg.model.lr, trainable=cfg.model.trainable)
    if cfg.trainer.activation_checkpointing:
        net.enable_gradient_checkpointing()
    rows = plan.steps * plan.batch_size * plan.multiplicity
    with trainer.precision_plugin.forward_context():
        engine, backward = _prepared_engine(cfg, module, plan)
        fine_tuning = rows * _seconds_per_row(cfg, module, plan, engine) / 3600
        pretraining = _hours_of_pretraining(cfg, module)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in net.parameters()),
        "trainable_parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "hours_fine_tuning": fine_tuning,
        "hours_pretraining": pretraining,
        "hours_sampling": _hours_of_sampling(cfg, module),
        "memory_mib": _peak_memory_mib(device),
        "backward": backward,
    }


def measure_decoding(cfg: DictConfig, num_files: int) -> dict[str, float]:
    """Disk and time of decoding a data set of image files, as if they were small PNGs.

    Args:
        cfg: the config of a run whose data set is decoded into a cache.
        num_files: how many files it has.

    Returns:
        ``cache_mib`` and ``hours_decoding``, on all cores.
    """
    channels, resolution, _ = cfg.dataset.image_shape
    file = io.BytesIO()
    noise = torch.randint(0, 256, (_DECODED_SIDE, _DECODED_SIDE, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(file, "PNG")
    data = file.getvalue()
    seconds = _seconds(lambda: decode(data, "random pixels", resolution, channels))
    return {
        "cache_mib": num_files * math.prod(cfg.dataset.image_shape) / 2**20,
        "hours_decoding": num_files * seconds / cores() / 3600,
    }


def _prepared_engine(
    cfg: DictConfig, module: DiffusionModule, plan: PrivacyPlan | PublicPlan
) -> tuple[GradientEngine, dict[str, Any] | None]:
    """The engine of the plan, tuned as a run would, and how it will clip (None for no clipping)."""
    if isinstance(plan, PublicPlan):
        return MeanGradient(), None
    trainer = cfg.trainer
    engine = make_engine(module.net, plan, trainer.micro_batch_size, trainer.memory_mib)
    if not isinstance(engine, ClippingEngine):
        return engine, {"engine": plan.engine}
    rows = module.draw_rows(_random_batch(cfg, 1, module.net.device), step=0)
    loss = module.diffusion.row_loss(module.net)
    found = engine.tune(loss, rows, plan.multiplicity, plan.batch_size, cache=timings_file())
    return engine, {
        "engine": plan.engine,
        "fallback_reason": found.fallback_reason,
        "examples_per_backward": found.chunk.examples,
        "draws_per_backward": found.chunk.draws,
        "memory_mib": found.memory_mib,
        "ways": found.ways,
    }


def _seconds_per_row(
    cfg: DictConfig,
    module: DiffusionModule,
    plan: PrivacyPlan | PublicPlan,
    engine: GradientEngine,
) -> float:
    """Seconds of forward and backward per row."""
    rows_at_once = cfg.trainer.micro_batch_size or _DEFAULT_ROWS
    examples = max(1, min(plan.batch_size, rows_at_once // plan.multiplicity))
    rows = module.draw_rows(_random_batch(cfg, examples, module.net.device), step=0)
    loss = module.diffusion.row_loss(module.net)
    seconds = _seconds(lambda: engine.accumulate(loss, rows, plan.multiplicity))
    return seconds / len(rows[0])


def _hours_of_pretraining(cfg: DictConfig, module: DiffusionModule) -> float:
    if not is_on(cfg.public) or is_cached(cfg):
        return 0.0
    public = PublicPlan(
        batch_size=cfg.public.batch_size,
        steps=cfg.public.steps,
        num_examples=cfg.public.batch_size,
    )
    seconds = _seconds_per_row(cfg, module, public, MeanGradient())
    return public.steps * public.batch_size * seconds / 3600


@torch.no_grad()
def _hours_of_sampling(cfg: DictConfig, module: DiffusionModule) -> float:
    """Network calls alone; the scheduler's arithmetic is small beside them."""
    if not is_on(cfg.sampler):
        return 0.0
    sampler = instantiate(cfg.sampler)
    count = min(sampler.batch_size, sampler.num_images)
    batch = _random_batch(cfg, count, module.net.device)
    denoise = module.diffusion.denoiser(module.net, batch.labels)
    x, _, t, _ = module.draw_rows(batch, step=0)
    seconds = _seconds(lambda: denoise(x[:count], t[:count]))
    return seconds / count * sampler.num_images * sampler.network_calls / 3600


def _random_batch(cfg: DictConfig, examples: int, device: torch.device) -> Batch:
    pixels = torch.randint(0, 256, (examples, *cfg.dataset.image_shape), dtype=torch.uint8)
    labels = torch.randint(0, cfg.dataset.num_classes, (examples,))
    return Batch(torch.arange(examples), pixels.to(device), labels.to(device))


def _seconds(work: Callable[[], Any]) -> float:
    """Median seconds of a call, after one that warms up."""
    times = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
