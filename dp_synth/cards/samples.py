"""The card of a set of synthetic images: its ``README.md``."""

from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData
from markupsafe import Markup

from dp_synth.cards.facts import SampleFacts
from dp_synth.cards.header import NO_LICENSE, OWN, read_card, with_header
from dp_synth.cards.markdown import environment
from dp_synth.cards.provenance import read_provenance
from dp_synth.errors import UserError
from dp_synth.files import write_atomically
from dp_synth.formats import FORMATS, checksums
from dp_synth.reporting.numbers import Numbers
from dp_synth.runs import Run

CARD = "README.md"
"""The name of a card in the folder that it describes."""

_MOST_CLASSES = 20  # named in the text; the header names all


def sample_card(
    run: Run, facts: SampleFacts, license: str | None = None, numbers: Numbers | None = None
) -> str:
    """What the images are, how they were made, what protects whom, what they are not for.

    Args:
        run: the run whose model drew them.
        facts: of these images.
        license: its identifier; None: not chosen yet.
        numbers: metrics of these images that may stand in the card.

    Returns:
        A data-set card of Hugging Face: a YAML header and Markdown.

    Raises:
        UserError: the run has no statement.
    """
    origin = read_provenance(run)
    own: dict[str, Any] = {OWN: origin.header() | facts.to_plain()}
    own |= FORMATS[facts.format].card_header()
    data = DatasetCardData(
        license=license or NO_LICENSE,
        pretty_name=f"Synthetic {origin.dataset}",
        annotations_creators=["machine-generated"],
        task_categories=["image-classification"],
        size_categories=[facts.size_category],
        tags=["synthetic", "differential-privacy", OWN],
        **own,
    )
    text = (
        environment()
        .get_template("samples.md.j2")
        .render(
            origin=origin,
            said=origin.statement,
            facts=facts,
            named=facts.classes[:_MOST_CLASSES],
            loading=Markup(FORMATS[facts.format].loading(".")),
            license=license,
            numbers=[] if numbers is None else list(numbers),
        )
    )
    return with_header(data, text)


def read_facts(card: Path) -> SampleFacts:
    """What a card says of its images.

    Raises:
        UserError: there is no card, or it does not say.
    """
    try:
        return SampleFacts.from_plain(read_card(card)[OWN])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{card} does not say how its images were made: an earlier version drew them, or "
            "something else wrote it; draw them again."
        ) from error


def rewrite_sample_card(
    run: Run,
    directory: Path,
    license: str | None = None,
    numbers: Numbers | None = None,
) -> None:
    """Write the card of a set of samples again, as the run now stands.

    Args:
        run, license, numbers: see ``sample_card``.
        directory: holds the images, their present card and their checksums.

    Raises:
        UserError: the present card or the checksums cannot be read.
    """
    card = directory / CARD
    write_atomically(card, sample_card(run, read_facts(card), license, numbers))
    checksums.update(directory, CARD)
