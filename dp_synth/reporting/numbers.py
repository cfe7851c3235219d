"""The numbers of ``metrics.json`` with their intervals and with what ``metrics_meta.json`` says of them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from dp_synth.reporting.scales import Interval


@dataclass(frozen=True)
class Metric:
    """One number and what is known about it.

    Attributes:
        key: its name in ``metrics.json``.
        label: its name on the page.
        hint: a few words more.
        kind: CSS class of its mark, see ``page.css``.
        interval: the value and the ends of its interval.
        private: whether it looked at private images. Unknown counts as yes.
        n: images that it was computed on, if known.
        what: a sentence that defines it, or nothing.
    """

    key: str
    label: str
    hint: str
    kind: str
    interval: Interval
    private: bool
    n: int | None
    what: str

    @property
    def value(self) -> float:
        """The number itself."""
        return self.interval.value

    def named(self, label: str, hint: str = "", kind: str = "private") -> "Metric":
        """The same number under another name."""
        return replace(self, label=label, hint=hint, kind=kind)


class Numbers:
    """All numbers of a run, by name; both ends of an interval together belong to their number.

    Args:
        metrics: as ``metrics.json`` has them; what is no finite number is left out.
        meta: as ``metrics_meta.json`` has them.
    """

    def __init__(self, metrics: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        values = {key: float(value) for key, value in metrics.items() if _is_finite(value)}
        ends = {end for key in values if (both := _ends(key)) <= values.keys() for end in both}
        self._metrics = {
            key: _metric(key, values, meta.get(key)) for key in sorted(values) if key not in ends
        }

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._metrics.values())

    def __len__(self) -> int:
        return len(self._metrics)

    def find(self, key: str) -> Metric | None:
        """The number of a name, or None."""
        return self._metrics.get(key)

    def under(self, prefix: str) -> dict[str, Metric]:
        """The numbers whose names begin with ``prefix``, by the rest of the name."""
        return {
            key.removeprefix(prefix): metric
            for key, metric in self._metrics.items()
            if key.startswith(prefix)
        }


def looked_at_private_images(key: str, about: Any) -> bool:
    """Whether a metric did, by what ``metrics_meta.json`` says of it; where it says nothing, yes.

    Only the metrics of public phases, whose names begin with ``public/``, need not say.
    """
    said = about.get("private") if isinstance(about, Mapping) else None
    return not key.startswith("public/") if said is None else said is not False


def without_private(
    metrics: Mapping[str, Any], meta: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics, and what is said of them, that were computed without a private image.

    The ends of an interval go where their number goes.
    """

    def stays(key: str) -> bool:
        number = key.removesuffix(".ci_low").removesuffix(".ci_high")
        return any(looked_at_private_images(one, meta.get(one)) for one in (key, number))

    kept = {key: value for key, value in metrics.items() if not stays(key)}
    return kept, {key: about for key, about in meta.items() if key in kept}


def _ends(key: str) -> set[str]:
    return {f"{key}.ci_low", f"{key}.ci_high"}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _metric(key: str, values: Mapping[str, float], about: Any) -> Metric:
    about = about if isinstance(about, Mapping) else {}
    interval = Interval(values[key])
    if _ends(key) <= values.keys():
        interval = Interval(values[key], values[f"{key}.ci_low"], values[f"{key}.ci_high"])
    n = about.get("n")
    return Metric(
        key=key,
        label=key,
        hint="",
        kind="private",
        interval=interval,
        private=looked_at_private_images(key, about),
        n=n if isinstance(n, int) else None,
        what=str(about.get("what", "")),
    )


def figures(value: float, digits: int) -> str:
    """A number for a reader: ``digits`` significant ones, or whole with separators from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def decimal(value: float) -> str:
    """A small number without an exponent, as far as that stays readable: ``0.00001``."""
    return f"{value:g}" if value < 1e-7 else f"{Decimal(f'{value:g}'):f}"
