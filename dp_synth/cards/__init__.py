"""The cards that travel with a data set and with a model: a YAML header and text (Hugging Face)."""

from dp_synth.cards.facts import SampleFacts
from dp_synth.cards.header import read_card
from dp_synth.cards.model import model_card, write_model_card
from dp_synth.cards.release import release_card
from dp_synth.cards.samples import read_facts, rewrite_sample_card, sample_card

__all__ = [
    "SampleFacts",
    "model_card",
    "read_card",
    "read_facts",
    "release_card",
    "rewrite_sample_card",
    "sample_card",
    "write_model_card",
]
