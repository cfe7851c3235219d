"""The privacy ledger: the file (``chain``), what its entries mean, and what may still be spent."""

from dp_synth.privacy.ledger.entries import Held, Query
from dp_synth.privacy.ledger.ledger import Ledger, default_path

__all__ = ["Held", "Ledger", "Query", "default_path"]
