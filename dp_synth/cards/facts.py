"""What a data-set card says of the images themselves."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# Hugging Face's names for sizes: below each bound, the name.
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
)


@dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """How a set of synthetic images was made.

    Attributes:
        num_images: how many there are.
        shape: (channels, height, width) of one.
        classes: names of the classes, in label order.
        format: how they are stored, a name in ``formats.FORMATS``.
        sampler: ``Sampler.describe()``: plain values, whatever decides the images.
        seed: public; with model and sampler it decides every image.
        labels: "uniform" or "dp_histogram".
        model: fingerprint of the weights that drew them.
        precision: in which the network ran, as in "32-true".
    """

    num_images: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    format: str
    sampler: Mapping[str, Any]
    seed: int
    labels: str
    model: str
    precision: str

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "SampleFacts":
        """The inverse of ``to_plain``; what else there is in ``values`` is passed over.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or of another type.
        """
        channels, height, width = (int(side) for side in values["shape"])
        return cls(
            num_images=int(values["num_images"]),
            shape=(channels, height, width),
            classes=tuple(str(name) for name in values["classes"]),
            format=str(values["format"]),
            sampler=dict(values["sampler"]),
            seed=int(values["seed"]),
            labels=str(values["labels"]),
            model=str(values["model"]),
            precision=str(values["precision"]),
        )

    def to_plain(self) -> dict[str, Any]:
        """Values that YAML and JSON have."""
        return asdict(self) | {
            "shape": list(self.shape),
            "classes": list(self.classes),
            "sampler": dict(self.sampler),
        }

    @property
    def size_category(self) -> str:
        """Hugging Face's name for so many images."""
        return next((name for bound, name in _SIZES if self.num_images < bound), "10B<n<100B")
