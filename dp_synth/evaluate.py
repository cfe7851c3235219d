"""``python -m dp_synth.evaluate run=DIR``: what a run's synthetic data are worth."""

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dp_synth.books import Books
from dp_synth.building import is_on, load_images
from dp_synth.checks import whole
from dp_synth.cli import command
from dp_synth.errors import UserError
from dp_synth.formats.reading import read_samples
from dp_synth.loggers.choice import log_run
from dp_synth.pretraining import load_public
from dp_synth.runs import Run
from dp_synth.sample import fresh_samples
from dp_synth.summary import print_metrics


def evaluate_run(run: Run, cfg: DictConfig, samples: Path | None = None) -> dict[str, float]:
    """Measure synthetic data against the private data set and the baselines.

    Lists the look at private images in the statement, with the splits that it read: it is not
    covered by eps. A classifier that is trained on the private images by DP-SGD is a query with an
    eps of its own, and listed as one. Where ``dataset.other_tests`` names further splits, synthetic
    data are tested on them too. The metrics of the run's own ``samples/`` go to ``metrics.json`` and
    ``metrics_meta.json``.

    Args:
        run: a finished run; its config says which data set is private and which is public.
        cfg: holds ``evaluator`` and ``seed``.
        samples: the synthetic data; the run's own unless another folder is named.

    Returns:
        The metrics.
    """
    own = run.config()
    samples = samples or run.samples_dir
    if reads_private_images(cfg):
        metrics, meta = _compared_with_private(run, cfg, samples)
    else:
        metrics, meta = instantiate(cfg.evaluator)(
            synthetic=read_samples(samples),
            flip=OmegaConf.select(own, "dataset.flip", default=False),
            seed=cfg.seed,
        )
    if samples.resolve() == run.samples_dir.resolve():
        run.write_metrics(metrics, meta)
    return metrics


def reads_private_images(cfg: DictConfig) -> bool:
    """Whether the evaluator looks at anything but synthetic images."""
    return bool(instantiate(cfg.evaluator).reads_private_images)


def _compared_with_private(
    run: Run, cfg: DictConfig, samples: Path
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    own = run.config()
    other_tests = list(OmegaConf.select(own, "dataset.other_tests", default=[]))
    # Before the look itself: a crash in the middle has looked, too.
    books = Books(run)
    books.record_look(
        "Evaluation compared synthetic data with private images, without noise.",
        samples=samples.name,
        evaluator=cfg.evaluator._target_,
        splits=["train", "test", *other_tests],
    )
    plan = instantiate(own.privacy)
    return instantiate(cfg.evaluator)(
        synthetic=read_samples(samples),
        public_only=(read_samples(run.public_only_dir) if run.public_only_dir.is_dir() else None),
        real_train=load_images(own, split="train"),
        real_test=load_images(own, split="test"),
        other_tests={split: load_images(own, split) for split in other_tests},
        public=load_public(own),
        plan=plan if plan.private else None,
        flip=OmegaConf.select(own, "dataset.flip", default=False),
        fresh=fresh_samples(run) if samples.resolve() == run.samples_dir.resolve() else None,
        record_query=books.record_query,
        seed=cfg.seed,
        local_dir=run.local_dir,
    )


def check_test_images(cfg: DictConfig) -> None:
    """Open what ``evaluate_run`` will test on, so that what is wrong with it shows before training.

    Raises:
        UserError: a split is not there, or an image of it cannot be read.
    """
    for split in ("test", *OmegaConf.select(cfg, "dataset.other_tests", default=[])):
        load_images(cfg, split)


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate a finished run, or any image folder against its private data set."""
    run = Run.open(cfg.run)
    whole("seed", cfg.seed)
    if not is_on(cfg.evaluator):
        raise UserError("evaluator=none measures nothing; choose one, such as evaluator=quick.")
    samples = Path(cfg.samples) if cfg.samples else run.samples_dir
    if not samples.is_dir():
        raise UserError(
            f"samples={samples} is not a directory; draw samples first with "
            f"python -m dp_synth.sample run={run.path}."
        )
    with run.locked():
        metrics = evaluate_run(run, cfg, samples)
    print_metrics(metrics)
    if samples.resolve() == run.samples_dir.resolve():
        log_run(run, run.config().logger)


if __name__ == "__main__":
    main()
