"""How close the synthetic images are to real ones: the ``fidelity/*`` of a run, sorted for the page."""

from dataclasses import dataclass

from dp_synth.reporting.numbers import Metric, Numbers

_PREFIX = "fidelity/"
_VARIANTS = ("", ".public_only", ".real_floor")

# By metric: its name, and how to read it.
_METRICS = {
    "fid": ("FID", "distance, smaller is closer"),
    "frechet": ("Fréchet distance", "smaller is closer"),
    "kid": ("Kernel distance (KID)", "smaller is closer, 0 is alike"),
    "precision": ("Precision", "share of the images that look real, larger is better"),
    "recall": ("Recall", "share of the real variety that is met, larger is better"),
    "density": ("Density", "how densely they lie where real images are, 1 is alike"),
    "coverage": ("Coverage", "share of the real images with one nearby, larger is better"),
    "inception_score": ("Inception score", "sure and varied, larger is better"),
}
_FEATURES = {
    "inception": (
        "Inception-v3",
        "the network of published FIDs, which compare where as many images were used",
    ),
    "dinov2": ("DINOv2", "a network trained on public photographs without labels"),
    "efficientnet_lite0": ("EfficientNet-Lite0", "a network trained on ImageNet; no FID"),
    "classifier": ("A classifier of public images", "trained for this evaluation; no FID"),
    "pixels": ("Pixels", "the plain colours, without a network"),
}


# Where there is room for one only, the first of these that there is.
DISTANCES = (
    ("fidelity/fid.inception", "FID"),
    ("fidelity/frechet.inception", "Fréchet distance, Inception-v3"),
    ("fidelity/frechet.dinov2", "Fréchet distance, DINOv2"),
    ("fidelity/frechet.efficientnet_lite0", "Fréchet distance, EfficientNet-Lite0"),
    ("fidelity/frechet.classifier", "Fréchet distance, public classifier"),
    ("fidelity/frechet.pixels", "Fréchet distance, pixels"),
)


@dataclass(frozen=True)
class Row:
    """One measure: of the public model's images, of the synthetic ones, of other real ones."""

    label: str
    hint: str
    public_only: Metric | None
    synthetic: Metric | None
    floor: Metric | None


@dataclass(frozen=True)
class Space:
    """The measures taken in the features of one network.

    Attributes:
        label: what the features are.
        hint: a few words more.
        rows: over all classes.
        classes: of single classes, by name.
        n: images on each side, if known.
    """

    label: str
    hint: str
    rows: list[Row]
    classes: list[Row]
    n: int | None


def read_closeness(numbers: Numbers) -> list[Space]:
    """Sort the ``fidelity/*`` of a run by feature space, the best known space first."""
    keys = sorted({_base(name) for name in numbers.under(_PREFIX)})
    by_space: dict[str, list[tuple[str, str]]] = {}
    for key in keys:
        metric, _, rest = key.partition(".")
        space, _, of_class = rest.partition(".class.")
        by_space.setdefault(space, []).append((metric, of_class))
    return [_space(numbers, name, by_space[name]) for name in sorted(by_space, key=_rank_of_space)]


def _base(name: str) -> str:
    for variant in _VARIANTS[1:]:
        if name.endswith(variant):
            return name.removesuffix(variant)
    return name


def _rank_of_space(name: str) -> tuple[int, str]:
    return (list(_FEATURES).index(name) if name in _FEATURES else len(_FEATURES), name)


def _rank_of_metric(name: str) -> int:
    return list(_METRICS).index(name) if name in _METRICS else len(_METRICS)


def _space(numbers: Numbers, name: str, keys: list[tuple[str, str]]) -> Space:
    label, hint = _FEATURES.get(name, (name.replace("_", " ") or "Other", ""))
    keys = sorted(keys, key=lambda key: (_rank_of_metric(key[0]), key))
    rows = [_row(numbers, f"{metric}.{name}".rstrip("."), metric) for metric, c in keys if not c]
    classes = [
        _row(numbers, f"{metric}.{name}.class.{of_class}", metric, of_class)
        for metric, of_class in keys
        if of_class
    ]
    first = next((m for row in rows for m in (row.synthetic, row.floor) if m is not None), None)
    return Space(label, hint, rows, classes, None if first is None else first.n)


def _row(numbers: Numbers, key: str, metric: str, of_class: str = "") -> Row:
    label, hint = _METRICS.get(metric, (metric.replace("_", " "), ""))
    synthetic, public_only, floor = (
        numbers.find(f"{_PREFIX}{key}{variant}") for variant in _VARIANTS
    )
    if of_class:
        label, hint = of_class, label
    return Row(label, hint, public_only, synthetic, floor)
