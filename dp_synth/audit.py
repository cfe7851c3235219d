"""``python -m dp_synth.audit run=DIR``: what attacks on a finished run show, beside what it claims."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dp_synth.books import Books
from dp_synth.building import build_diffusion, is_on, load_images
from dp_synth.checks import count, whole
from dp_synth.cli import command
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.formats.reading import read_samples
from dp_synth.metrics.evidence import subset
from dp_synth.pretraining import load_public
from dp_synth.privacy.audit.canary_audit import checked_confidence
from dp_synth.privacy.audit.losses import mean_losses
from dp_synth.privacy.audit.membership import membership, unit_means
from dp_synth.privacy.audit.one_run import Scores
from dp_synth.privacy.audit.record import (
    membership_entry,
    read_record,
    table,
    write_record,
)
from dp_synth.runs import Run
from dp_synth.summary import print_metrics


def audit_canaries(run: Run) -> dict[str, Any]:
    """What the canaries of a run with ``audit=canaries`` show; no private image is looked at.

    Returns:
        The run's ``audit.json``; it is left as it is if the canaries are in it.
    """
    record = read_record(run.audit_path)
    auditor = instantiate(run.config().audit)
    if auditor.is_in(record["attacks"]):
        return record
    return write_record(run.audit_path, run.statement(), attacks=auditor.report(run))


def audit_run(run: Run, cfg: DictConfig) -> dict[str, Any]:
    """Attack a finished run; the look at private images is recorded before it is taken.

    Args:
        run: finished. Where it was trained with ``audit=canaries``, these are attacked, too.
        cfg: the config of ``conf/audit.yaml``.

    Returns:
        The run's ``audit.json``: what these attacks show, and what earlier ones have shown.

    Raises:
        UserError: the run has no model, a value is out of range, or no split is held out.
    """
    run.load_model()  # before anything is looked at
    own = run.config()
    held_out = _held_out_split(own, cfg)
    confidence = checked_confidence("membership.confidence", cfg.membership.confidence)
    for key in ("max_images", "draws"):
        count(f"membership.{key}", cfg.membership[key])
    if "audit" in own and is_on(own.audit):
        audit_canaries(run)

    Books(run).record_look(
        "An audit compared the model with private images, without noise.",
        splits=["train", held_out],
    )
    train, test = load_images(own, "train"), load_images(own, held_out)
    delta = run.statement().get("delta") or own.dataset.delta
    members, others = (-_unit_losses(run, cfg, images) for images in (train, test))
    found = membership(members, others, delta=delta, confidence=confidence, seed=cfg.seed)
    entry = membership_entry(found, delta=delta, confidence=confidence)
    return write_record(
        run.audit_path,
        run.statement(),
        attacks={"membership.loss": entry},
        memorization=_memorization(run, cfg, train, test) if is_on(cfg.evaluator) else None,
    )


def _held_out_split(own: DictConfig, cfg: DictConfig) -> str:
    """The first of the wanted splits that the run's data set has; ``test`` is always there."""
    splits = ["test", *OmegaConf.select(own, "dataset.other_tests", default=[])]
    for split in cfg.membership.held_out:
        if split in splits:
            return split
    raise UserError(
        f"membership.held_out={list(cfg.membership.held_out)} names no split of "
        f"dataset={own.dataset.name}; use one of {splits}."
    )


def _unit_losses(run: Run, cfg: DictConfig, images: Images) -> Scores:
    """The released model's loss of each unit: of its images, where they are many."""
    net, _ = run.load_model()
    some = subset(images, cfg.membership.max_images, cfg.seed)
    losses = mean_losses(net, build_diffusion(run.config()), some, cfg.membership.draws, cfg.seed)
    return unit_means(losses, some.units)


def _memorization(
    run: Run, cfg: DictConfig, train: Images, held_out: Images
) -> dict[str, float] | None:
    """What the evaluator says about the run's samples, with the sheet in ``local/``."""
    if not run.samples_dir.is_dir():
        return None
    before = run.public_only_dir
    metrics, _ = instantiate(cfg.evaluator)(
        synthetic=read_samples(run.samples_dir),
        public_only=read_samples(before) if before.is_dir() else None,
        real_train=train,
        real_test=held_out,
        other_tests={},
        public=load_public(run.config()),
        seed=cfg.seed,
        local_dir=run.local_dir,
    )
    return metrics


@command("audit")
def main(cfg: DictConfig) -> None:
    """Audit a finished run."""
    run = Run.open(cfg.run)
    whole("seed", cfg.seed)
    with run.locked():
        record = audit_run(run, cfg)
    print(table(record))
    print_metrics({name: metric["value"] for name, metric in record["memorization"].items()})


if __name__ == "__main__":
    main()
