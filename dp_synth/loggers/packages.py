"""Packages that a logger needs and that not everybody has installed."""

from importlib.util import find_spec

from dp_synth.errors import UserError


def need(package: str) -> None:
    """UserError unless the package of the logger of the same name is installed."""
    if find_spec(package) is None:
        raise UserError(
            f"logger={package} needs the package {package}, which is not installed; "
            f"pip install 'dp-synth[{package}]', or take logger=csv."
        )
