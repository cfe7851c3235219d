"""Whatever is wrong with someone's data ends with one sentence, and leaves nothing behind."""

import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp_synth.data import image_folder
from dp_synth.errors import UserError

SIDE = 8
SUFFIXES = ("png", "jpg", "bmp", "tif", "webp", "ppm", "png")
Chance = np.random.Generator


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A folder in order: a CSV that lists an image of each format, twice."""
    root = tmp_path_factory.mktemp("sound") / "data"
    (root / "scans").mkdir(parents=True)
    lines = ["path,label,who,note"]
    for i, suffix in enumerate(SUFFIXES * 2):
        name = f"scans/{i}.{suffix}"
        pixels = np.random.default_rng(i).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
        lines.append(f'{name},{"well" if i % 2 else "sick"},p{i % 5},"Grüße, {i}"')
    (root / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def expected(sound, tmp_path_factory):
    return load(sound, tmp_path_factory.mktemp("cache"))


def load(root, cache, on_error="raise"):
    return image_folder.load(
        root=root,
        split="train",
        resolution=SIDE,
        channels=3,
        unit="who",
        test_fraction=0,
        on_error=on_error,
        cache=cache,
    )


# ------------------------------------------------------------------------- what can go wrong


def flip(data: bytes, chance: Chance) -> bytes:
    changed = bytearray(data)
    for place in chance.integers(0, len(data), chance.integers(1, 9)):
        changed[place] ^= int(chance.integers(1, 256))
    return bytes(changed)


def cut_off(data: bytes, chance: Chance) -> bytes:
    return data[: chance.integers(0, len(data))]


def cut_out(data: bytes, chance: Chance) -> bytes:
    first, last = sorted(chance.integers(0, len(data), 2))
    return data[:first] + data[last:]


def double(data: bytes, chance: Chance) -> bytes:
    first, last = sorted(chance.integers(0, len(data), 2))
    return data[:last] + data[first:]


def zeros(data: bytes, chance: Chance) -> bytes:
    first, last = sorted(chance.integers(0, len(data), 2))
    return data[:first] + bytes(last - first) + data[last:]


def noise(data: bytes, chance: Chance) -> bytes:
    return chance.bytes(len(data))


ANY_BYTES = (flip, cut_off, cut_out, double, zeros, noise)
TOKENS = ["", ",", '"', '""', "\n", "\r", "\r\n", "\0", "\ufeff", ";", "\t", "\x1b[2J", "ü", " "]
PATHS = ["", ".", "..", "/", "/etc/passwd", "../labels.csv", "scans", "scans/", "labels.csv"]
CELLS = [*TOKENS, *PATHS, "x" * 300, "x" * 5000, "x" * 200_000, "a/b", "a\\b", ".hidden", "p1"]


def insert_token(data: bytes, chance: Chance) -> bytes:
    place = chance.integers(0, len(data))
    return data[:place] + str(chance.choice(TOKENS)).encode() + data[place:]


def change_cell(data: bytes, chance: Chance) -> bytes:
    rows = [line.split(",") for line in data.decode().split("\n")]
    row = rows[chance.integers(0, len(rows))]
    row[chance.integers(0, len(row))] = CELLS[chance.integers(0, len(CELLS))]
    return "\n".join(map(",".join, rows)).encode()


def change_lines(data: bytes, chance: Chance) -> bytes:
    lines = data.decode().split("\n")
    chosen = chance.integers(0, len(lines), chance.integers(0, len(lines) * 2))
    return "\n".join(lines[i] for i in chosen).encode()


def change_encoding(data: bytes, chance: Chance) -> bytes:
    return data.decode().encode(chance.choice(["utf-16", "latin-1", "utf-32", "utf-8-sig"]))


def change_csv(root: Path, chance: Chance) -> None:
    by_format = (insert_token, change_cell, change_lines, change_encoding)
    changes = by_format if chance.random() < 0.8 else ANY_BYTES
    change_bytes(root / "labels.csv", changes, chance)


def change_folder(root: Path, chance: Chance) -> None:
    (change_csv if chance.random() < 0.5 else change_image)(root, chance)


def change_bytes(path: Path, changes: tuple[Callable[..., bytes], ...], chance: Chance) -> None:
    path.write_bytes(changes[chance.integers(0, len(changes))](path.read_bytes(), chance))


def change_image(root: Path, chance: Chance) -> None:
    images = sorted(root.glob("scans/*"))
    path = images[chance.integers(0, len(images))]
    if chance.random() < 0.6:
        change_bytes(path, ANY_BYTES, chance)
    else:
        path.unlink()
        REPLACEMENTS[chance.integers(0, len(REPLACEMENTS))](path)


def huge_png(path: Path) -> None:
    """Few bytes that claim to be 60,000 x 60,000 pixels."""

    def block(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = zlib.compress(bytes(10_000_000))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + block(b"IHDR", header)
        + block(b"IDAT", content)
        + block(b"IEND", b"")
    )


def saved(mode: str, form: str) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        Image.new(mode, (5, 6)).save(path, form)

    return save


def postscript(path: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n")


def animation(path: Path) -> None:
    frames = [Image.new("RGB", (5, 6), colour) for colour in ("red", "green", "blue")]
    frames[0].save(path, "WEBP", save_all=True, append_images=frames[1:])


REPLACEMENTS: list[Callable[[Path], None]] = [
    huge_png,
    postscript,
    animation,
    saved("I;16", "PNG"),
    saved("F", "TIFF"),
    saved("1", "PNG"),
    saved("P", "PNG"),
    saved("LA", "PNG"),
    saved("CMYK", "JPEG"),
    saved("RGB", "GIF"),
    lambda path: None,
    lambda path: path.touch(),
    lambda path: path.mkdir(),
    lambda path: os.mkfifo(path),
    lambda path: path.symlink_to(path),
    lambda path: path.symlink_to("/etc/passwd"),
    lambda path: path.symlink_to(path.parent),
    lambda path: path.symlink_to("nowhere"),
]


# ------------------------------------------------------------------------------------- the fuzz


def attempt(root: Path, cache: Path, on_error: str) -> bool:
    """Whether a load ended well; if not, it ended with a sentence and without a cache."""
    try:
        images = load(root, cache, on_error)
    except UserError as error:
        assert 20 < len(str(error)) < 1000 and str(error).isprintable(), error
        assert str(error).endswith("."), error
        assert not list(cache.glob("images/[!.]*")), error
        return False
    assert images.pixels.shape == (len(images), SIDE, SIDE, 3)
    assert images.num_examples == images.num_units + images.missing
    return True


def pack(root: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(root.rglob("*")):
            file.write(path, path.relative_to(root))


def assert_as_expected(images, expected) -> None:
    assert (images.pixels == expected.pixels).all()
    assert (images.labels == expected.labels).all() and images.classes == expected.classes
    assert (images.units == expected.units).all() and images.missing == 0


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("seed", range(150))
def test_a_changed_folder_gives_a_sentence_or_images(sound, expected, tmp_path, seed):
    chance = np.random.default_rng(seed)
    root, cache, on_error = tmp_path / "data", tmp_path / "cache", ("raise", "skip")[seed % 2]
    shutil.copytree(sound, root)
    change_folder(root, chance)
    changed = {
        path: path.stat().st_mtime_ns
        for path in root.rglob("*")
        if path.is_file() and path.stat().st_size == (sound / path.relative_to(root)).stat().st_size
    }
    ended_well = attempt(root, cache, on_error)
    shutil.rmtree(root)
    shutil.copytree(sound, root)
    if not ended_well:  # what is mended must not be taken for what failed, even if it looks alike
        for path, changed_ns in changed.items():
            os.utime(path, ns=(changed_ns, changed_ns))
    assert_as_expected(load(root, cache), expected)


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("seed", range(50))
def test_a_changed_zip_gives_a_sentence_or_images(sound, expected, tmp_path, seed):
    archive, cache = tmp_path / "data.zip", tmp_path / "cache"
    pack(sound, archive)
    change_bytes(archive, ANY_BYTES, np.random.default_rng(seed))
    attempt(archive, cache, ("raise", "skip")[seed % 2])
    pack(sound, archive)
    assert_as_expected(load(archive, cache), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_the_changes_are_of_every_kind(sound, tmp_path):
    """What is told is told for many reasons, and some changes do no harm."""
    told = set()
    for seed in range(0, 150, 5):
        root = tmp_path / str(seed)
        shutil.copytree(sound, root)
        change_folder(root, np.random.default_rng(seed))
        try:
            load(root, tmp_path / "cache")
            told.add("")
        except UserError as error:
            told.add(str(error).replace(str(root), "").split(";")[0])
    assert "" in told and len(told) > 15
