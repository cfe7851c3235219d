"""Data sets as plain values: every source is a function ``load(...) -> Images``."""

from dp_synth.data import digits, folder, font_digits, pixels
from dp_synth.data.images import Images

__all__ = ["Images", "digits", "folder", "font_digits", "pixels"]
