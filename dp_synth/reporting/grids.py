"""Picture grids of a run's public and synthetic images, class by class, one PNG a grid.

Only ``public/`` and ``samples/`` of a run directory are opened here: a report shows no private
image and can be made where the private data are not.
"""

import base64
import io
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from dp_synth.errors import UserError
from dp_synth.formats.pictures import picture
from dp_synth.formats.reading import are_class_folders, first_samples, summary_of
from dp_synth.runs import Run

_FEW_CLASSES = 4  # up to here a class gets two rows of larger cells
_MAX_CLASSES = 20
# Of what is in no class folders, for each picture that is shown: rare classes come late.
_LOOKED_THROUGH = 10
_MAX_SIDE = 96  # larger images are shrunk: the page is to be mailed


@dataclass(frozen=True)
class Grid:
    """One grid, ready for the page.

    Attributes:
        title: what the images are.
        note: where they come from.
        classes: names of the classes, from the top; each has equally many rows.
        hidden_classes: how many more classes there are.
        src: a ``data:`` URI; None where there is nothing to show.
        missing: the sentence to show instead.
        colour: whether an image has three channels.
    """

    title: str
    note: str
    missing: str
    classes: tuple[str, ...] = ()
    hidden_classes: int = 0
    src: str | None = None
    colour: bool = False


def run_grids(run: Run, private: bool) -> list[Grid]:
    """Real public images, samples of the public model, samples of the final model."""
    released = (
        "Drawn from the model after private fine-tuning."
        if private
        else "Drawn from a model that has no privacy guarantee."
    )
    return [
        read_grid(
            run.public_examples_dir,
            "Real public images",
            "What the model was pre-trained on. No private image appears on this page.",
            "This run has no public images.",
        ),
        read_grid(
            run.public_only_dir,
            "Public model alone",
            "Drawn before the model saw a private image (eps = 0).",
            "This run has no samples of a public model.",
        ),
        read_grid(
            run.samples_dir,
            "Synthetic images",
            released,
            "This run has no synthetic images yet.",
        ),
    ]


def read_grid(root: Path, title: str, note: str, missing: str) -> Grid:
    """A grid of the first images of each class in ``root``; ``missing`` where there is none.

    Links that lead out of ``root`` are passed over: behind them could lie anything. Images of
    another size than the first are scaled to it.
    """
    try:
        classes = sorted(summary_of(root)[1], key=natural_order)
        shown = classes[:_MAX_CLASSES]
        rows_per_class, columns = (2, 5) if len(shown) <= _FEW_CLASSES else (1, 8)
        by_class = _first_pictures(root, shown, rows_per_class * columns)
    except (UserError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return Grid(title, note, f"The images of {root.name}/ cannot be read: a file is damaged.")
    images = [image for row in by_class for image in row]
    if not images:
        return Grid(title, note, missing)
    width, height = cell = _cell(images[0])
    gap = max(1, round(min(cell) / 14))
    rows = rows_per_class * len(shown)
    sheet = Image.new("RGBA", (columns * (width + gap) - gap, rows * (height + gap)))
    for label, row in enumerate(by_class):
        for place, image in enumerate(row):
            y, x = divmod(place, columns)
            fitted = image if image.size == cell else image.resize(cell, Image.Resampling.BOX)
            corner = (x * (width + gap), (label * rows_per_class + y) * (height + gap) + gap // 2)
            sheet.paste(fitted, corner)
    return Grid(
        title=title,
        note=note,
        missing=missing,
        classes=tuple(shown),
        hidden_classes=len(classes) - len(shown),
        src=_data_uri(sheet),
        colour=any(image.mode == "RGB" for image in images),
    )


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key to sort class names by: ``2`` before ``10``."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _first_pictures(root: Path, classes: list[str], count: int) -> list[list[Image.Image]]:
    """The first ``count`` pictures of each class, or fewer."""
    if not classes:
        return []
    if are_class_folders(root):
        return [
            [_open(path) for path in _first_files(root / name, root, count)] for name in classes
        ]
    images = first_samples(root, _LOOKED_THROUGH * count * len(classes))
    places = [(images.labels == images.classes.index(name)).nonzero()[0] for name in classes]
    return [[picture(images.pixels[place]) for place in found[:count]] for found in places]


def _first_files(folder: Path, root: Path, count: int) -> list[Path]:
    inside = root.resolve()
    files = sorted(folder.glob("*.png"))
    return list(islice((p for p in files if p.resolve().is_relative_to(inside)), count))


def _open(path: Path) -> Image.Image:
    with Image.open(path, formats=("PNG",)) as image:
        return image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")


def _cell(image: Image.Image) -> tuple[int, int]:
    shrink = max(1.0, max(image.size) / _MAX_SIDE)
    return max(1, round(image.width / shrink)), max(1, round(image.height / shrink))


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
