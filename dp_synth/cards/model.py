"""The card of a model: ``model/README.md``."""

import json
from typing import Any

from huggingface_hub import ModelCardData

from dp_synth.cards.header import NO_LICENSE, OWN, with_header
from dp_synth.cards.markdown import environment
from dp_synth.cards.provenance import read_provenance
from dp_synth.cards.samples import CARD
from dp_synth.files import write_atomically
from dp_synth.runs import Run

_STEPS = 100  # of the printed program: not the best images, but soon


def model_card(run: Run, license: str | None = None) -> str:
    """What the model is, what protects whom, and a program that samples it.

    Args:
        run: has its ``model/``.
        license: its identifier; None: not chosen yet.

    Returns:
        A model card of Hugging Face: a YAML header and Markdown.

    Raises:
        UserError: the run has no statement.
    """
    origin = read_provenance(run)
    network, scheduler, classes = (
        json.loads((run.model_dir / name).read_text())
        for name in ("config.json", "scheduler/scheduler_config.json", "classes.json")
    )
    shape = [network["in_channels"], *network["sample_size"]]
    own: dict[str, Any] = {OWN: origin.header() | {"classes": classes, "shape": shape}}
    data = ModelCardData(
        license=license or NO_LICENSE,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["differential-privacy", "image-generation", OWN],
        **own,
    )
    text = (
        environment()
        .get_template("model.md.j2")
        .render(
            origin=origin,
            said=origin.statement,
            classes=classes,
            shape=shape,
            steps=min(_STEPS, scheduler["num_train_timesteps"]),
            license=license,
        )
    )
    return with_header(data, text)


def write_model_card(run: Run, license: str | None = None) -> None:
    """Write ``model/README.md``."""
    write_atomically(run.model_dir / CARD, model_card(run, license))
