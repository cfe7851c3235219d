"""Classifiers: their sizes as published, their training a function of its arguments alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from toy_images import PLACES, mapped, shuffled, toy, train

from dp_synth.data import digits
from dp_synth.data.images import Images
from dp_synth.data.pixels import to_float
from dp_synth.errors import UserError
from dp_synth.metrics.augmentation import bend, mirror, shift
from dp_synth.metrics.classifier_networks import Classifier, ResNet, ResNeXt, SmallCNN, WideResNet
from dp_synth.metrics.classifiers import _lr_factor, _views, predict, probabilities
from dp_synth.metrics.estimates import accuracy

# --- networks --------------------------------------------------------------------------------

OPTIMIZERS = ("adam", "sgd", "nesterov")
# The least of each kind, for speed.
LEAST: list[Callable[..., Classifier]] = [
    partial(SmallCNN, width=4),
    partial(SmallCNN, width=4, norm="group"),
    partial(WideResNet, depth=10, width=1),
    partial(WideResNet, depth=10, width=1, dropout=0.3, norm="group"),
    partial(ResNet, depth=8, width=4),
    partial(ResNeXt, depth=11, cardinality=2, group_width=2, width=1),
]
SHAPES = [(1, 8, 8), (3, 13, 13), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 9, 8), (3, 8, 37)]


@pytest.mark.parametrize("network", LEAST)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_classes", [1, 7])
def test_network_fits_images_of_any_side(
    network: Callable[..., Classifier], shape: tuple[int, int, int], num_classes: int
) -> None:
    model = network(shape, num_classes).eval()
    x = torch.randn(2, *shape)
    features = model.features(x)
    assert features.shape == (2, model.num_features)
    assert torch.equal(model(x), model.head(features))
    assert model(x).shape == (2, num_classes)


@pytest.mark.parametrize("network", LEAST)
def test_network_refuses_images_that_are_too_small(network: Callable[..., Classifier]) -> None:
    with pytest.raises(UserError, match="7x8"):
        network((1, 7, 8), 10)


@pytest.mark.parametrize(
    ("network", "millions"),
    [
        (WideResNet, 8.9),  # Zagoruyko and Komodakis 2016, table 4: WRN-40-4
        (partial(WideResNet, depth=28, width=10), 36.5),
        (partial(WideResNet, depth=16, width=8), 11.0),
        (ResNet, 1.7),  # He et al. 2016, table 6: ResNet-110
        (ResNeXt, 34.4),  # Xie et al. 2017, table 7: ResNeXt-29, 8x64d
        (partial(ResNeXt, cardinality=16), 68.1),
    ],
)
def test_networks_have_the_published_number_of_parameters(
    network: Callable[..., Classifier], millions: float
) -> None:
    with torch.device("meta"):
        model = network((3, 32, 32), 10)
    found = sum(p.numel() for p in model.parameters()) / 1e6
    assert found == pytest.approx(millions, abs=0.06)  # they are given to 0.1


@pytest.mark.parametrize(
    ("network", "depth"), [(WideResNet, 41), (WideResNet, 4), (ResNet, 9), (ResNeXt, 28)]
)
def test_a_depth_that_blocks_do_not_make_is_refused(
    network: Callable[..., Classifier], depth: int
) -> None:
    with pytest.raises(UserError, match=f"depth={depth}"):
        network((3, 32, 32), 10, depth=depth)


@pytest.mark.parametrize("network", [LEAST[1], partial(WideResNet, depth=10, norm="group")])
def test_groups_keep_examples_apart(network: Callable[..., Classifier]) -> None:
    model, x = network((3, 11, 11), 5), torch.randn(4, 3, 11, 11)
    together, alone = model(x), torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 8), (1, 13)])
def test_classifier_learns_classes(channels: int, side: int) -> None:
    model = train(toy(500, 1, channels, side), seed=0, max_shift=0)
    test = toy(300, 2, channels, side)
    assert accuracy(predict(model, test), test).value > 0.97


def test_classifier_finds_nothing_in_shuffled_labels() -> None:
    images = shuffled(toy(1500, 1))
    model = train(images.select(np.arange(500)), seed=0)
    test = images.select(np.arange(500, 1500))
    estimate = accuracy(predict(model, test), test)
    # Five standard deviations around chance; the classes are drawn uniformly.
    assert abs(estimate.value - 1 / PLACES) < 5 * math.sqrt(0.25 * 0.75 / 1000)


def test_classifier_reads_handwritten_digits() -> None:
    model = train(digits.load("train"), steps=200, batch_size=64, width=16, seed=0)
    test = digits.load("test")
    assert accuracy(predict(model, test), test).ci_high > 0.98


def test_training_is_a_function_of_its_seed_and_leaves_global_random_state() -> None:
    images = toy(37, 0)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()  # type: ignore[index]
    first = train(images, steps=3, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # type: ignore[index]
    torch.rand(3)
    again, other = train(images, steps=3, seed=5), train(images, steps=3, seed=6)
    weights = [m.head.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("n", [1, 2, 31])
def test_fewer_images_than_a_batch(n: int) -> None:
    images = toy(n, 0)
    model = train(images, steps=40, seed=0, max_shift=0)
    assert accuracy(predict(model, images), images).value == 1


@pytest.mark.parametrize(("sets", "drawn"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_fresh_images_take_turns_and_none_is_drawn_in_vain(sets: int, drawn: int) -> None:
    # 9 steps of 8 images are 3 passes over 31: no more than 2 sets after the first are of use.
    seen: list[int] = []

    def draw(number: int) -> Images:
        return Images(np.full((31, 8, 8, 1), number, np.uint8), toy(31, 0).labels, tuple("abcd"))

    class Watching(SmallCNN):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(int(((x[0, 0, 0, 0] + 1) * 127.5).round()))
            return super().forward(x)

    fresh = [partial(draw, number) for number in range(1, sets + 1)]
    train(draw(0), fresh=fresh, network=Watching, steps=9, batch_size=8, elastic=0.0, seed=0)
    turns = [seen.count(number) for number in range(drawn + 1)]
    assert seen == sorted(seen) and sum(turns) == 9
    assert max(turns) - min(turns) <= 1


def test_the_same_images_as_fresh_ones_are_no_other_training() -> None:
    images = toy(64, 0)
    plain = train(images, steps=4, batch_size=32, seed=0)
    fresh = train(images, fresh=[lambda: images], steps=4, batch_size=32, seed=0)
    for a, b in zip(plain.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fresh_images_help_where_there_are_few() -> None:
    few, test = toy(5, 0), toy(300, 9)
    fresh = [partial(toy, 5, seed) for seed in range(1, 400)]
    models = train(few, seed=0, max_shift=0), train(few, fresh=fresh, seed=0, max_shift=0)
    found = [accuracy(predict(model, test), test).value for model in models]
    assert found[0] < found[1] and found[1] > 0.9


def test_no_image_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match="0 images"):
        train(toy(0, 0), seed=0)


@pytest.mark.parametrize("setting", ["steps", "batch_size"])
def test_a_training_without_steps_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match=f"{setting}=0"):
        train(toy(3, 0), seed=0, **{setting: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, 1, 13])
def test_predictions_do_not_depend_on_the_batch(n: int) -> None:
    images = toy(n, 3)
    model = SmallCNN(images.shape, PLACES, width=4).eval()
    whole, pieces = probabilities(model, images), probabilities(model, images, batch_size=5)
    assert whole.shape == (n, PLACES)
    np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(whole, pieces, atol=1e-6)
    assert predict(model, images).shape == (n,) and predict(model, images).dtype == np.int64


def test_images_in_a_file_are_as_good_and_only_batches_of_them_become_floats(
    tmp_path, monkeypatch, recwarn
) -> None:
    images = toy(101, 0, channels=3)
    in_a_file = mapped(images, tmp_path / "pixels")
    converted: list[int] = []

    def spy(pixels: np.ndarray) -> torch.Tensor:
        converted.append(len(pixels))
        return to_float(pixels)

    monkeypatch.setattr("dp_synth.metrics.classifiers.to_float", spy)
    models = [train(one, steps=5, batch_size=16, seed=0) for one in (images, in_a_file)]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [probabilities(models[0], one, batch_size=13) for one in (images, in_a_file)]
    np.testing.assert_array_equal(*rows)
    assert max(converted) == 16
    assert not recwarn.list


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [*((network, "adamw") for network in LEAST[2:]), *((LEAST[0], name) for name in OPTIMIZERS)],
)
def test_every_network_and_every_optimizer_learns(
    network: Callable[..., Classifier], optimizer: str
) -> None:
    lr = 0.01 if "adam" in optimizer else 0.1
    model = train(
        toy(300, 1),
        seed=0,
        network=network,
        width=None,
        optimizer=optimizer,
        lr=lr,
        weight_decay=0.0,
        ema_decay=0.9,
    )
    assert accuracy(predict(model, toy(200, 2)), toy(200, 2)).value > 0.9


def test_dropout_is_a_function_of_the_seed_too() -> None:
    network = partial(WideResNet, depth=10, width=1, dropout=0.5)
    briefly = partial(train, network=network, width=None, steps=3)
    before = torch.get_rng_state()
    first = briefly(toy(37, 0), seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    again = briefly(toy(37, 0), seed=5)
    assert torch.equal(first.head.weight, again.head.weight)


def test_averaged_weights_lie_between_the_first_and_the_last() -> None:
    first, last, averaged = (
        train(toy(64, 0), seed=0, lr=1e-4, steps=steps, ema_decay=decay)
        for steps, decay in ((1, 0.0), (40, 0.0), (40, 0.999))
    )
    distance = [(m.head.weight - first.head.weight).norm().item() for m in (averaged, last)]
    assert 0 < distance[0] < distance[1]


def test_no_loss_is_shown(capfd) -> None:
    train(toy(64, 0), seed=0, steps=3)
    out, err = capfd.readouterr()
    assert "loss" not in (out + err).lower() and not out


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_learning_rate_rises_then_falls_as_a_cosine_or_in_drops(steps: int) -> None:
    cosine = [_lr_factor(step, steps, 0.1, ()) for step in range(steps + 1)]
    assert 0 < cosine[0] <= 1 and cosine[-1] == pytest.approx(0)
    assert cosine == pytest.approx(
        [
            min(1, (i + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * i / steps)) / 2
            for i in range(steps + 1)
        ]
    )
    dropped = [_lr_factor(step, steps, 0.0, (0.4, 0.8)) for step in range(steps)]
    expected = [1.0 if i < 0.4 * steps else 0.2 if i < 0.8 * steps else 0.04 for i in range(steps)]
    assert dropped == pytest.approx(expected)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(UserError, match="optimizer='lion'"):
        train(toy(3, 0), seed=0, optimizer="lion")


# --- augmentation ----------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "height", "width"), [(0, 3, 5), (1, 8, 8), (2, 5, 7)])
def test_shifted_images_are_the_crops_of_an_edge_padded_one(
    most: int, height: int, width: int
) -> None:
    image = torch.randn(2, height, width)
    generator = torch.Generator().manual_seed(0)
    down, right = torch.randint(-most, most + 1, (2, 400), generator=generator)
    shifted = shift(image.expand(400, 2, height, width), down, right)
    padded = np.pad(image.numpy(), ((0, 0), (most, most), (most, most)), mode="edge")
    span = range(2 * most + 1)
    crops = {padded[:, i : i + height, j : j + width].tobytes() for i in span for j in span}
    assert {view.numpy().tobytes() for view in shifted.contiguous()} == crops


def test_a_bend_moves_pixels_by_about_the_asked_distance() -> None:
    # In an image of a slope of 1, the change of a pixel is its displacement.
    slope = torch.arange(40.0).expand(500, 1, 40, 40)
    bent = bend(slope, 0.5, torch.Generator().manual_seed(0))
    inside = (bent - slope)[..., 5:-5]
    assert abs(inside.mean()) < 0.05
    assert 0.3 < inside.std() < 0.6
    neighbours = (inside[..., 1:, :] - inside[..., :-1, :]).std()
    assert neighbours < 0.1  # smooth


def test_no_bend_changes_nothing() -> None:
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(bend(x, 0.0, torch.Generator()), x)


def test_mirrored_images_are_those_asked_for() -> None:
    x = torch.randn(5, 3, 4, 7)
    asked = torch.tensor([True, False, False, True, True])
    mirrored = mirror(x, asked)
    for row, found, is_asked in zip(x, mirrored, asked, strict=True):
        assert torch.equal(found, row[..., range(6, -1, -1)] if is_asked else row)


def test_views_reach_every_shift_and_both_sides() -> None:
    x = torch.zeros(900, 1, 9, 9)
    x[:, 0, 4, 3] = 1
    generator = torch.Generator().manual_seed(0)
    plain = _views(x, 1, 0.0, flip=False, generator=generator)
    both = _views(x, 1, 0.0, flip=True, generator=generator)
    assert {tuple(place) for place in plain[:, 0].nonzero()[:, 1:].tolist()} == {
        (row, column) for row in (3, 4, 5) for column in (2, 3, 4)
    }
    columns = both[:, 0].nonzero()[:, 2]
    assert set(columns.tolist()) == {2, 3, 4, 5, 6}
    assert 0.4 < float((columns < 4).float().mean() + 0.5 * (columns == 4).float().mean()) < 0.6
