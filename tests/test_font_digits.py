"""The public digits: format, determinism, disjoint fonts, and that they help but do not suffice."""

import numpy as np
import pytest
import torch
from scipy.ndimage import label as connected_components
from sklearn.linear_model import LogisticRegression

from dp_synth.data import Images, digits, font_digits, glyphs
from dp_synth.errors import UserError

EIGHT_CONNECTED = np.ones((3, 3))


@pytest.mark.parametrize("fonts", ["prior", "held_out"])
@pytest.mark.parametrize("num_images", [0, 1, 7, 10, 503])
def test_size_levels_and_balance(fonts: str, num_images: int) -> None:
    images = font_digits.load(fonts=fonts, num_images=num_images)
    assert images.pixels.shape == (num_images, 8, 8, 1)
    assert images.classes == digits.load("test").classes
    assert np.isin(images.pixels, [round(v * 255 / 16) for v in range(17)]).all()
    counts = np.bincount(images.labels, minlength=10)
    assert counts.max() - counts.min() <= 1


def test_classes_come_in_random_order() -> None:
    labels = font_digits.load(num_images=200).labels
    assert len(set(labels[:20].tolist())) > 3
    assert (labels != np.arange(200) % 10).any()


def test_same_arguments_same_images_and_any_other_differ() -> None:
    def draw(**arguments: object) -> bytes:
        images = font_digits.load(num_images=31, **arguments)  # type: ignore[arg-type]
        return images.pixels.tobytes() + images.labels.tobytes()

    assert draw() == draw()
    assert draw(fonts="held_out", seed=5) == draw(fonts="held_out", seed=5)
    others: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"split": "test"},
        {"split": "test", "seed": 1},
        {"fonts": "held_out"},
        {"fonts": "held_out", "split": "test"},
        {"elastic": 0.05},
        {"style": 0.1},
        {"rotation": 30},
        {"shear": 0.4},
        {"aspect": 0.4},
        {"pen_max": 0.12},
        {"shift": 3},
    ]
    assert len({draw(**arguments) for arguments in others}) == len(others)


def test_block_counts_equal_a_loop() -> None:
    bitmaps = np.random.default_rng(0).random((3, 32, 32)) < 0.4
    bitmaps[2] = True
    counts = font_digits.block_counts(bitmaps)
    assert counts.shape == (3, 8, 8)
    for n in range(3):
        for row in range(8):
            for column in range(8):
                block = [
                    bool(bitmaps[n, 4 * row + i, 4 * column + j])
                    for i in range(4)
                    for j in range(4)
                ]
                assert counts[n, row, column] == sum(block)
    assert (counts[2] == 16).all()


def test_font_sets_share_no_face_and_no_glyph() -> None:
    prior, held_out = font_digits.FONTS["prior"], font_digits.FONTS["held_out"]
    assert not set(prior) & set(held_out)
    drawn = [
        glyphs.render(face, digit).tobytes()
        for face in prior + held_out
        for digit in digits.CLASSES
    ]
    # All distinct: no face draws the same box for every digit, no two faces share a figure.
    assert len(set(drawn)) == len(drawn)


def test_thinning_keeps_every_stroke_and_hole() -> None:
    drawn = np.stack(
        [glyphs.render(face, d) for face in font_digits.FONTS["prior"] for d in "0123456789"]
    )
    for glyph, line in zip(drawn, glyphs.thinned(drawn), strict=True):
        assert not (line & ~glyph).any()
        assert connected_components(line, EIGHT_CONNECTED)[1] == 1
        assert connected_components(~line)[1] == connected_components(~glyph)[1]
        blocks = line[:-1, :-1] & line[1:, :-1] & line[:-1, 1:] & line[1:, 1:]
        assert blocks.sum() < 0.05 * line.sum()  # one pixel wide but for a few crossings


