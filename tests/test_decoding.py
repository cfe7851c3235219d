"""Image files of every format and mode become pixels as Pillow, asked step by step, says."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from conftest import refusal
from PIL import Image

from dp_synth.data import decoding
from dp_synth.data.decoding import decode
from dp_synth.errors import UserError


def picture(mode="RGB", size=(7, 5), seed=0):
    """A picture of noise in any mode."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode == "1":
        return Image.fromarray(colours[..., 0]).convert("1", dither=Image.Dither.NONE)
    if mode == "PA":
        image = Image.fromarray(colours[..., :3]).quantize(8).convert("PA")
        image.putalpha(Image.fromarray(colours[..., 3]))
        return image
    if mode == "P":
        return Image.fromarray(colours[..., :3]).quantize(8)
    if mode == "CMYK":
        return Image.frombytes("CMYK", size, colours.tobytes())
    if mode == "YCbCr":  # which holds more than the colours that there are
        return Image.fromarray(colours[..., :3]).convert("YCbCr")
    bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    return Image.merge(mode, [Image.fromarray(colours[..., band]) for band in range(bands)])


def packed(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refused(data, what="folder/x.png"):
    message = refusal(decode, data, what, 4, 3)
    assert message.startswith(what)
    return message


def opaque(image):
    """The colours of a picture without its transparency, as [H, W, 3]."""
    if image.mode in ("RGBA", "LA"):
        bands = image.split()[:-1]
        return np.stack([np.asarray(bands[min(n, len(bands) - 1)]) for n in range(3)], axis=2)
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        indices = np.asarray(image if image.mode == "P" else image.getchannel(0))
        return palette[indices]
    return np.asarray(image.convert("RGB"))


LOSSLESS = [
    *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    *(("TIFF", mode) for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")),
    *(("BMP", mode) for mode in ("1", "L", "P", "RGB")),
    *(("PPM", mode) for mode in ("1", "L", "RGB")),
]


@pytest.mark.parametrize(("kind", "mode"), LOSSLESS)
def test_every_mode_becomes_colours_and_luma(kind, mode):
    image = picture(mode, (5, 5))
    data = packed(image, kind)
    colours = decode(data, "x", 5, 3)
    assert colours.dtype == np.uint8 and colours.shape == (5, 5, 3)
    assert (colours == opaque(image)).all()
    luma = colours @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decode(data, "x", 5, 1)[..., 0] - luma).max() <= 1.5


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"lossless": True, "exact": True}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "RGB", {"transparency": (1, 2, 3)}),
    ],
)
def test_transparency_is_dropped_not_blended(kind, mode, options):
    image = picture(mode, (5, 5))
    assert (decode(packed(image, kind, **options), "x", 5, 3) == opaque(image)).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_is_as_pillow_reads_it(mode):
    data = packed(picture(mode, (16, 16)), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        assert (decode(data, "x", 16, 3) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (5, 7), (8, 5), (13, 2), (1, 9)])
