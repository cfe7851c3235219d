"""The private phase: takes the plan's steps, keeps ``privacy.json`` and the ledger true throughout."""

from diffusers import UNet2DModel
from hydra.utils import instantiate
from omegaconf import DictConfig

from dp_synth.books import Books
from dp_synth.building import build_module, is_on, load_images
from dp_synth.cards import write_model_card
from dp_synth.checkpoints import (
    PeriodicCheckpoint,
    Progress,
    resume_point,
    write_progress,
)
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.evaluate import check_test_images, reads_private_images
from dp_synth.fitting import Interrupted, fit
from dp_synth.loggers.journal import Journal
from dp_synth.privacy.label_histogram import histogram_noise, noised_shares
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.privacy.silence import silently
from dp_synth.reporting.officer import write_privacy_page
from dp_synth.runs import Run
from dp_synth.versions import versions


def first_look(
    run: Run, cfg: DictConfig, plan: PrivacyPlan | PublicPlan
) -> tuple[PrivacyPlan | PublicPlan, Images]:
    """Reserve the plan in the ledger, then read the private images that the run will use.

    A new run that gets no further leaves nothing, in the ledger nor on the disk.

    Args:
        run: new, or to be continued.
        plan: calibrated.

    Returns:
        The plan, with the steps of abandoned branches in it, and the training split.

    Raises:
        UserError: the budget of the ledger or of the plan does not hold the run; or an image
            cannot be read.
    """
    books = Books(run, cfg)
    reserved = False
    try:
        _, progress = resume_point(run.checkpoints_dir)
        plan = plan.after_abandoning(progress.abandoned)
        if not run.has_model():
            _refuse_forgotten(run, books, plan, progress)
            books.reserve(plan)
            reserved = True
        images = load_images(cfg, split="train")
        if is_on(cfg.sampler) and is_on(cfg.evaluator) and reads_private_images(cfg):
            check_test_images(cfg)
    except Exception:  # whatever it is: Hydra wraps a UserError in one of its own
        if reserved and cfg.resume:
            books.settle(plan, progress.steps)
        elif reserved:
            books.cancel(plan)
        if not cfg.resume:
            run.discard()
        raise
    return plan, images


def _refuse_forgotten(
    run: Run, books: Books, plan: PrivacyPlan | PublicPlan, progress: Progress
) -> None:
    """UserError where files are gone without which a run would spend eps that nobody counts."""
    books.refuse_forgotten(progress)
    if progress.steps and plan.label_histogram_noise_multiplier and run.label_shares() is None:
        raise UserError(
            f"{run.label_shares_path} is missing; to ask again would spend its eps twice, so "
            "restore it or start a new run."
        )


def fine_tune(
    run: Run,
    cfg: DictConfig,
    plan: PrivacyPlan | PublicPlan,
    net: UNet2DModel,
    images: Images,
    public: Images | None = None,
) -> None:
    """Fine-tune ``net`` under the plan and leave ``model/`` and ``privacy.json`` in the run.

    The statement is written with the whole planned eps before the first image is used, so that a
    run that dies never under-states. A run that has its model already is left as it is.

    Args:
        run: receives checkpoints, logs, statement and model; its plan is reserved in the ledger.
        plan: calibrated.
        net: the starting point; changed in place.
        images: the private training split.
        public: images of which an audit makes canaries.
    """
    if run.has_model():
        write_model_card(run)  # a kill may have come between the two
        return

    def state(steps_taken: int, status: str) -> None:
        marks = {"audit": auditor.mark} if auditor else {}
        run.write_statement(books.statement(plan, steps_taken, status) | marks | versions())
        write_privacy_page(run)

    books = Books(run)
    auditor = instantiate(cfg.audit) if is_on(cfg.audit) else None
    checkpoint, progress = resume_point(run.checkpoints_dir)
    write_progress(run.checkpoints_dir, progress)
    state(0, status="running")
    module = build_module(cfg, net, plan, lr=cfg.model.lr, trainable=cfg.model.trainable)
    if cfg.trainer.diagnostics and plan.private:
        books.record_look(
            "Losses, norms and batch sizes of training were written to local/diagnostics.csv; a "
            "choice made by them spends more than eps."
        )
    _query_label_shares(run, cfg, plan, images)
    canary_callbacks = []
    if auditor is not None:
        canaries = auditor.plant(run, images, public)
        images = canaries.insert(images)
        canary_callbacks = [auditor.callback(canaries, plan)]
    try:
        fit(
            module,
            images,
            plan,
            cfg.trainer,
            caption="fine-tuning",
            logger=Journal(run.journal_path) if is_on(cfg.logger) else None,
            checkpoints=PeriodicCheckpoint(run.checkpoints_dir, cfg.trainer.checkpoint_every),
            resume_from=checkpoint,
            local_dir=run.local_dir,
            diagnostics=cfg.trainer.diagnostics,
            callbacks=canary_callbacks,
        )
    except Interrupted as stop:
        state(stop.steps_taken, status="interrupted")
        books.settle(plan, stop.steps_taken)
        raise
    state(plan.steps, status="finished")
    books.settle(plan, plan.steps)
    run.save_model(module.averaged_network(), module.diffusion, tuple(images.classes))
    write_model_card(run)


def _query_label_shares(
    run: Run, cfg: DictConfig, plan: PrivacyPlan | PublicPlan, images: Images
) -> None:
    """Ask once in a run for the classes' shares, if the plan says so: each answer costs its eps."""
    if run.label_shares() is not None or plan.label_histogram_noise_multiplier is None:
        return
    assert isinstance(plan, PrivacyPlan)
    noise = histogram_noise(plan, cfg.seed, len(images.classes))
    shares = silently(lambda: noised_shares(images, noise), run.local_dir)
    run.write_label_shares(dict(zip(images.classes, shares.tolist(), strict=True)))
