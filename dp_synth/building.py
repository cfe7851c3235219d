"""Builds the objects of a run from its config; everything is checked before any image is read."""

import torch
from diffusers import UNet2DModel
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dp_synth.checks import count, flag, fraction, positive, whole
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.fitting import build_trainer
from dp_synth.module import DiffusionModule
from dp_synth.networks import Trainable, choose_trainable
from dp_synth.privacy.optimizer import NoisingOptimizer
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.process import Process

_FLAGS = (
    "dataset.flip",
    "dataset.verify",  # where there is something to verify
    "dataset.download",
    "trainer.activation_checkpointing",
    "trainer.diagnostics",
)


def is_on(group: DictConfig) -> bool:
    """Whether a config group names something to do (its ``none`` option does not)."""
    return any(key in group for key in ("_target_", "load", "checkpoint"))


def check_config(cfg: DictConfig, plan: PrivacyPlan | PublicPlan) -> None:
    """Build once, on declared shapes, what a run will build: mistakes show before any image.

    Raises:
        UserError: naming the key of what cannot be built.
    """
    whole("seed", cfg.seed)
    for key in _FLAGS:
        flag(key, OmegaConf.select(cfg, key, default=False))
    positive("model.lr", cfg.model.lr)
    fraction("model.ema_decay", cfg.model.ema_decay)
    fraction("model.label_dropout", cfg.model.label_dropout)
    count("trainer.checkpoint_every", cfg.trainer.checkpoint_every)
    _check_declared(cfg, plan)
    if "checkpoint" in cfg.public:
        instantiate(cfg.public.checkpoint).refuse_other_process(build_diffusion(cfg))
    elif is_on(cfg.public):
        positive("public.lr", cfg.public.lr)
        count("public.steps", cfg.public.steps)
        count("public.batch_size", cfg.public.batch_size)
    net = build_network(cfg, tuple(cfg.dataset.image_shape), cfg.dataset.num_classes)
    module = build_module(cfg, net, plan, lr=cfg.model.lr, trainable=cfg.model.trainable)
    if isinstance(plan, PrivacyPlan):
        NoisingOptimizer(module.configure_optimizers(), plan)  # refuses noise that cannot be had
    if is_on(cfg.audit):
        instantiate(cfg.audit).check(plan, net)
    if cfg.ledger.max_eps is not None:
        positive("ledger.max_eps", cfg.ledger.max_eps)
    build_trainer(cfg.trainer)
    for group in (cfg.sampler, cfg.evaluator, cfg.logger):
        if is_on(group):
            instantiate(group)


def _check_declared(cfg: DictConfig, plan: PrivacyPlan | PublicPlan) -> None:
    """UserError where the plan is about other examples than those that will be loaded."""
    str(cfg.dataset.name)  # OmegaConf names a key that must be given
    for size in cfg.dataset.image_shape:
        count("dataset.image_shape: a size", size)
    count("dataset.num_classes", cfg.dataset.num_classes)
    canaries = instantiate(cfg.audit).num_canaries if is_on(cfg.audit) else 0
    if plan.num_examples != cfg.dataset.num_examples + canaries:
        raise UserError(
            f"privacy.num_examples={plan.num_examples} is not "
            f"dataset.num_examples={cfg.dataset.num_examples}; leave privacy.num_examples out."
        )
    # Else the statement would promise the protection of units that nothing clips as one.
    loaded = OmegaConf.select(cfg, "dataset.load.unit")
    if isinstance(plan, PrivacyPlan) and plan.unit != loaded:
        raise UserError(
            f"privacy.unit={plan.unit} is not what dataset={cfg.dataset.name} is loaded by "
            f"({loaded or 'the image'}); leave privacy.unit out and set dataset.unit, where a data "
            "set has it."
        )


def build_network(cfg: DictConfig, image_shape: tuple[int, int, int], classes: int) -> UNet2DModel:
    """The network with initial weights that depend on the public seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return instantiate(cfg.model.network)(image_shape, classes)


def build_module(
    cfg: DictConfig,
    net: UNet2DModel,
    plan: PrivacyPlan | PublicPlan,
    *,
    lr: float,
    trainable: Trainable = "all",
) -> DiffusionModule:
    """The module that trains ``net`` under a plan.

    Args:
        cfg: the config of a run, which ``check_config`` has found sound.
        net: its parameters are frozen where ``trainable`` says so.
        plan: multiplicity, and where randomness comes from.
        lr: Adam's learning rate.
        trainable: see ``networks.choose_trainable``.

    Raises:
        UserError: ``trainable`` names no parameter.
    """
    choose_trainable(net, trainable)
    return DiffusionModule(
        net=net,
        diffusion=build_diffusion(cfg),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr),
        randomness=plan.randomness(cfg.seed),
        multiplicity=plan.multiplicity,
        ema_decay=cfg.model.ema_decay,
        label_dropout=cfg.model.label_dropout,
        flip=cfg.dataset.flip,
    )


def build_diffusion(cfg: DictConfig) -> Process:
    """The diffusion process of ``model.diffusion``."""
    return instantiate(cfg.model.diffusion)


def load_images(cfg: DictConfig, split: str) -> Images:
    """One split of the private data set.

    Raises:
        UserError: the training split does not have the declared number of examples, or of units
            where there are units; or shape or classes are not the declared ones.
    """
    images: Images = instantiate(cfg.dataset.load, split=split)
    counted = "examples" if images.units is None else "units (dataset.unit)"
    if split == "train" and images.num_examples != cfg.dataset.num_examples:
        raise UserError(
            f"dataset.num_examples={cfg.dataset.num_examples}, but the training split has "
            f"{images.num_examples} {counted}; declare dataset.num_examples={images.num_examples}."
        )
    declared = (*cfg.dataset.image_shape, cfg.dataset.num_classes)
    found = (*images.shape, len(images.classes))
    if declared != found:
        raise UserError(
            f"dataset.image_shape and dataset.num_classes declare {declared}, but the images have "
            f"{found} (channels, height, width, classes); declare these."
        )
    return images
