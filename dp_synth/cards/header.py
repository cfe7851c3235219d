"""The YAML header of a card: what it says in public fields, and what programs read of it.

https://huggingface.co/docs/hub/datasets-cards and https://huggingface.co/docs/hub/model-cards.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData

from dp_synth.errors import UserError

OWN = "dp_synth"
"""The key of the header under which this program's own facts stand."""

NO_LICENSE = "other"
"""What Hugging Face calls a licence that is none of the known ones."""

_HEADER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def with_header(data: CardData, text: str) -> str:
    """A card: the header by a YAML library, so that no name can end it, then the text."""
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def read_card(path: Path) -> dict[str, Any]:
    """The header of a card.

    Raises:
        UserError: there is no card, or no header in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a card: {error}.") from error
    found = _HEADER.match(text)
    try:
        header = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} has no YAML header, so it is no card that this program wrote.")
    return header


def check_license(license: Any) -> str:
    """The identifier of a licence as Hugging Face writes them.

    Raises:
        UserError: it is no identifier.
    """
    identifier = str(license).lower()
    if not (isinstance(license, str) and _IDENTIFIER.fullmatch(identifier)):
        raise UserError(
            f"release.license={license!r} is no identifier of a licence; use one that "
            "https://huggingface.co/docs/hub/repositories-licenses lists, such as cc-by-4.0."
        )
    return identifier
