"""The public prior: published, or trained once per configuration and kept in a cache."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import dp_synth
from dp_synth.building import build_module, build_network
from dp_synth.data.images import Images
from dp_synth.files import cache_folder
from dp_synth.fitting import fit
from dp_synth.loggers.journal import Journal
from dp_synth.privacy.plan import PublicPlan
from dp_synth.runs import Run


def cache_key(cfg: DictConfig) -> str:
    """A hash of everything that the public model depends on."""
    relevant: dict[str, Any] = {
        "public": _resolved(cfg.public),
        "model": _resolved(cfg.model),
        "flip": cfg.dataset.flip,
        "precision": cfg.trainer.precision,
        "seed": cfg.seed,
        "version": dp_synth.__version__,
    }
    for key in ("lr", "trainable"):  # of the private phase
        relevant["model"].pop(key)
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def _resolved(group: DictConfig) -> dict[str, Any]:
    """A group as plain values; it may quote keys of other groups."""
    container = OmegaConf.to_container(group, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def load_public(cfg: DictConfig) -> Images | None:
    """The public images; None where there are none, or a published model comes without."""
    return instantiate(cfg.public.load, split="train") if "load" in cfg.public else None


def is_cached(cfg: DictConfig) -> bool:
    """Whether the public model is there already: published, or trained by an earlier run."""
    return "checkpoint" in cfg.public or _cached_run(cfg).has_model()


def pretraining_journal(cfg: DictConfig) -> Path:
    """Where the rows of the public phase are, if the public model was trained here."""
    return _cached_run(cfg).journal_path


def _cached_run(cfg: DictConfig) -> Run:
    return Run(cache_folder() / "pretrained" / cache_key(cfg))


def pretrained(
    cfg: DictConfig, images: Images | None
) -> tuple[UNet2DModel, tuple[str, ...] | None]:
    """The public model and its class names: a published one, one from the cache, or trained now.

    Args:
        cfg: the config of a run.
        images: the public images, labelled; None where the model is there already.

    Returns:
        The network; its classes, None where a published model does not tell them.

    Raises:
        Interrupted: pre-training was stopped; it is short enough to begin again.
        UserError: the published model cannot be read.

    The cache holds run directories of their own, each written under another name and renamed when
    it is whole, so that an interrupted or a parallel pre-training leaves nothing half-written.
    """
    if "checkpoint" in cfg.public:
        return instantiate(cfg.public.checkpoint).load()
    run = _cached_run(cfg)
    if not run.has_model():
        assert images is not None
        _pretrain(cfg, images, run.path)
    return run.load_model()


def _pretrain(cfg: DictConfig, images: Images, directory: Path) -> None:
    plan = PublicPlan(
        batch_size=cfg.public.batch_size, steps=cfg.public.steps, num_examples=images.num_examples
    )
    net = build_network(cfg, images.shape, len(images.classes))
    module = build_module(cfg, net, plan, lr=cfg.public.lr)
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    # Not the whole config: where private images lie does not belong beside a public model.
    public = {group: _resolved(cfg[group]) for group in ("public", "model", "trainer")}
    run = Run.create(staging, OmegaConf.create(public))
    journal = Journal(run.journal_path)
    try:
        fit(module, images, plan, cfg.trainer, caption="public pre-training", logger=journal)
    except BaseException:
        shutil.rmtree(staging)  # it is begun again, under the number of another process
        raise
    run.write_statement(plan.statement(plan.steps, status="finished"))
    run.save_model(module.averaged_network(), module.diffusion, tuple(images.classes))
    try:
        staging.rename(directory)
    except OSError:
        if not Run(directory).has_model():
            raise
        shutil.rmtree(staging)  # another process was first, with the same model