@pytest.mark.parametrize("resolution", [1, 2, 5, 11])
def test_cropped_to_the_middle_then_resized(size, resolution):
    image = picture("RGB", size)
    side = min(size)
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    square = Image.fromarray(np.asarray(image)[top : top + side, left : left + side].copy())
    expected = square.resize((resolution, resolution), Image.Resampling.BICUBIC)
    assert (decode(packed(image), "x", resolution, 3) == np.asarray(expected)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind, orientation):
    """Orientation k says where the file's first row and column stand; undone by hand here."""
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "JPEG":
        options = {"quality": 95, "subsampling": 0}
    data = packed(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert np.abs(decode(data, "x", 16, 3).astype(int) - upright).max() < 8


def deep_png(colour_type, samples):
    """A 2x2 PNG of 16 bits per channel; Pillow writes only grey ones."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 2, 2, 16, colour_type, 0, 0, 0)
    rows = 2 * (b"\0" + bytes(2 * samples * 2))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def deep_tiff(samples):
    """A 1x1 little-endian TIFF of 16 bits per channel."""
    bits_at, pixels_at = 8 + 2 + 12 * 8 + 4, 8 + 2 + 12 * 8 + 4 + 2 * samples
    tags = [
        (256, 3, 1, 1),
        (257, 3, 1, 1),
        (258, 3, samples, bits_at if samples > 2 else 16),
        (259, 3, 1, 1),
        (262, 3, 1, 2 if samples > 1 else 1),
        (273, 4, 1, pixels_at),
        (277, 3, 1, samples),
        (279, 4, 1, 2 * samples),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    body = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return (
        b"II*\0"
        + struct.pack("<I", 8)
        + body
        + struct.pack(f"<{samples}H", *[16] * samples)
        + bytes(2 * samples)
    )


@pytest.mark.parametrize(
    "data",
    [
        *(
            deep_png(colour_type, samples)
            for colour_type, samples in ((0, 1), (2, 3), (4, 2), (6, 4))
        ),
        deep_tiff(1),
        deep_tiff(3),
        b"P5 2 2 65535\n" + bytes(8),
        b"P6 2 2 65535\n" + bytes(24),
        b"P6 2 2 1023\n" + bytes(24),
        b"P3 1 1 65535\n1 2 3\n",
        packed(Image.new("F", (3, 3)), "TIFF"),
        packed(Image.new("I", (3, 3)), "TIFF"),
        packed(Image.new("LAB", (3, 3)), "TIFF"),
    ],
)
def test_more_than_8_bits_and_unusual_modes_are_refused(data):
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # Pillow reads it
    assert "8-bit" in refused(data)


def test_fewer_bits_than_8_are_fine():
    assert (
        decode(b"P5 2 2 15\n" + bytes([0, 15, 15, 0]), "x", 2, 1).ravel() == [0, 255, 255, 0]
    ).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_of_many_frames_the_first_is_taken(kind):
    frames = [picture("RGB", (6, 6), seed) for seed in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = packed(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(data, "x", 6, 3) == np.asarray(frames[0])).all()


@pytest.mark.parametrize("kind", ["GIF", "ICO", "JPEG2000", "EPS"])
def test_other_formats_are_refused(kind):
    assert "PNG" in refused(packed(picture("RGB", (16, 16)), kind))


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"hello", bytes(1000)])
def test_what_is_no_image_is_refused(data):
    message = refused(data)
    assert "0x" not in message  # Pillow's own message holds the address of an object


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
def test_truncated_files_are_refused(kind):
    data = packed(picture("RGB", (40, 40)), kind)
    for share in (0.2, 0.5, 0.9):
        refused(data[: int(len(data) * share)])


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    data = packed(Image.new("L", (20, 20)))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 399)
    # Nothing may be decoded.
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert "20x20" in refused(data)


def test_headers_that_promise_gigapixels_are_refused():
    for side in (2**14, 2**16, 2**30):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = bytearray(packed(picture("RGB", (2, 2))))
        data[16:29] = header
        data[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
        refused(bytes(data))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF"])
def test_mutated_files_give_pixels_or_one_sentence(kind):
    generator = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("BMP", "PPM", "GIF") else {"exif": exif}
    whole = packed(picture("RGB", (24, 20)), kind, **options)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(generator.choice([1, 2, 20])):
            # Headers, where most of the harm is done, are hit half of the time.
            end = len(data) if generator.random() < 0.5 else min(len(data), 64)
            data[generator.randrange(end)] = generator.choice(
                [0, 1, 127, 255, generator.randrange(256)]
            )
        if generator.random() < 0.2:
            del data[generator.randrange(len(data)) :]
        try:
            pixels = decode(bytes(data), "x", 9, 3)
        except UserError as error:
            assert str(error).startswith("x ") and str(error).isprintable()
        else:
            assert pixels.shape == (9, 9, 3) and pixels.dtype == np.uint8
            assert kind != "GIF"
