"""How a template becomes a page: self-contained, escaped, and with the filters that templates use."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from dp_synth.privacy.wording import round_up
from dp_synth.reporting import bars, meaning
from dp_synth.reporting.numbers import decimal, figures
from dp_synth.reporting.statement import plain


def environment() -> Environment:
    """Where the pages' templates are found and what they may call."""
    environment = Environment(
        loader=PackageLoader("dp_synth.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        round_up=round_up,
        figures=figures,
        decimal=decimal,
        plain=plain,
        odds_factor=meaning.odds_factor,
        odds_after=meaning.odds_after,
    )
    environment.globals.update(
        guess=meaning.guess, interval_bar=bars.interval_bar, scale_legend=bars.scale_legend
    )
    return environment
