"""The ``README.md`` of a release: what is in the folder, and under which guarantee."""

from collections.abc import Mapping

from markupsafe import Markup

from dp_synth.cards.facts import SampleFacts
from dp_synth.cards.markdown import environment
from dp_synth.cards.provenance import read_provenance
from dp_synth.formats import FORMATS
from dp_synth.runs import Run


def release_card(
    run: Run, samples: Mapping[str, SampleFacts], has_metrics: bool, license: str | None = None
) -> str:
    """What is here, how to load it, what is promised. What stayed behind is not told.

    Args:
        run: the run that is released.
        samples: the facts of each set of samples, by its folder.
        has_metrics: whether there are metrics beside them.
        license: its identifier; None: not chosen yet.

    Returns:
        Markdown.

    Raises:
        UserError: the run has no statement.
    """
    origin = read_provenance(run)
    return (
        environment()
        .get_template("release.md.j2")
        .render(
            origin=origin,
            said=origin.statement,
            samples=samples,
            has_metrics=has_metrics,
            loading={
                name: Markup(FORMATS[facts.format].loading(name)) for name, facts in samples.items()
            },
            license=license,
        )
    )
