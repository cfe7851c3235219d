"""The drawn pictures: format, determinism, prefixes, and that they look like what they stand for."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import cKDTree

from dp_synth.data import shapes
from dp_synth.data.drawing.canvas import Canvas
from dp_synth.data.drawing.colours import luma, palette
from dp_synth.data.drawing.fields import cells, clouds
from dp_synth.data.drawing.outlines import contour, profile, segment
from dp_synth.errors import UserError
from dp_synth.metrics.classifiers import predict, train_classifier
from dp_synth.metrics.estimates import accuracy

COLOUR, GREY = (3, 32, 32), (1, 28, 28)


def canvas(n: int, side: int = 32, seed: int = 0) -> Canvas:
    return Canvas(n, side, side, np.random.default_rng(seed))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 13), GREY, COLOUR, (3, 64, 64), (1, 9, 31)])
def test_shape_and_type(shape: tuple[int, int, int]) -> None:
    images = shapes.load(image_shape=shape, num_images=13)
    assert images.shape == shape
    assert images.pixels.shape == (13, *shape[1:], shape[0])
    assert images.units is None
    assert (images.pixels.reshape(13, -1).std(axis=1) > 0).all()


@pytest.mark.parametrize("num_images", [0, 1, 7, 10, 61])
def test_classes_are_balanced_to_within_one_and_shuffled(num_images: int) -> None:
    images = shapes.load(image_shape=(1, 8, 8), num_images=num_images)
    assert len(images) == num_images
    counts = np.bincount(images.labels, minlength=len(images.classes))
    assert counts.max() - counts.min() <= 1
    if num_images > 10:
        assert (images.labels[:10] != images.labels[10:20]).any()


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 64, 64)])
def test_fewer_images_are_the_first_of_more(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "_CHUNK", 3)  # several chunks of each class
    most = shapes.load(image_shape=shape, num_images=61)
    for num_images in (1, 10, 23, 47):
        fewer = shapes.load(image_shape=shape, num_images=num_images)
        assert (fewer.pixels == most.pixels[:num_images]).all()
        assert (fewer.labels == most.labels[:num_images]).all()


def test_same_arguments_same_images_and_any_other_differ() -> None:
    def draw(**arguments: object) -> bytes:
        images = shapes.load(**{"image_shape": (1, 16, 16), "num_images": 11} | arguments)  # type: ignore[arg-type]
        return images.pixels.tobytes()

    others: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"split": "test"},
        {"split": "test", "seed": 1},
        {"image_shape": (3, 16, 16)},
        {"image_shape": (1, 17, 17)},
    ]
    assert len({draw(**arguments) for arguments in others}) == len(others)
    for arguments in others:
        assert draw(**arguments) == draw(**arguments)


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    state = torch.get_rng_state()
    before = shapes.load(image_shape=(1, 8, 8), num_images=10)
    assert (torch.get_rng_state() == state).all()
    torch.rand(3)
    assert (shapes.load(image_shape=(1, 8, 8), num_images=10).pixels == before.pixels).all()


@pytest.mark.parametrize("shape", [COLOUR, GREY])
def test_no_two_images_are_equal_within_and_between_splits(shape: tuple[int, int, int]) -> None:
    drawn = [
        image.tobytes()
        for split in ("train", "test")
        for image in shapes.load(split, image_shape=shape, num_images=300).pixels
    ]
    assert len(set(drawn)) == len(drawn)


def test_grey_pictures_are_what_pillow_makes_of_the_colour_ones() -> None:
    colour = shapes.load(image_shape=(3, 16, 16), num_images=20).pixels
    grey = shapes.load(image_shape=(1, 16, 16), num_images=20).pixels
    for image, expected in zip(colour, grey[..., 0], strict=True):
        converted = np.asarray(Image.fromarray(image).convert("L")).astype(int)
        assert np.abs(converted - expected).max() <= 2  # each rounds where the other does not


@pytest.mark.parametrize("shape", [COLOUR, GREY])
def test_tones_take_the_whole_range(shape: tuple[int, int, int]) -> None:
    pixels = shapes.load(image_shape=shape, num_images=300).pixels
    shares = np.histogram(pixels, bins=8, range=(0, 256))[0] / pixels.size
    assert (shares > 0.02).all()
    assert pixels.min() == 0 and pixels.max() == 255


def test_colours_are_correlated_and_mostly_pale_but_some_vivid() -> None:
    images = shapes.load(image_shape=COLOUR, num_images=600)
    pixels = images.pixels.reshape(600, -1, 3).astype(float)
    correlation = np.corrcoef(pixels.reshape(-1, 3).T)
    assert correlation.min() > 0.6
    chroma = (pixels.max(axis=2) - pixels.min(axis=2)).mean(axis=1) / 255
    assert np.median(chroma) < 0.25
    assert (chroma > 0.35).mean() > 0.02


@pytest.mark.parametrize("family", ["leaves", "noise", "mosaic", "landscape", "thing"])
def test_power_falls_with_frequency_as_in_photographs(family: str) -> None:
    images = shapes.load(image_shape=COLOUR, num_images=400)
    grey = images.pixels[images.labels == images.classes.index(family)].mean(axis=3)
    window = np.outer(np.hanning(32), np.hanning(32))
    power = (
        np.abs(np.fft.fft2((grey - grey.mean(axis=(1, 2), keepdims=True)) * window)) ** 2
    ).mean(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32)))
    band = (frequency >= 2 / 32) & (frequency <= 0.4)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert -3.6 < slope < -1.6


def test_silhouettes_stand_in_the_middle_of_plain_ground() -> None:
    images = shapes.load(image_shape=GREY, num_images=600)
    drawn = images.pixels[images.labels == images.classes.index("silhouette"), ..., 0]
    corners = drawn[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    plain = (corners == corners[:, :1]).all(axis=1)
    assert plain.mean() > 0.6
    differs = drawn[plain] != corners[plain, :1, None]
    middle, rim = differs[:, 9:19, 9:19].mean(), differs[:, [0, -1]].mean()
    assert middle > 0.7
    assert rim < 0.3
    assert 0.4 < (corners[:, 0] == 0).mean() < 0.8


def test_tissue_is_pink_and_violet_with_darker_nuclei() -> None:
    images = shapes.load(image_shape=COLOUR, num_images=300)
    for family in ("epithelium", "stroma"):
        drawn = images.pixels[images.labels == images.classes.index(family)].astype(float)
        red, green, blue = drawn.mean(axis=(0, 1, 2))
        assert green < min(red, blue)
        dark = drawn.sum(axis=3) < np.quantile(drawn.sum(axis=3), 0.05)
        assert drawn[dark][:, 2].mean() > drawn[dark][:, 0].mean()  # haematoxylin: blue over red


def test_a_classifier_tells_the_families_apart() -> None:
    train = shapes.load(image_shape=(3, 24, 24), num_images=2000)
    test = shapes.load("test", image_shape=(3, 24, 24), num_images=400)
    network = train_classifier(
        train,
        steps=300,
        batch_size=48,
        lr=4e-3,
        weight_decay=0.01,
        label_smoothing=0.0,
        width=12,
        seed=0,
    )
    assert accuracy(predict(network, test), test).value > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "public.load.split='valid'"),
        ({"num_images": -1}, "public.load.num_images=-1"),
        ({"num_images": 1.5}, "public.load.num_images=1.5"),
        ({"seed": -1}, "public.load.seed=-1"),
        ({"seed": "many"}, "public.load.seed='many'"),
        ({"image_shape": (2, 32, 32)}, r"public.load.image_shape=\(2, 32, 32\)"),
        ({"image_shape": (3, 7, 32)}, "sides of 8 to 128"),
        ({"image_shape": (3, 32, 129)}, "sides of 8 to 128"),
        ({"image_shape": (3, 32)}, "public.load.image_shape"),
        ({"image_shape": (3, 32.5, 32)}, "public.load.image_shape"),
        ({"image_shape": None}, "public.load.image_shape=None"),
        ({"image_shape": "3x32x32"}, "public.load.image_shape=3x32x32"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        shapes.load(**{"image_shape": COLOUR, "num_images": 1} | arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", shapes.FAMILIES.values(), ids=list(shapes.FAMILIES))
def test_a_family_is_finite_at_any_size(family: Callable[[Canvas], torch.Tensor]) -> None:
    for height, width in ((16, 16), (26, 26), (16, 34)):
        picture = family(Canvas(5, height, width, np.random.default_rng(1)))
        assert picture.shape == (5, 3, height, width)
        assert picture.isfinite().all()


def test_cells_are_nearest_seeds() -> None:
    """Against a k-d tree: with no jitter the seeds are the middles of the unit squares."""
    drawing = canvas(3)
    x, y = drawing.uniform(-4, 4, 32, 32), drawing.uniform(-4, 4, 32, 32)
    found = cells(drawing, x, y, jitter=0.0, oval=0.0)
    middles = np.stack(np.meshgrid(np.arange(-6, 6) + 0.5, np.arange(-6, 6) + 0.5), -1)
    tree = cKDTree(middles.reshape(-1, 2))
    distance, _ = tree.query(torch.stack([x, y], -1).numpy(), k=2)
    np.testing.assert_allclose(found.nearest, distance[..., 0], atol=1e-5)
    np.testing.assert_allclose(found.second, distance[..., 1], atol=1e-5)
    numbers = y.floor().long() % 16 * 16 + x.floor().long() % 16
    assert (found.index == numbers).all()


@pytest.mark.parametrize("slope", [0.0, 2.0, 3.0])
def test_clouds_have_the_slope_asked_for(slope: float) -> None:
    field = clouds(canvas(400, 64), torch.full((400,), slope)).squeeze(1)
    np.testing.assert_allclose(field.std(dim=(1, 2)), 1, rtol=1e-4)
    power = torch.fft.fft2(field).abs().square().mean(0).numpy()
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    band = (frequency > 0) & (frequency < 0.5)
    fitted = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert fitted == pytest.approx(-slope, abs=0.15)


def test_palette_stays_in_range_and_spreads_lightness() -> None:
    colours = palette(canvas(500), 7)
    assert colours.shape == (500, 7, 3)
    assert colours.min() >= 0 and colours.max() <= 1
    grey = luma(colours.transpose(1, 2).unsqueeze(-1)).flatten(1)
    assert (grey.amax(1) - grey.amin(1)).min() > 0.4


def test_symmetric_contours_mirror() -> None:
    drawing = canvas(6)
    u, v = drawing.x.expand(6, 32, 32), drawing.y.expand(6, 32, 32)
    mirrored = contour(drawing, u, v, torch.ones(6, 1, 1))
    torch.testing.assert_close(mirrored, mirrored.flip(2))
    free = contour(drawing, u, v, torch.zeros(6, 1, 1))
    assert (free - free.flip(2)).abs().amax() > 0.1


def test_profile_interpolates_as_numpy_does() -> None:
    knots = torch.rand(4, 6)
    y = torch.linspace(-1.3, 1.3, 50).expand(4, 3, 50)
    expected = [np.interp(y[i], np.linspace(-1, 1, 6), knots[i]) for i in range(4)]
    np.testing.assert_allclose(profile(y, knots), np.stack(expected), atol=1e-5)


def test_segment_distance_equals_the_nearest_of_many_points() -> None:
    drawing = canvas(3)
    start, end = drawing.point(0.8), drawing.point(0.8)
    shares = torch.linspace(0, 1, 500).view(-1, 1, 1, 1, 1)
    points = start + shares * (end - start)
    steps = (drawing.x - points[:, :, 0]).square() + (drawing.y - points[:, :, 1]).square()
    expected = steps.amin(0).sqrt()
    np.testing.assert_allclose(segment(drawing, start, end), expected, atol=5e-3)
