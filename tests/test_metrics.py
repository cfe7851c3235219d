"""Utility and fidelity: against closed forms, and against what chance would give."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy.linalg import sqrtm
from torch import nn

from dp_synth.data import digits
from dp_synth.data.images import Images
from dp_synth.data.pixels import to_float
from dp_synth.errors import UserError
from dp_synth.metrics.classifiers import (
    SmallCNN,
    _bend,
    _shift,
    predict,
    probabilities,
    train_classifier,
)
from dp_synth.metrics.estimates import accuracy, class_recall
from dp_synth.metrics.evaluator import Evaluator
from dp_synth.metrics.fidelity import ClassifierFeatures, Fidelity, frechet_distance
from dp_synth.metrics.names import split_accuracies
from dp_synth.metrics.utility import Utility

train = functools.partial(
    train_classifier,
    steps=60,
    batch_size=32,
    lr=3e-3,
    weight_decay=0.01,
    label_smoothing=0.05,
    elastic=0.3,
    width=8,
    device="cpu",
)
PLACES = 4  # of a toy image's bright bar: its class


def toy(n: int, seed: int, channels: int = 1, side: int = 8) -> Images:
    """A bright horizontal bar at one of four heights, in noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(PLACES, size=n)
    pixels = rng.integers(0, 80, size=(n, side, side, channels), dtype=np.uint8)
    for row, label in zip(pixels, labels, strict=True):
        start = label * side // PLACES
        row[start : start + side // PLACES] += 150
    return Images(pixels, labels, tuple("abcd"))


def shuffled(images: Images, seed: int = 0) -> Images:
    labels = np.random.default_rng(seed).permutation(images.labels)
    return Images(images.pixels, labels, images.classes)


def mislabelled(images: Images) -> Images:
    return Images(images.pixels, (images.labels + 1) % PLACES, images.classes)


def mapped(images: Images, path: Path) -> Images:
    """The same images, their pixels read-only in a file."""
    images.pixels.tofile(path)
    pixels = np.memmap(path, np.uint8, "r", shape=images.pixels.shape)
    return Images(pixels, images.labels, images.classes)


def noisy(images: Images, scale: float) -> Images:
    noise = np.random.default_rng(0).normal(0, scale, images.pixels.shape)
    pixels = np.clip(images.pixels + noise, 0, 255).astype(np.uint8)
    return Images(pixels, images.labels, images.classes)


# --- utility ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 7), (3, 7), (353, 360), (360, 360)])
def test_interval_is_the_root_of_wilsons_equation(hits: int, n: int) -> None:
    images = Images(np.zeros((n, 8, 8, 1), np.uint8), np.zeros(n, np.int64), ("a", "b"))
    predicted = (np.arange(n) >= hits).astype(np.int64)
    estimate = accuracy(predicted, images)
    z = 1.959963984540054
    p = hits / n
    # (p - u)^2 = z^2 u (1 - u) / n, solved for u
    roots = np.roots([1 + z**2 / n, -(2 * p + z**2 / n), p**2]).real
    assert estimate.value == p and estimate.n == n
    assert estimate.ci_low == pytest.approx(min(roots), abs=1e-7)
    assert estimate.ci_high == pytest.approx(max(roots), abs=1e-7)


def test_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 images"):
        accuracy(np.zeros(0, np.int64), toy(0, 0))


def test_recall_counts_each_class_and_leaves_out_absent_ones() -> None:
    labels = np.array([0, 0, 0, 2, 2], np.int64)
    images = Images(np.zeros((5, 8, 8, 1), np.uint8), labels, ("a", "b", "c"))
    recall = class_recall(np.array([0, 1, 0, 2, 0], np.int64), images)
    assert list(recall) == ["a", "c"]
    assert (recall["a"].value, recall["a"].n) == (pytest.approx(2 / 3), 3)
    assert (recall["c"].value, recall["c"].n) == (0.5, 2)


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


def test_no_image_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match="0 images"):
        train(toy(0, 0), seed=0)


