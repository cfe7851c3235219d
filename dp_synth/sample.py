"""``python -m dp_synth.sample run=DIR``: more synthetic data from a finished run, at no eps."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from diffusers import UNet2DModel
from hydra.utils import instantiate
from omegaconf import DictConfig

from dp_synth.building import build_diffusion, is_on
from dp_synth.cards import sample_card
from dp_synth.checks import whole
from dp_synth.cli import command
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.classifiers import default_device
from dp_synth.runs import Run, write_samples
from dp_synth.sampling import Sampler

# Public images shown in the report, per class.
_EXAMPLES_PER_CLASS = 10


def sample_run(run: Run, cfg: DictConfig, sampler: Sampler, out: Path) -> Images | None:
    """Draw a synthetic data set from the run's released model into ``out``.

    Returns:
        The data set, or None if ``out`` is there already: a resumed run does not draw again.
    """
    if out.exists():
        return None
    net, classes = run.load_model()
    shares = _label_shares(run, sampler, classes)
    images = sampler(net, build_diffusion(run.config()), classes, seed=cfg.seed, shares=shares)
    write_samples(images, out, sample_card(run, images))
    return images


def _label_shares(run: Run, sampler: Sampler, classes: Sequence[str]) -> list[float] | None:
    """The share of each class among the samples, or None where all are the same.

    Raises:
        UserError: the sampler asks for shares that the run has not queried.
    """
    if sampler.labels == "uniform":
        return None
    shares = run.label_shares()
    if shares is None:
        raise UserError(
            f"sampler.labels={sampler.labels} needs the noised histogram of labels, which "
            f"run={run.path} has not asked for; train with privacy.label_histogram_eps=..., or "
            "use sampler.labels=uniform."
        )
    return [shares[name] for name in classes]


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
        shares = _label_shares(run, sampler, classes)
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
    """Sample a finished run."""
    run = Run.open(cfg.run)
    whole("seed", cfg.seed)
    if not is_on(cfg.sampler):
        raise UserError("sampler=none draws nothing; choose one, such as sampler=dpm_solver.")
    out = Path(cfg.out) if cfg.out else run.next_samples_dir()
    if out.exists():
        raise UserError(f"out={out} exists; a data set is never overwritten, choose another.")
    sample_run(run, cfg, instantiate(cfg.sampler), out)
    print(f"{cfg.sampler.num_images} images in {out}")


if __name__ == "__main__":
    main()
