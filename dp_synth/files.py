"""Files of the program's own: where they are kept, and how they survive a crash."""

import os
from pathlib import Path


def cache_folder(given: Path | str | None = None) -> Path:
    """Where downloads, decoded images, public models and timings are kept between runs.

    The given folder, else ``$DP_SYNTH_CACHE``, else ``~/.cache/dp_synth``. Commands give none, so
    that ``make clean-cache`` always finds the private pixels that lie in it.
    """
    return Path(given or os.environ.get("DP_SYNTH_CACHE") or "~/.cache/dp_synth").expanduser()


def state_folder() -> Path:
    """Where the privacy ledger is kept, which must outlive caches and runs.

    ``$DP_SYNTH_STATE``, else ``$XDG_STATE_HOME/dp_synth``, else ``~/.local/state/dp_synth``.
    """
    if own := os.environ.get("DP_SYNTH_STATE"):
        return Path(own).expanduser()
    shared = Path(os.environ.get("XDG_STATE_HOME", ""))
    # A relative one is to be ignored, says the XDG base directory specification.
    return (shared if shared.is_absolute() else Path("~/.local/state").expanduser()) / "dp_synth"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
