"""The quick evaluator against what chance would give."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest
from conftest import compose
from hydra.utils import instantiate
from toy_images import mislabelled, shuffled, toy, train

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.classifiers import predict
from dp_synth.metrics.evaluator import Evaluator
from dp_synth.metrics.fidelity import Fidelity
from dp_synth.metrics.names import split_accuracies
from dp_synth.metrics.utility import Utility


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
FIDELITY = [
    f"fidelity/{metric}.classifier{suffix}"
    for metric in ("frechet", "kid", "precision", "recall", "density", "coverage")
    for suffix in ("", ".public_only", ".real_floor")
]


def test_evaluator_gives_the_metrics_of_the_contract(evaluated) -> None:
    metrics, meta = evaluated
    ends = [f"{name}.{end}" for name in INTERVALS + FIDELITY for end in ("ci_low", "ci_high")]
    recall = [f"utility/recall.{name}" for name in "abcd"]
    calibration = "utility/calibration_error"
    assert set(metrics) == {*INTERVALS, *ends, *recall, calibration, *FIDELITY}
    assert set(meta) == set(metrics)
    assert json.loads(json.dumps([metrics, meta], allow_nan=False)) == [metrics, meta]
    for name in INTERVALS + FIDELITY:
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
    assert {meta[name]["n"] for name in FIDELITY} == {83}


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


def test_features_come_from_a_classifier_of_their_own_where_there_is_a_recipe_for_it() -> None:
    trained: dict[str, list[str]] = {"own": [], "other": []}

    def training(kind: str):
        def recipe(images: Images, *, caption: str, **options):
            trained[kind].append(caption)
            return train(images, caption=caption, **(options | {"steps": 2}))

        return recipe

    sets = dict.fromkeys(("synthetic", "real_train", "real_test", "public"), toy(40, 1))
    options = {"public_only": None, "other_tests": {}, "seed": 0}
    for given in ({}, {"feature_classifier": training("other")}):
        Evaluator(
            classifier=training("own"),
            utility=Utility(validation_fraction=0.1),
            fidelity=Fidelity(),
            **given,
        )(**sets, **options)
    captions = ["classifier: synthetic", "classifier: real"]
    features = "classifier: features"
    assert trained == {"own": [*captions, features, *captions], "other": [features]}


@pytest.mark.parametrize("option", ["paper", "dpimagebench", "dpimagebench_cifar"])
def test_all_evaluators_share_the_features_of_the_quick_one(option: str) -> None:
    quick, other = (compose(f"evaluator={name}").evaluator for name in ("quick", option))
    assert other.feature_classifier == quick.classifier and other.classifier != quick.classifier
    assert quick.feature_classifier is None


def test_the_config_constructs_the_evaluator() -> None:
    quick = instantiate(compose().evaluator)
    model = quick.classifier(toy(3, 0), steps=1, seed=0, caption="classifier")
    assert predict(model, toy(5, 0)).shape == (5,)
