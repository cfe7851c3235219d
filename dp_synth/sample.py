"""``python -m dp_synth.sample run=DIR``: more synthetic data from a finished run, at no eps."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dp_synth.building import build_diffusion, is_on
from dp_synth.cards import read_facts, sample_card
from dp_synth.checks import whole
from dp_synth.cli import command
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.classifiers import default_device
from dp_synth.runs import Run, write_samples
from dp_synth.sampling import Sampler
from dp_synth.sampling.drawing import Source
from dp_synth.sampling.execution import Execution
from dp_synth.sampling.from_run import facts_of, label_shares, source_of
from dp_synth.sampling.generation import generate
from dp_synth.sampling.staging import CARD
from dp_synth.sampling.workers import Worker, helpers, this_worker

# Public images shown in the report, per class.
_EXAMPLES_PER_CLASS = 10


def sample_run(run: Run, cfg: DictConfig, sampler: Sampler, out: Path) -> None:
    """Draw a synthetic data set from the run's released model into ``out``, which may be there.

    One that was stopped half-way is continued.
    """
    if not out.exists():
        source = source_of(run, sampler, cfg.seed, default_device(None))
        _draw(run, source, sampler, out, "sampling")


def _draw(run: Run, source: Source, sampler: Sampler, out: Path, what: str | None) -> bool:
    """See ``generate``."""

    def card(execution: Execution) -> str:
        return sample_card(run, facts_of(source, sampler, execution))

    return generate(out, source, sampler, card, what)


def fresh_samples(run: Run) -> Callable[[int, int], Images] | None:
    """Return what draws more images as the run drew its own: how many, and a seed other than its.

    The model is read at the first call. None where the run has no model or no sampler.
    """
    cfg = run.config()
    if not (run.has_model() and is_on(cfg.sampler)):
        return None
    model = cache(run.load_model)

    def draw(num_images: int, seed: int) -> Images:
        net, classes = model()
        sampler = instantiate(cfg.sampler, num_images=num_images)
        shares = label_shares(run, sampler, classes)
        net.to(default_device(None))
        return sampler(net, build_diffusion(cfg), classes, seed, what=None, shares=shares)

    return draw


def sample_public_only(
    run: Run,
    cfg: DictConfig,
    net: UNet2DModel,
    sampler: Sampler,
    public: Images | None,
    classes: Sequence[str],
) -> None:
    """Draw the eps = 0 baseline: what the model gives before it has seen a private image."""
    if run.public_only_dir.exists():
        return
    if public is not None:
        examples = public.select(first_of_each_class(public, _EXAMPLES_PER_CLASS))
        write_samples(examples, run.public_examples_dir, "Public images, for the report.\n")
    images = sampler(net, build_diffusion(cfg), tuple(classes), cfg.seed, "sampling, public only")
    write_samples(images, run.public_only_dir, "Samples of the public model alone (eps = 0).\n")


def first_of_each_class(images: Images, count: int) -> list[int]:
    """Indices of the first ``count`` images of each class."""
    chosen: list[int] = []
    for label in range(len(images.classes)):
        chosen += (images.labels == label).nonzero()[0][:count].tolist()
    return chosen


@command("sample")
def main(cfg: DictConfig) -> None:
    """Sample a finished run, alone or as one of several processes."""
    run = Run.open(cfg.run)
    whole("seed", cfg.seed)
    if not is_on(cfg.sampler):
        raise UserError("sampler=none draws nothing; choose one, such as sampler=dpm_solver.")
    worker = this_worker(cfg)
    out = Path(cfg.out) if cfg.out else run.next_samples_dir()
    if out.exists() and not worker.is_one_of_several:
        raise UserError(f"out={out} exists; a data set is never overwritten, choose another.")
    sampler = instantiate(cfg.sampler)
    source = source_of(run, sampler, cfg.seed, worker.device)
    if out.exists():
        _refuse_other(out, source, sampler)
        print(f"out={out} is finished already.")
        return
    what = "sampling" if worker.number == 0 else None
    with helpers(cfg.devices, _help, OmegaConf.to_container(cfg, resolve=True), str(out)):
        _draw(run, source, sampler, out, what)
    print(f"{sampler.num_images} images in {out}")


def _help(cfg: dict[str, Any], out: str, worker: Worker) -> None:
    """Do what ``main`` does, in a process that it has started."""
    run, sampler = Run.open(cfg["run"]), instantiate(cfg["sampler"])
    source = source_of(run, sampler, cfg["seed"], worker.device)
    _draw(run, source, sampler, Path(out), what=None)


def _refuse_other(out: Path, source: Source, sampler: Sampler) -> None:
    """UserError unless a finished data set is the one that this process would take part in."""
    found = read_facts(out / CARD)
    if facts_of(source, sampler, Execution(precision=found.precision)) != found:
        raise UserError(
            f"out={out} exists and is another data set; one is never overwritten, choose another."
        )


if __name__ == "__main__":
    main()