@pytest.mark.parametrize("setting", ["steps", "batch_size"])
def test_a_training_without_steps_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match=f"{setting}=0"):
        train(toy(3, 0), seed=0, **{setting: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(("most", "height", "width"), [(0, 3, 5), (1, 8, 8), (2, 5, 7)])
def test_shifted_images_are_the_crops_of_an_edge_padded_one(
    most: int, height: int, width: int
) -> None:
    image = torch.randn(2, height, width)
    generator = torch.Generator().manual_seed(0)
    shifted = _shift(image.expand(400, 2, height, width), most, generator)
    padded = np.pad(image.numpy(), ((0, 0), (most, most), (most, most)), mode="edge")
    span = range(2 * most + 1)
    crops = {padded[:, i : i + height, j : j + width].tobytes() for i in span for j in span}
    assert {view.numpy().tobytes() for view in shifted.contiguous()} == crops


def test_a_bend_moves_pixels_by_about_the_asked_distance() -> None:
    # In an image of a slope of 1, the change of a pixel is its displacement.
    slope = torch.arange(40.0).expand(500, 1, 40, 40)
    bent = _bend(slope, 0.5, torch.Generator().manual_seed(0))
    inside = (bent - slope)[..., 5:-5]
    assert abs(inside.mean()) < 0.05
    assert 0.3 < inside.std() < 0.6
    neighbours = (inside[..., 1:, :] - inside[..., :-1, :]).std()
    assert neighbours < 0.1  # smooth


def test_no_bend_changes_nothing() -> None:
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(_bend(x, 0.0, torch.Generator()), x)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 8), (1, 28, 28), (3, 64, 64), (3, 8, 37)])
@pytest.mark.parametrize("num_classes", [1, 7])
def test_network_fits_images_of_any_side(shape: tuple[int, int, int], num_classes: int) -> None:
    model = SmallCNN(shape, num_classes, width=4, num_features=11).eval()
    x = torch.randn(2, *shape)
    assert model.features(x).shape == (2, 11)
    assert model(x).shape == (2, num_classes)


def test_network_refuses_images_that_are_too_small() -> None:
    with pytest.raises(UserError, match="7x8"):
        SmallCNN((1, 7, 8), 10)


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


# --- fidelity --------------------------------------------------------------------------------


