"""Images, pixel conversion, the digits data set and image folders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from dp_synth.data import Images, digits, pixels
from dp_synth.data.folder import read_image_folder, write_image_folder
from dp_synth.errors import UserError


def random_images(n: int, height: int = 5, width: int = 7, channels: int = 1) -> Images:
    rng = np.random.default_rng(n)
    return Images(
        pixels=rng.integers(0, 256, (n, height, width, channels), dtype=np.uint8),
        labels=np.sort(rng.integers(0, 3, n)),
        classes=("ant", "bee", "cow"),
        units=rng.integers(0, 4, n),
    )


# --- Images


@pytest.mark.parametrize("n", [0, 1, 7])
def test_length_and_shape(n: int) -> None:
    images = random_images(n, channels=3)
    assert len(images) == n
    assert images.shape == (3, 5, 7)


@pytest.mark.parametrize("indices", [[], [3], [6, 0, 0, 2], np.arange(7) % 2 == 0])
def test_select_takes_pixels_labels_and_units_together(indices: list[int] | np.ndarray) -> None:
    images = random_images(7)
    chosen = images.select(indices)
    rows = np.flatnonzero(indices) if isinstance(indices, np.ndarray) else indices
    assert len(chosen) == len(rows)
    assert images.units is not None and chosen.units is not None
    for place, row in enumerate(rows):
        assert (chosen.pixels[place] == images.pixels[row]).all()
        assert chosen.labels[place] == images.labels[row]
        assert chosen.units[place] == images.units[row]
    assert chosen.classes == images.classes


def test_select_refuses_what_is_no_index() -> None:
    with pytest.raises(IndexError):
        random_images(3).select([3])
    with pytest.raises(IndexError):
        random_images(3).select([0.5])
    with pytest.raises(IndexError):
        random_images(3).select([[0, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": np.zeros((2, 4, 4, 1), np.float32)}, "pixels must be uint8"),
        ({"pixels": np.zeros((2, 4, 4), np.uint8)}, "4 dimensions"),
        ({"pixels": np.zeros((2, 0, 4, 1), np.uint8)}, "H, W, C >= 1"),
        ({"labels": np.zeros(2, np.int32)}, "labels must be int64"),
        ({"labels": np.zeros(3, np.int64)}, "3 entries for 2 images"),
        ({"labels": np.array([0, 2])}, r"0\.\.1"),
        ({"labels": np.array([-1, 0])}, r"0\.\.1"),
        ({"labels": [0, 1]}, "NumPy array"),
        ({"units": np.zeros(1, np.int64)}, "units has 1 entries"),
        ({"classes": ("a", "a")}, "distinct"),
        ({"classes": "ab"}, "sequence of strings"),
    ],
)
def test_wrong_fields_are_refused(change: dict[str, object], message: str) -> None:
    good = {
        "pixels": np.zeros((2, 4, 4, 1), np.uint8),
        "labels": np.array([0, 1]),
        "classes": ("a", "b"),
        "units": None,
    }
    Images(**good)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match=message):
        Images(**(good | change))  # type: ignore[arg-type]


# --- pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_every_byte_survives_the_round_trip(channels: int) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1).repeat(channels, axis=3)
    x = pixels.to_float(every)
    assert x.shape == (2, channels, 8, 16)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert (pixels.to_uint8(x) == every).all()
    assert (pixels.to_uint8(x.double()) == every).all()


def test_both_layouts_agree() -> None:
    array = random_images(3, channels=3).pixels
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    before = array.copy()
    assert torch.equal(pixels.to_float(array), pixels.to_float(tensor))
    assert (array == before).all()


def test_to_uint8_clamps_rounds_and_refuses_nan() -> None:
    inf = float("inf")
    x = torch.tensor([-inf, -1.5, -1.0, 0.004, 1.0, 7.0, inf]).view(1, 1, 1, 7)
    assert pixels.to_uint8(x).ravel().tolist() == [0, 0, 0, 128, 255, 255, 255]
    with pytest.raises(ValueError, match="NaN"):
        pixels.to_uint8(torch.full((1, 1, 1, 1), float("nan")))


def test_pixels_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        pixels.to_float(np.zeros((1, 2, 2, 1), np.float32))
    with pytest.raises(ValueError, match="uint8"):
        pixels.to_float(torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="4 dimensions"):
        pixels.to_float(np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="floating point"):
        pixels.to_uint8(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="4 dimensions"):
        pixels.to_uint8(torch.zeros(2, 2))


def test_no_image_at_all_converts() -> None:
    x = pixels.to_float(np.zeros((0, 4, 6, 3), np.uint8))
    assert x.shape == (0, 3, 4, 6)
    assert pixels.to_uint8(x).shape == (0, 4, 6, 3)


# --- digits


def test_digits_are_scikit_learns_split_into_1437_and_360() -> None:
    train, test = digits.load("train"), digits.load("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.shape == test.shape == (1, 8, 8)
    # As multisets of (label, image): nothing lost, nothing twice, every value scikit-learn's.
    source = load_digits()
    expected = sorted(
        (int(label), tuple(round(v * 255 / 16) for v in image.ravel()))
        for label, image in zip(source.target, source.images, strict=True)
    )
    found = sorted(
        (int(label), tuple(image.ravel().tolist()))
        for split in (train, test)
        for label, image in zip(split.labels, split.pixels, strict=True)
    )
    assert found == expected
    assert len(set(expected)) == len(expected)  # so that the sum shows the parts to be disjoint


def test_digits_test_split_is_a_fifth_of_every_class() -> None:
    total = np.bincount(load_digits().target)
    held_back = np.bincount(digits.load("test").labels)
    assert np.abs(held_back - total / 5).max() < 1


def test_digits_classes_name_the_digits() -> None:
    assert list(digits.load().classes) == [str(digit) for digit in range(10)]


def test_unknown_digits_split() -> None:
    with pytest.raises(UserError, match="'valid'"):
        digits.load("valid")


# --- folders


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [1, 2, 13])
def test_folder_round_trip(tmp_path: Path, n: int, channels: int) -> None:
    images = random_images(n, channels=channels)
    write_image_folder(images, tmp_path / "new" / "root")
    back = read_image_folder(tmp_path / "new" / "root")
    assert (back.pixels == images.pixels).all()  # labels are sorted, so the order is kept too
    assert (back.labels == images.labels).all()
    assert tuple(back.classes) == tuple(images.classes)
    assert back.units is None


def test_folder_holds_grey_png_per_class_and_tolerates_a_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a card")
    write_image_folder(digits.load("test").select([0, 1]), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == list("0123456789")
    (first,) = tmp_path.glob("*/000000.png")
    with Image.open(first) as picture:
        assert (picture.mode, picture.format) == ("L", "PNG")
    assert len(read_image_folder(tmp_path)) == 2


def test_grey_and_colour_together_become_rgb(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    Image.new("L", (4, 3), 9).save(tmp_path / "a" / "0.png")
    Image.new("RGBA", (4, 3), (1, 2, 3, 255)).save(tmp_path / "a" / "deep" / "1.PNG")
    images = read_image_folder(tmp_path)
    assert images.pixels.shape == (2, 3, 4, 3)
    assert images.pixels[:, 0, 0].tolist() == [[9, 9, 9], [1, 2, 3]]


def test_writing_overwrites_nothing(tmp_path: Path) -> None:
    write_image_folder(random_images(2), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.png")}
    with pytest.raises(UserError, match="exists already"):
        write_image_folder(random_images(3), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.png")} == before


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a\nb", "é" * 128])
def test_class_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    images = Images(np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1, np.int64), ("fine", name))
    with pytest.raises(UserError, match="rename the class"):
        write_image_folder(images, tmp_path / "root")
    assert list(tmp_path.iterdir()) == []


def test_two_channels_have_no_png(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="these have 2"):
        write_image_folder(random_images(1, channels=2), tmp_path)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing is not a folder"):
        read_image_folder(tmp_path / "missing")
    with pytest.raises(UserError, match="no class folders"):
        read_image_folder(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="no class folders with images"):
        read_image_folder(tmp_path)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"a holds files but no image"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 20, 60, 120])
def test_a_broken_image_is_named(tmp_path: Path, keep: int) -> None:
    write_image_folder(random_images(3), tmp_path)
    (broken,) = tmp_path.glob("*/000001.png")
    whole = broken.read_bytes()
    assert len(whole) > 61
    broken.write_bytes(whole[: min(keep, len(whole) - 30)])
    with pytest.raises(UserError, match=r"000001.png is not (a readable|an) image"):
        read_image_folder(tmp_path)


def test_a_second_size_and_16_bits_are_named(tmp_path: Path) -> None:
    write_image_folder(random_images(1), tmp_path)
    Image.new("L", (4, 3)).save(tmp_path / "bee" / "odd.png")
    with pytest.raises(UserError, match="4x3"):
        read_image_folder(tmp_path)
    Image.fromarray(np.zeros((5, 7), np.uint16)).save(tmp_path / "bee" / "odd.png")
    with pytest.raises(UserError, match="odd.png has more than 8 bits"):
        read_image_folder(tmp_path)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    Image.new("L", (7, 5)).save(tmp_path / "outside.png")
    write_image_folder(random_images(1), tmp_path / "root")
    (tmp_path / "root" / "bee" / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(UserError, match="link.png is a link"):
        read_image_folder(tmp_path / "root")
