"""Exact per-example clipped gradient sums at about the price of an ordinary backward."""

from dp_synth.privacy.clipping.check import check_engine
from dp_synth.privacy.clipping.engine import ClippingEngine

__all__ = ["ClippingEngine", "check_engine"]
