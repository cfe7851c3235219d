"""``python -m dp_synth.train``: public pre-training, DP fine-tuning, sampling, evaluation, report."""

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig

from dp_synth.audit import audit_canaries
from dp_synth.books import Books
from dp_synth.building import build_network, check_config, is_on
from dp_synth.cli import command
from dp_synth.declaration import declare
from dp_synth.errors import UserError
from dp_synth.evaluate import evaluate_run
from dp_synth.finetuning import fine_tune, first_look
from dp_synth.fitting import Interrupted
from dp_synth.loggers.choice import log_run
from dp_synth.networks import carry_over
from dp_synth.pretraining import load_public, pretrained
from dp_synth.privacy.audit.record import read_record, table
from dp_synth.report import report_runs
from dp_synth.resuming import run_to_resume
from dp_synth.runs import Run
from dp_synth.sample import sample_public_only, sample_run
from dp_synth.summary import print_summary, shown


def train(cfg: DictConfig, path: str) -> Run:
    """The main job, into the run directory ``path``; what is already there is not done again.

    Args:
        cfg: the config of ``conf/train.yaml``.
        path: a run directory that is new, or one that ``resume`` continues.

    Returns:
        The finished run.

    Raises:
        UserError: something in the config cannot work, raised before a private image is read; or
            something in the images, raised before a run is begun.
        Interrupted: training was stopped after a whole step; the run can be continued.
    """
    declare(cfg)
    plan = instantiate(cfg.privacy).calibrate()
    check_config(cfg, plan)
    sampler = instantiate(cfg.sampler) if is_on(cfg.sampler) else None
    public = load_public(cfg)

    run = Run.open(path) if cfg.resume else Run.create(path, cfg)
    with run.locked():
        plan, images = first_look(run, cfg, plan)
        prior = pretrained(cfg, public) if is_on(cfg.public) else None

        net = build_network(cfg, images.shape, len(images.classes))
        if prior is not None:
            carry_over(*prior, net, images.classes)
            if sampler is not None:
                sample_public_only(run, cfg, net, sampler, public, images.classes)

        fine_tune(run, cfg, plan, net, images, public)
        if sampler is not None:
            sample_run(run, cfg, sampler, run.samples_dir)
            if is_on(cfg.evaluator) and not run.metrics():  # each evaluation is a look
                evaluate_run(run, cfg)
        if is_on(cfg.audit):
            audit_canaries(run)
        report_runs([run], run.report_path)
        log_run(run, cfg.logger)
    return run


@command("train")
def main(cfg: DictConfig) -> float | None:
    """Run the main job and give a sweep its objective."""
    if cfg.run is not None and not cfg.resume:
        raise UserError(f"run={cfg.run} is continued by resume=true; a new run takes run_dir=DIR.")
    if cfg.resume:
        cfg = run_to_resume(cfg, HydraConfig.get().overrides.task)
    path = cfg.run if cfg.resume else HydraConfig.get().runtime.output_dir
    try:
        run = train(cfg, path)
    except Interrupted as stop:
        print(
            f"\nStopped: {stop}. What is done is saved; continue with\n"
            f"    python -m dp_synth.train run={shown(Path(path))} resume=true",
            file=sys.stderr,
        )
        raise KeyboardInterrupt from stop
    print_summary(run)
    if is_on(cfg.audit):
        print(f"\n{table(read_record(run.audit_path))}")
    return objective(run, cfg.objective)


def objective(run: Run, name: str) -> float | None:
    """The metric that a sweep compares; where it looked at private images, so does the choice."""
    metrics = run.metrics()
    if HydraConfig.get().mode != RunMode.MULTIRUN or not metrics:
        return None
    if name not in metrics:
        raise UserError(f"objective={name} is not a metric; these are: {', '.join(metrics)}.")
    if run.metrics_meta().get(name, {}).get("private"):
        Books(run).record_look(
            "A sweep compared this run with others by a private metric.", metric=name
        )
    return metrics[name]


if __name__ == "__main__":
    main()
