"""The private phase: takes the plan's steps, keeps ``privacy.json`` true at every moment."""

from diffusers import UNet2DModel
from omegaconf import DictConfig

from dp_synth.building import build_module, is_on
from dp_synth.checkpoints import PeriodicCheckpoint, resume_point
from dp_synth.data.images import Images
from dp_synth.fitting import Interrupted, fit
from dp_synth.loggers.journal import Journal
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.runs import Run
from dp_synth.versions import versions


def fine_tune(
    run: Run,
    cfg: DictConfig,
    plan: PrivacyPlan | PublicPlan,
    net: UNet2DModel,
    images: Images,
) -> None:
    """Fine-tune ``net`` under the plan and leave ``model/`` and ``privacy.json`` in the run.

    The statement is written with the whole planned eps before the first image is used, so that a
    run that dies never under-states. A run that has its model already is left as it is.

    Args:
        run: receives checkpoints, logs, statement and model.
        plan: calibrated.
        net: the starting point; changed in place.
        images: the private training split.
    """
    if run.has_model():
        return
    run.write_statement(plan.statement(0, status="running") | versions())
    module = build_module(cfg, net, plan, lr=cfg.model.lr, trainable=cfg.model.trainable)
    try:
        fit(
            module,
            images,
            plan,
            cfg.trainer,
            caption="fine-tuning",
            logger=Journal(run.journal_path) if is_on(cfg.logger) else None,
            checkpoints=PeriodicCheckpoint(run.checkpoints_dir, cfg.trainer.checkpoint_every),
            resume_from=resume_point(run.checkpoints_dir),
        )
    except Interrupted as stop:
        run.write_statement(plan.statement(stop.steps_taken, status="interrupted") | versions())
        raise
    run.write_statement(plan.statement(plan.steps, status="finished") | versions())
    run.save_model(module.averaged_network(), module.diffusion, tuple(images.classes))