@pytest.mark.parametrize(
    ("top", "height", "left", "width"),
    [(0, 64, 0, 64), (10, 32, 20, 16), (3, 17, 40, 5), (20, 40, 1, 61)],
)
def test_size_normalisation_of_a_box(top: int, height: int, left: int, width: int) -> None:
    field = torch.full((1, 1, 64, 64), -1.0)
    field[:, :, top : top + height, left : left + width] = 1.0
    for shift in (0, 3):
        offset = torch.tensor([[float(shift), 0.0]])
        bitmap = (font_digits._normalise_size(field, offset) > 0).numpy()[0, 0]
        rows, columns = np.flatnonzero(bitmap.any(axis=1)), np.flatnonzero(bitmap.any(axis=0))
        assert len(rows) == 32
        # Proportional up to 20 pixels; half a source pixel, enlarged, may be lost on each side.
        expected = min(20, width * 32 / height)
        assert abs(len(columns) - expected) <= 1 + 32 / height
        assert abs(columns.mean() - 15.5 - shift) <= 1


@pytest.mark.parametrize("fonts", ["prior", "held_out"])
def test_a_digit_fills_the_height_and_is_centred(fonts: str) -> None:
    counts = font_digits.load(fonts=fonts, num_images=200, shift=0).pixels[..., 0]
    assert (counts[:, 0].max(axis=1) > 0).all()
    assert (counts[:, -1].max(axis=1) > 0).all()
    assert (counts[:, :, [0, 7]] == 0).all()  # 20 pixels wide at most: columns 6 to 25 of 32
    occupied = (counts > 0).any(axis=1)
    margin_left, margin_right = occupied.argmax(axis=1), occupied[:, ::-1].argmax(axis=1)
    assert np.abs(margin_left - margin_right).max() <= 1


def test_a_thicker_pen_sets_more_pixels() -> None:
    thin = font_digits.load(num_images=50, pen_min=0.03, pen_max=0.03)
    thick = font_digits.load(num_images=50, pen_min=0.08, pen_max=0.08)
    sums = [images.pixels.sum(axis=(1, 2, 3), dtype=np.int64) for images in (thin, thick)]
    assert (thin.labels == thick.labels).all()
    assert (sums[1] > 1.5 * sums[0]).all()


def test_without_strengths_a_class_has_one_image_per_face() -> None:
    still = dict.fromkeys(("rotation", "shear", "aspect", "elastic", "style", "shift"), 0.0)
    images = font_digits.load(num_images=400, pen_min=0.05, pen_max=0.05, **still)
    for label in range(10):
        of_class = {image.tobytes() for image in images.pixels[images.labels == label]}
        assert 1 < len(of_class) <= len(font_digits.FONTS["prior"])


def test_styles_are_shared_by_the_splits() -> None:
    still = dict.fromkeys(("rotation", "shear", "aspect", "elastic", "shift"), 0.0)
    pen = {"pen_min": 0.05, "pen_max": 0.05}
    train, test, other = (
        {
            image.tobytes()
            for image in font_digits.load(
                split, "held_out", num_images=600, seed=seed, style=0.1, **pen, **still
            ).pixels
        }
        for split, seed in (("train", 0), ("test", 0), ("train", 1))
    )
    assert train == test
    assert not train & other


def test_the_prior_helps_on_held_out_fonts_but_does_not_suffice() -> None:
    def arrays(images: Images) -> tuple[np.ndarray, np.ndarray]:
        return images.pixels.reshape(len(images), -1) / 255, images.labels

    prior = arrays(font_digits.load(num_images=1437))
    held_out = arrays(font_digits.load(fonts="held_out", num_images=1437))
    test = arrays(font_digits.load("test", "held_out", num_images=1000))
    from_prior = LogisticRegression(max_iter=300).fit(*prior).score(*test)
    from_held_out = LogisticRegression(max_iter=300).fit(*held_out).score(*test)
    assert from_prior > 0.4
    assert from_held_out > from_prior + 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "split='valid'"),
        ({"fonts": "comic"}, "fonts='comic'"),
        ({"num_images": -1}, "num_images=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"wobble": 1.0}, "'wobble'"),
        ({"rotation": 90.0}, "rotation=90.0"),
        ({"elastic": float("nan")}, "elastic=nan"),
        ({"pen_min": 0.1, "pen_max": 0.05}, "pen_min=0.1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        font_digits.load(**arguments)  # type: ignore[arg-type]


def test_a_missing_font_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.get_data_path", lambda: "/nowhere")
    with pytest.raises(UserError, match="nowhere/fonts/ttf/cmr10.ttf"):
        glyphs.font.__wrapped__("cmr10.ttf", 20)
