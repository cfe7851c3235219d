"""How a template becomes the text of a card: names from outside cannot break its Markdown."""

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dp_synth.privacy.wording import round_up
from dp_synth.reporting.numbers import decimal, figures

# What begins or ends something in CommonMark and GitHub's tables when it stands within a line.
# An underscore inside of a word does not.
_MARKS = re.compile(r"([\\`*\[\]<>|~&$#]|(?<![^\W_])_|_(?![^\W_]))")
# What begins a list, a rule or a heading's underline when it stands at the beginning.
_BEGINNING = re.compile(r"^(\d*)([-+=.)])(?=[-=\s]|$)")


def escaped(text: Any) -> str:
    """A name as Markdown shows it, on one line."""
    one_line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return _BEGINNING.sub(r"\1\\\2", _MARKS.sub(r"\\\1", one_line.lstrip()))


@cache
def environment() -> Environment:
    """Where the cards' templates are found; every value is escaped unless it is ``Markup``."""
    environment = Environment(
        loader=PackageLoader("dp_synth.cards", "."),
        finalize=lambda value: value if isinstance(value, Markup) else escaped(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(round_up=round_up, decimal=decimal, figures=figures)
    return environment