class Pixels(nn.Module):
    """The pixels themselves as features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1).double()


def closed_form(a: np.ndarray, b: np.ndarray) -> float:
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(means + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


def gaussian(n: int, seed: int, mean: float, std: float) -> Images:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(0, 1, (n, 6)) @ rng.normal(0, 1, (6, 6))
    pixels = np.clip(mean + std * mixed, 0, 255).astype(np.uint8).reshape(n, 3, 2, 1)
    return Images(pixels, np.zeros(n, np.int64), ("a",))


@pytest.mark.parametrize(("n", "m"), [(53, 97), (500, 101)])
def test_frechet_distance_is_the_closed_form(n: int, m: int) -> None:
    a, b = gaussian(n, 1, 120, 10), gaussian(m, 2, 90, 15)
    expected = closed_form(a.pixels.reshape(n, 6), b.pixels.reshape(m, 6))
    assert frechet_distance(a, b, Pixels(6), batch_size=17) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_is_zero_to_itself_and_grows_with_noise() -> None:
    images = toy(400, 0)
    features = ClassifierFeatures(train(toy(300, 7), seed=0))
    distances = [
        frechet_distance(images, noisy(images, scale), features) for scale in (0, 20, 60, 150)
    ]
    assert 0 <= distances[0] < 1e-4
    assert distances == sorted(distances)
    assert distances[1] > 100 * distances[0]


def test_frechet_distance_of_images_in_a_file_is_the_same(tmp_path, recwarn) -> None:
    a, b = gaussian(53, 1, 120, 10), gaussian(97, 2, 90, 15)
    in_memory = frechet_distance(a, b, Pixels(6), batch_size=17)
    files = (mapped(a, tmp_path / "a"), mapped(b, tmp_path / "b"))
    assert frechet_distance(*files, Pixels(6), batch_size=17) == in_memory
    assert not [warning for warning in recwarn.list if "writable" in str(warning.message)]


def test_classifier_features_are_its_penultimate_layer() -> None:
    images = toy(5, 0)
    model = SmallCNN(images.shape, PLACES, width=4)
    features = ClassifierFeatures(model)(torch.tensor(images.pixels).permute(0, 3, 1, 2))
    expected = probabilities(model, images)
    assert features.shape == (5, model.num_features)
    np.testing.assert_allclose(
        model.head(features).softmax(1).detach().numpy(), expected, atol=1e-6
    )


@pytest.mark.parametrize(("n", "m"), [(1, 9), (9, 1), (0, 9)])
def test_frechet_distance_of_one_image_is_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="2 or more"):
        frechet_distance(toy(n, 0), toy(m, 0), Pixels(64))


# --- the quick evaluator ---------------------------------------------------------------------


def evaluate(
    other_tests: Mapping[str, Images] | None = None, **changed: Images | None
) -> tuple[dict[str, float], dict[str, dict]]:
    sets: dict[str, Images | None] = {
        "synthetic": toy(200, 1),
        "public_only": mislabelled(toy(150, 2)),
        "real_train": toy(120, 3),
        "real_test": toy(83, 4),
        "public": toy(90, 5),
    }
    quick = Evaluator(
        classifier=train, utility=Utility(validation_fraction=0.1), fidelity=Fidelity()
    )
    return quick(**(sets | changed), other_tests=other_tests or {}, seed=0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def evaluated() -> tuple[dict[str, float], dict[str, dict]]:
    return evaluate()


INTERVALS = [
    "utility/accuracy",
    "utility/accuracy.public_only",
    "utility/accuracy.real",
    "utility/accuracy.synthetic_validation",
]
FRECHET = [f"fidelity/frechet.classifier{s}" for s in ("", ".public_only", ".real_floor")]


def test_evaluator_gives_the_metrics_of_the_contract(evaluated) -> None:
    metrics, meta = evaluated
    ends = [f"{name}.{end}" for name in INTERVALS for end in ("ci_low", "ci_high")]
    recall = [f"utility/recall.{name}" for name in "abcd"]
    assert set(metrics) == {*INTERVALS, *ends, *recall, *FRECHET}
    assert set(meta) == set(metrics)
    assert json.loads(json.dumps([metrics, meta], allow_nan=False)) == [metrics, meta]
    for name in INTERVALS:
        assert metrics[f"{name}.ci_low"] <= metrics[name] <= metrics[f"{name}.ci_high"]


def test_only_synthetic_validation_looks_at_nothing_private(evaluated) -> None:
    _, meta = evaluated
    public = {name for name, entry in meta.items() if not entry["private"]}
    validation = "utility/accuracy.synthetic_validation"
    assert public == {validation, f"{validation}.ci_low", f"{validation}.ci_high"}


def test_meta_counts_the_images(evaluated) -> None:
    _, meta = evaluated
    assert meta["utility/accuracy"]["n"] == 83
    assert meta["utility/accuracy.synthetic_validation"]["n"] == 20
    assert sum(meta[f"utility/recall.{name}"]["n"] for name in "abcd") == 83
    assert {meta[name]["n"] for name in FRECHET} == {83}


def test_good_synthetic_images_score_as_real_ones_and_bad_baselines_do_not(evaluated) -> None:
    metrics, _ = evaluated
    assert metrics["utility/accuracy"] > 0.9 and metrics["utility/accuracy.real"] > 0.9
    assert metrics["utility/accuracy.public_only"] < 0.1


def test_synthetic_validation_does_not_depend_on_private_images(evaluated) -> None:
    metrics, _ = evaluated
    other, _ = evaluate(real_train=shuffled(toy(50, 8)), real_test=shuffled(toy(60, 9)))
    name = "utility/accuracy.synthetic_validation"
    assert other[name] == metrics[name]
    assert other["utility/accuracy"] != metrics["utility/accuracy"]


def test_other_splits_have_the_accuracy_of_the_same_classifier(evaluated) -> None:
    metrics, meta = evaluate(other_tests={"val": toy(31, 8), "id_val": shuffled(toy(57, 9))})
    for split, images in (("val", toy(31, 8)), ("id_val", shuffled(toy(57, 9)))):
        alone, _ = evaluate(real_test=images, public_only=None, public=None)
        for end in ("", ".ci_low", ".ci_high"):
            assert metrics[f"utility/accuracy.{split}{end}"] == alone[f"utility/accuracy{end}"]
        assert meta[f"utility/accuracy.{split}"]["private"]
        assert meta[f"utility/accuracy.{split}"]["n"] == len(images)
    assert {name: metrics[name] for name in evaluated[0]} == evaluated[0]
    assert split_accuracies(metrics) == {
        "val": "utility/accuracy.val",
        "id_val": "utility/accuracy.id_val",
    }


def test_classes_of_other_splits_are_matched_by_name() -> None:
    images = toy(31, 8)
    backwards = Images(images.pixels, 3 - images.labels, images.classes[::-1])
    one, other = evaluate(other_tests={"val": images}), evaluate(other_tests={"val": backwards})
    assert one == other


@pytest.mark.parametrize("split", ["real", "public_only", "synthetic_validation", "ci_low", "a.b"])
def test_a_split_cannot_take_the_name_of_another_metric(split: str) -> None:
    with pytest.raises(UserError, match="rename the split"):
        evaluate(other_tests={split: toy(9, 0)})


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(UserError, match="val holds no image"):
        evaluate(other_tests={"val": toy(0, 0)})


def test_no_metric_without_other_splits_looks_like_one_of_a_split(evaluated) -> None:
    assert split_accuracies(evaluated[0]) == {}


def test_what_is_not_there_is_left_out() -> None:
    real_test = toy(40, 4)
    real_test = real_test.select(real_test.labels != 1)
    metrics, meta = evaluate(
        synthetic=toy(1, 1), public_only=None, public=None, real_test=real_test
    )
    assert set(metrics) == set(meta)
    assert "utility/recall.b" not in metrics and "utility/recall.a" in metrics
    assert not any("public_only" in name or "fidelity" in name for name in metrics)
    assert not any("validation" in name for name in metrics)
    assert all(math.isfinite(value) for value in metrics.values())


def test_one_test_image_has_an_accuracy_and_no_frechet_distance() -> None:
    metrics, _ = evaluate(real_test=toy(1, 4), public_only=None)
    assert metrics["utility/accuracy"] in (0.0, 1.0)
    assert not any("fidelity" in name for name in metrics)


def test_classes_are_matched_by_name(evaluated) -> None:
    images = toy(200, 1)
    backwards = Images(images.pixels, 3 - images.labels, images.classes[::-1])
    assert evaluate(synthetic=backwards) == evaluated


@pytest.mark.parametrize(
    ("name", "images", "message"),
    [
        ("synthetic", toy(0, 0), "synthetic holds no image"),
        ("real_test", toy(0, 0), "real_test holds no image"),
        ("public_only", toy(9, 0, channels=3), "public_only holds images of shape"),
        ("public", toy(9, 0, side=16), "public holds images of shape"),
        ("real_train", Images(toy(9, 0).pixels, toy(9, 0).labels, tuple("abcx")), "'x'"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(name: str, images: Images, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(**{name: images})


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_validation_fraction_is_a_fraction(fraction: float) -> None:
    with pytest.raises(UserError, match="validation_fraction"):
        Utility(validation_fraction=fraction)


def test_the_config_constructs_the_evaluator(request: pytest.FixtureRequest) -> None:
    conf = request.config.rootpath / "conf" / "evaluator" / "quick.yaml"
    quick = instantiate(OmegaConf.load(conf))
    model = quick.classifier(toy(3, 0), steps=1, seed=0, caption="classifier")
    assert predict(model, toy(5, 0)).shape == (5,)
