"""The public prior: trained once per configuration, kept in a cache, reused by later runs."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from diffusers import UNet2DModel
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import dp_synth
from dp_synth.building import build_module, build_network
from dp_synth.data.images import Images
from dp_synth.fitting import fit
from dp_synth.privacy.plan import PublicPlan
from dp_synth.runs import Run


def cache_key(cfg: DictConfig) -> str:
    """A hash of everything that the public model depends on."""
    relevant = OmegaConf.to_container(
        OmegaConf.create(
            {
                "public": cfg.public,
                "model": cfg.model,
                "flip": cfg.dataset.flip,
                "precision": cfg.trainer.precision,
                "seed": cfg.seed,
            }
        ),
        resolve=True,
    )
    assert isinstance(relevant, dict)
    relevant["public"].pop("cache")
    for key in ("lr", "trainable"):  # of the private phase
        relevant["model"].pop(key)
    relevant["version"] = dp_synth.__version__
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def load_public(cfg: DictConfig) -> Images:
    """The public images."""
    return instantiate(cfg.public.load, split="train")


def is_cached(cfg: DictConfig) -> bool:
    """Whether the public model is there already."""
    return _cached_run(cfg).has_model()


def _cached_run(cfg: DictConfig) -> Run:
    return Run(Path(cfg.public.cache).expanduser() / "pretrained" / cache_key(cfg))


def pretrained(cfg: DictConfig, images: Images) -> tuple[UNet2DModel, tuple[str, ...]]:
    """The public model and its class names, from the cache or trained now.

    Args:
        cfg: the config of a run; ``public.cache`` is where the cache stands.
        images: the public images, labelled.

    Raises:
        Interrupted: pre-training was stopped; it is short enough to begin again.

    The cache holds run directories of their own, each written under another name and renamed when
    it is whole, so that an interrupted or a parallel pre-training leaves nothing half-written.
    """
    run = _cached_run(cfg)
    if not run.has_model():
        _pretrain(cfg, images, run.path)
    return run.load_model()


def _pretrain(cfg: DictConfig, images: Images, directory: Path) -> None:
    plan = PublicPlan(
        batch_size=cfg.public.batch_size, steps=cfg.public.steps, num_examples=images.num_units
    )
    net = build_network(cfg, images.shape, len(images.classes))
    module = build_module(cfg, net, plan, lr=cfg.public.lr)
    fit(module, images, plan, cfg.trainer, caption="public pre-training")
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    run = Run.create(staging, cfg)
    run.write_statement(plan.statement(plan.steps, status="finished"))
    run.save_model(module.averaged_network(), module.diffusion, tuple(images.classes))
    try:
        staging.rename(directory)
    except OSError:
        if not Run(directory).has_model():
            raise
        shutil.rmtree(staging)  # another process was first, with the same model
