"""What a finished run has to draw from, and what its card says of images drawn from it."""

from collections.abc import Sequence

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from dp_synth.building import build_diffusion
from dp_synth.cards import SampleFacts
from dp_synth.errors import UserError
from dp_synth.formats import checksums
from dp_synth.runs import Run
from dp_synth.sampling.drawing import Source
from dp_synth.sampling.execution import Execution
from dp_synth.sampling.sampler import Sampler


def source_of(run: Run, sampler: Sampler, seed: int, device: torch.device) -> Source:
    """The run's released model, on a device, and its classes.

    Raises:
        UserError: the run has no model or no statement, or has not asked for what ``sampler.labels``
            needs.
    """
    run.statement()  # for the card: better missed now than after hours
    net, classes = run.load_model()
    return Source(
        net=net.to(device).eval(),
        model=checksums.digest(run.model_dir / SAFETENSORS_WEIGHTS_NAME),
        process=build_diffusion(run.config()),
        classes=classes,
        shares=label_shares(run, sampler, classes),
        seed=seed,
    )


def facts_of(source: Source, sampler: Sampler, execution: Execution) -> SampleFacts:
    """What the card says of a sampler's images."""
    return SampleFacts(
        num_images=sampler.num_images,
        shape=source.shape,
        classes=source.classes,
        format=sampler.format,
        sampler=sampler.describe(),
        seed=source.seed,
        labels=sampler.labels,
        model=source.model,
        precision=execution.precision,
    )


def label_shares(run: Run, sampler: Sampler, classes: Sequence[str]) -> list[float] | None:
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
