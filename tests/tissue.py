"""Camelyon17-WILDS in small, in its publisher's layout: real tissue, made-up slides and labels."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.color import rgb2hed
from skimage.data import immunohistochemistry

SIDE = 96
COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split")

# The slides that CAMELYON17 annotates, (patient, node), by hospital; WILDS numbers them in order.
SLIDES = (
    ((4, 4), (9, 1), (10, 4), (12, 0), (15, 1), (15, 2), (16, 1), (17, 1), (17, 2), (17, 4)),
    ((20, 2), (20, 4), (21, 3), (22, 4), (24, 1), (24, 2), (34, 3), (36, 3), (38, 2), (39, 1)),
    ((40, 2), (41, 0), (42, 3), (44, 4), (45, 1), (46, 3), (46, 4), (48, 1), (51, 2), (52, 1)),
    ((60, 3), (61, 4), (62, 2), (64, 0), (66, 2), (67, 4), (68, 1), (72, 0), (73, 1), (75, 4)),
    ((80, 1), (81, 4), (86, 0), (86, 4), (87, 0), (88, 1), (89, 3), (92, 1), (96, 0), (99, 4)),
)


def tiles(count, seed=0):
    """``count`` of 729 overlapping tiles of a stained section, with a computed label.

    Returns:
        Pixels uint8 ``[count, 96, 96, 3]``; labels ``[count]``, 1 where the central 32x32 pixels
        hold more of the brown stain (DAB) than those of the median tile; places ``[count, 2]``,
        (column, row) of the tile in the section.
    """
    section = immunohistochemistry()
    brown = rgb2hed(section)[..., 2]
    starts = range(0, len(section) - SIDE + 1, 16)
    places = np.array([(x, y) for y in range(len(starts)) for x in range(len(starts))])
    corners = places * 16
    middle = SIDE // 3
    stained = np.array(
        [brown[y + middle : y + 2 * middle, x + middle : x + 2 * middle].mean() for x, y in corners]
    )
    labels = (stained > np.median(stained)).astype(int)
    chosen = np.random.default_rng(seed).permutation(len(places))[:count]
    pixels = np.stack([section[y : y + SIDE, x : x + SIDE] for x, y in corners[chosen]])
    return pixels, labels[chosen], places[chosen]


def write_camelyon17(root, count=300, slides_per_center=3, seed=0):
    """Write ``root/camelyon17_v1.0/`` as WILDS publishes it, with ``count`` patches.

    A tenth of the patches of every hospital have split 1, as there; PNG files have an alpha channel,
    as OpenSlide writes it.

    Returns:
        The folder.
    """
    folder = Path(root) / "camelyon17_v1.0"
    (folder / "patches").mkdir(parents=True)
    (folder / "RELEASE_v1.0.txt").touch()
    rng = np.random.default_rng(seed)
    pixels, labels, places = tiles(count, seed)
    in_use = [(c, s) for c in range(len(SLIDES)) for s in range(slides_per_center)]
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("", *COLUMNS))
        for i, (tile, label, (column, row)) in enumerate(zip(pixels, labels, places, strict=True)):
            center, place = in_use[i % len(in_use)]
            patient, node = SLIDES[center][place]
            slide = 10 * center + place
            x, y = 3328 + 32 * column, 21792 + 32 * row
            split = int(rng.random() < 0.1)
            table.writerow((i, f"{patient:03d}", node, x, y, label, slide, center, split))
            name = f"patient_{patient:03d}_node_{node}"
            (folder / "patches" / name).mkdir(exist_ok=True)
            Image.fromarray(tile).convert("RGBA").save(
                folder / "patches" / name / f"patch_{name}_x_{x}_y_{y}.png"
            )
    return folder
