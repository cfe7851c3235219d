"""Memorisation: against brute force and exact enumeration; planted copies are found, no others."""

from __future__ import annotations

import itertools
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom
from sklearn.neighbors import NearestNeighbors

from dp_synth.data import digits
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics import neighbours
from dp_synth.metrics.closeness import References, relative_distances
from dp_synth.metrics.evidence import Evidence
from dp_synth.metrics.exchangeability import below_p_value, share_p_value
from dp_synth.metrics.features.pixels import pixel_features
from dp_synth.metrics.memorization import Memorization
from dp_synth.metrics.neighbours import nearest, several_nearest
from dp_synth.metrics.record import Metrics

SIGNIFICANT = 0.001


def bytes_of(n: int, dims: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, dims), dtype=np.uint8)


def as_images(vectors: np.ndarray, units: np.ndarray | None = None) -> Images:
    pixels = vectors.reshape(len(vectors), 8, 8, -1)
    return Images(pixels, np.zeros(len(vectors), np.int64), ("a",), units)


def drawn(n: int, seed: int) -> np.ndarray:
    """Smooth images of 8x8 pixels: a few random waves, as alike as images of one class are."""
    rng = np.random.default_rng(seed)
    axis = np.arange(8) / 8
    waves = [np.cos(np.pi * (i * axis[:, None] + j * axis)) for i in range(3) for j in range(3)]
    mixed = rng.normal(0, 1, (n, 9)) @ np.stack(waves).reshape(9, 64)
    return np.clip(128 + 25 * mixed + rng.normal(0, 3, (n, 64)), 0, 255).astype(np.uint8)


def noisy_copies(vectors: np.ndarray, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    copies = vectors[rng.permutation(len(vectors))[:n]] + rng.normal(0, 2, (n, vectors.shape[1]))
    return np.clip(copies, 0, 255).astype(np.uint8)


def references(train: np.ndarray, held_out: np.ndarray, seed: int = 0) -> References:
    return References(train, held_out, np.arange(len(train)), np.arange(len(held_out)), seed)


# --- nearest neighbours ------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(neighbours, "_QUERIES", 5)
    monkeypatch.setattr(neighbours, "_REFERENCES", 7)


@pytest.mark.parametrize(("q", "r", "dims"), [(1, 1, 1), (3, 2, 5), (0, 4, 3), (13, 31, 17)])
@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_distances_are_scikit_learns(small_pieces, q: int, r: int, dims: int, kind: str) -> None:
    queries, rows = bytes_of(q, dims, 1), bytes_of(r, dims, 2)
    if kind == "floats":
        queries, rows = (array.astype(np.float32) / 99 for array in (queries, rows))
    k = min(3, r)
    distances, indices = several_nearest(queries, rows, k)
    assert distances.shape == indices.shape == (q, k)
    if q == 0:
        return
    theirs = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(rows.astype(np.float64))
    expected, places = theirs.kneighbors(queries.astype(np.float64))
    np.testing.assert_allclose(distances, expected, rtol=1e-9, atol=1e-6)
    one, first = nearest(queries, rows)
    np.testing.assert_array_equal(one, distances[:, 0])
    if kind == "floats" or dims > 1:
        np.testing.assert_array_equal(indices, places)
        np.testing.assert_array_equal(first, places[:, 0])


def test_copies_have_distance_zero_and_the_first_of_equals_is_taken(small_pieces) -> None:
    rows = bytes_of(23, 3072, 0)
    rows[20] = rows[3]
    distances, indices = nearest(rows, rows)
    assert (distances == 0).all()
    assert indices[20] == 3 and indices[3] == 3
    assert (np.delete(indices, 20) == np.delete(np.arange(23), 20)).all()


def test_images_of_the_same_unit_are_not_compared(small_pieces) -> None:
    rows, units = bytes_of(29, 4, 0), np.arange(29) // 3
    distances, indices = several_nearest(rows, rows, 2, units, units)
    for row in range(29):
        others = np.flatnonzero(units != units[row])
        exact = np.sqrt(((rows[others].astype(float) - rows[row].astype(float)) ** 2).sum(1))
        np.testing.assert_allclose(distances[row], np.sort(exact)[:2], rtol=1e-12)
        assert set(units[indices[row]]).isdisjoint({units[row]})


# --- tests of exchangeability ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "members"), [([3, 0, 1, 1], 2), ([5, 1, 0, 0, 2, 2, 0], 3), ([1], 1), ([0, 0], 1)]
)
def test_share_p_value_is_that_of_all_permutations(hits: list[int], members: int) -> None:
    counts = np.array(hits)
    member = np.arange(len(counts)) < members
    sums = [counts[list(c)].sum() for c in itertools.combinations(range(len(counts)), members)]
    exact = np.mean([value >= counts[member].sum() for value in sums])
    p = share_p_value(counts, member, seed=0, draws=40_000)
    assert abs(p - exact) < 5 * np.sqrt(exact * (1 - exact) / 40_000) + 1e-4


def test_share_p_value_is_valid_over_all_assignments() -> None:
    counts = np.array([4, 0, 0, 1, 2, 1, 0, 3])
    ps = []
    for chosen in itertools.combinations(range(8), 4):
        member = np.isin(np.arange(8), chosen)
        ps.append(share_p_value(counts, member, seed=1))
    for level in (0.05, 0.1, 0.3, 0.7):
        assert np.mean(np.array(ps) <= level) <= level + 0.02  # of 9,999 draws


@pytest.mark.parametrize(("n", "rank", "calibration"), [(2, 1, 3), (3, 2, 4), (1, 1, 1), (4, 3, 3)])
def test_below_p_value_is_that_of_all_orders(n: int, rank: int, calibration: int) -> None:
    total = n + calibration
    below = []
    for places in itertools.combinations(range(total), calibration):
        threshold = places[rank - 1]
        below.append(threshold - (rank - 1))  # what stands before it and is no calibration value
    for found in range(n + 1):
        exact = np.mean([value >= found for value in below])
        assert below_p_value(found, n, rank, calibration) == pytest.approx(exact)


# --- closeness ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "train", "held_out"), [(1, 1, 1), (2, 3, 2), (31, 13, 29)])
def test_closeness_is_that_of_a_loop(samples: int, train: int, held_out: int) -> None:
    rows, size = bytes_of(samples, 64, 0), min(train, held_out)
    sides = [bytes_of(train, 64, 1), bytes_of(held_out, 64, 2)]
    found = references(*sides).closeness(rows)
    assert found.closer_to_train.n == samples
    assert 0 < found.p_value <= 1
    if train == held_out == size:
        to = [np.linalg.norm(rows[:, None].astype(float) - side, axis=2).min(1) for side in sides]
        assert found.closer_to_train.value == np.mean(to[0] < to[1])
        assert found.distance_ratio == pytest.approx(to[0].mean() / to[1].mean())


def test_closeness_does_not_depend_on_order_or_on_the_split_into_pieces(small_pieces) -> None:
    samples, train, held_out = drawn(41, 0), drawn(37, 1), drawn(37, 2)
    one = references(train, held_out).closeness(samples)
    other = references(train[::-1], held_out[::-1]).closeness(samples[::-1])
    assert one.closer_to_train == other.closer_to_train
    assert one.p_value == other.p_value
    assert one.distance_ratio == pytest.approx(other.distance_ratio)


def test_swapped_references_swap_the_share() -> None:
    samples, train, held_out = drawn(41, 0), drawn(37, 1), drawn(37, 2)
    one = references(train, held_out).closeness(samples)
    other = references(held_out, train).closeness(samples)
    assert one.closer_to_train.value + other.closer_to_train.value == pytest.approx(1)
    assert one.distance_ratio * other.distance_ratio == pytest.approx(1)


def test_images_in_both_sets_are_shared_fairly() -> None:
    both = drawn(400, 1)
    shares = [references(both, both, s).closeness(both).closer_to_train.value for s in range(5)]
    assert abs(np.mean(shares) - 0.5) < 5 * np.sqrt(0.25 / 2000)
    assert references(both, both).closeness(both).distance_ratio is None


def test_one_image_that_all_samples_resemble_proves_nothing() -> None:
    train, held_out = drawn(50, 1), drawn(50, 2)
    samples = np.repeat(train[:1], 200, axis=0)
    found = references(train, held_out).closeness(samples)
    assert found.closer_to_train.ci_low > 0.9  # a binomial test would be sure
    assert found.p_value == pytest.approx(0.5, abs=0.05)


def test_units_and_not_images_are_permuted() -> None:
    """Of 3 training patients one is met by each of 60 samples: 1 chance in 2, not in 2^60."""
    train, held_out = drawn(60, 1), drawn(60, 2)
    train[:20] = np.clip(train[:1].astype(int) + np.arange(20)[:, None] // 2, 0, 255)
    units = np.arange(60) // 20
    samples = np.repeat(train[:20], 3, axis=0)
    by_image = references(train, held_out).closeness(samples)
    by_unit = References(train, held_out, units, units, 0).closeness(samples)
    assert by_image.closer_to_train.value == by_unit.closer_to_train.value == 1
    assert by_image.p_value < SIGNIFICANT
    assert by_unit.p_value == pytest.approx(0.5, abs=0.05)


def test_p_values_of_honest_samples_are_as_rare_as_they_say() -> None:
    ps = [
        references(drawn(40, 3 * s), drawn(40, 3 * s + 1), s)
        .closeness(drawn(60, 3 * s + 2))
        .p_value
        for s in range(150)
    ]
    for level in (0.05, 0.2):
        assert np.sum(np.array(ps) <= level) <= binom.isf(1e-5, 150, level)
    assert np.mean(ps) < 0.6  # and no rarer than they need be


def test_a_model_that_leans_on_all_its_training_images_is_close_to_them() -> None:
    train, held_out = drawn(300, 1), drawn(300, 2)
    leaning = np.clip(train + 0.4 * (drawn(300, 3) - 128.0), 0, 255).astype(np.uint8)
    found = references(train, held_out).closeness(leaning)
    assert found.p_value < SIGNIFICANT
    assert found.distance_ratio < 1


# --- copies ------------------------------------------------------------------------------------


def test_relative_distance_is_one_where_all_are_equal() -> None:
    distances = np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 4.0, 4.0]])
    np.testing.assert_array_equal(relative_distances(distances), [1, 0.5, 0])


@pytest.mark.parametrize("share", [0.02, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_planted_copies_are_found(share: float, seed: int) -> None:
    train, samples = drawn(900, 10 * seed), drawn(1000, 10 * seed + 1)
    planted = int(share * 1000)
    samples[:planted] = noisy_copies(train, planted, seed)
    found = references(train, drawn(400, 10 * seed + 2), seed).copies(samples, 1000)
    assert found.p_value < SIGNIFICANT
    assert planted <= found.found <= planted + 15


@pytest.mark.parametrize("seed", range(20))
def test_fresh_handwritten_digits_are_no_copies_and_planted_ones_are(seed: int) -> None:
    pixels = np.concatenate([digits.load(split).pixels for split in ("train", "test")])
    rng = np.random.default_rng(seed)
    samples, held_out, train = np.split(rng.permutation(pixels.reshape(-1, 64)), [360, 720])
    honest = references(train, held_out, seed)
    assert honest.closeness(samples).p_value >= SIGNIFICANT
    assert honest.copies(samples, 1000).p_value >= SIGNIFICANT
    samples[:36] = noisy_copies(train, 36, seed)
    assert honest.copies(samples, 1000).p_value < SIGNIFICANT


@pytest.mark.parametrize("blur", [0.5, 0.9])
def test_blurred_samples_are_near_everything_and_yet_no_copies(blur: float) -> None:
    train, held_out, samples = drawn(600, 1), drawn(300, 2), drawn(500, 3)
    samples = ((1 - blur) * samples + blur * samples.mean(0)).astype(np.uint8)
    found = references(train, held_out).copies(samples, 1000)
    assert found.p_value >= SIGNIFICANT


def test_siblings_of_one_patient_do_not_hide_copies() -> None:
    """Each training image has a twin of its unit: compared with it, every real one is a copy."""
    train = np.repeat(drawn(300, 1), 2, axis=0)
    samples = drawn(500, 3)
    samples[:40] = noisy_copies(train[::2], 40, 0)
    held_out = drawn(300, 2)
    known = References(train, held_out, np.arange(600) // 2, np.arange(300), 0)
    assert known.copies(samples, 1000).p_value < SIGNIFICANT
    assert references(train, held_out).copies(samples, 1000).found == 0


@pytest.mark.parametrize(("train", "enough"), [(1, False), (2, False), (3, True)])
def test_copies_need_training_images_to_compare_with(train: int, enough: bool) -> None:
    found = references(drawn(train, 0), drawn(2, 1)).copies(drawn(5, 2), 10)
    assert (found is not None) == enough


# --- the part ----------------------------------------------------------------------------------

part = Memorization(held_out=["test"], max_samples=1000, max_references=900, pairs=3)


def evaluate(memorization: Memorization = part, **changed: object) -> Metrics:
    evidence = {
        "synthetic": as_images(drawn(700, 0)),
        "real_train": as_images(drawn(600, 1)),
        "real_test": as_images(drawn(300, 2)),
        "train_classifier": None,
    }
    metrics = Metrics()
    memorization(Evidence(**(evidence | changed)), metrics)  # type: ignore[arg-type]
    return metrics


def with_copies() -> Images:
    samples = drawn(700, 0)
    samples[:70] = noisy_copies(drawn(600, 1), 70, 0)
    return as_images(samples)


FLAGGED = "memorization/flagged"
NAMES = [
    *(f"memorization/closer_to_train.pixels{end}" for end in ("", ".ci_low", ".ci_high")),
    *(f"memorization/{name}.pixels" for name in ("p_value", "distance_ratio")),
    *(f"memorization/copies{end}.pixels" for end in ("", "_expected", "_p_value")),
]


def test_an_honest_model_is_not_flagged_and_a_memoriser_is() -> None:
    honest, memoriser = evaluate(), evaluate(synthetic=with_copies())
    assert set(honest.values) == {*NAMES, FLAGGED}
    assert honest.values[FLAGGED] == 0
    assert memoriser.values[FLAGGED] == 1
    assert all(entry["private"] for entry in honest.meta.values())
    assert all(np.isfinite(value) for value in memoriser.values.values())


def test_another_space_has_metrics_of_its_own() -> None:
    # The same vectors on another scale, of which no metric must depend.
    features = replace(pixel_features((1, 8, 8)), name="scaled")
    again = Memorization(
        held_out=["test"], max_samples=1000, max_references=900, pairs=3, features=features
    )
    values = evaluate(again, synthetic=with_copies()).values
    assert set(values) == {*NAMES, *(name.replace("pixels", "scaled") for name in NAMES), FLAGGED}
    for name in NAMES:
        scaled = name.replace("pixels", "scaled")
        assert values[scaled] == pytest.approx(values[name], rel=1e-6)


def test_test_images_from_elsewhere_flag_nothing_where_the_public_model_says_so() -> None:
    elsewhere = as_images((drawn(300, 2) // 2).astype(np.uint8))
    alone = evaluate(real_test=elsewhere)
    assert alone.values[FLAGGED] == 1
    controlled = evaluate(real_test=elsewhere, public_only=as_images(drawn(700, 3)))
    assert controlled.values["memorization/p_value.pixels.public_only"] < SIGNIFICANT
    assert controlled.values[FLAGGED] == 0
    caught = evaluate(
        real_test=elsewhere, public_only=as_images(drawn(700, 3)), synthetic=with_copies()
    )
    assert caught.values[FLAGGED] == 1


def test_held_out_images_are_of_the_first_split_that_there_is() -> None:
    splits = {"id_val": as_images(drawn(300, 2))}
    elsewhere = as_images((drawn(300, 2) // 2).astype(np.uint8))
    preferring = Memorization(
        held_out=["id_val", "test"], max_samples=1000, max_references=900, pairs=3
    )
    found = evaluate(preferring, real_test=elsewhere, other_tests=splits)
    assert found.values == evaluate().values
    with pytest.raises(UserError, match="held_out=.*val_2"):
        evaluate(Memorization(held_out=["val_2"], max_samples=1, max_references=1, pairs=1))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_images(n: int, tmp_path: Path) -> None:
    few = {
        "synthetic": as_images(drawn(n, 0)),
        "real_train": as_images(drawn(n, 1)),
        "real_test": as_images(drawn(n, 2)),
    }
    values = evaluate(local_dir=tmp_path / "local", **few).values
    assert values[FLAGGED] == 0
    assert all(np.isfinite(value) for value in values.values())
    assert (tmp_path / "local" / "nearest_pairs.png").is_file()


def test_no_more_images_are_looked_at_than_asked() -> None:
    seen: list[int] = []
    features = pixel_features((1, 8, 8))
    inner = features.network.forward

    def spy(pixels):
        seen.append(len(pixels))
        return inner(pixels)

    features.network.forward = spy  # type: ignore[method-assign]
    units = np.arange(600) // 6
    bounded = Memorization(
        held_out=["test"], max_samples=31, max_references=60, pairs=1, features=features
    )
    metrics = evaluate(bounded, real_train=as_images(drawn(600, 1), units))
    assert sorted(seen) == [31, 60, 60]
    assert metrics.meta[FLAGGED]["n"] == 31


@pytest.mark.parametrize("key", ["max_samples", "max_references", "pairs"])
def test_numbers_are_checked(key: str) -> None:
    options = {"max_samples": 1, "max_references": 1, "pairs": 1, key: 0}
    with pytest.raises(UserError, match=f"evaluator.memorization.{key}=0"):
        Memorization(held_out=["test"], **options)


# --- the sheet ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_sheet_is_only_for_who_ran_it(channels: int, tmp_path: Path) -> None:
    def coloured(vectors: np.ndarray) -> Images:
        return as_images(np.repeat(vectors, channels, axis=1))

    local = tmp_path / "local"
    local.mkdir(mode=0o755)
    evaluate(
        local_dir=local,
        synthetic=coloured(drawn(7, 0)),
        real_train=coloured(drawn(60, 1)),
        real_test=coloured(drawn(30, 2)),
    )
    assert [path.name for path in local.iterdir()] == ["nearest_pairs.png"]
    assert stat.S_IMODE(local.stat().st_mode) == 0o700
    assert stat.S_IMODE((local / "nearest_pairs.png").stat().st_mode) == 0o600
    with Image.open(local / "nearest_pairs.png") as sheet:
        assert min(sheet.size) > 100


def test_nothing_is_written_where_nothing_may_be(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate()
    assert list(tmp_path.iterdir()) == []


def test_the_sheet_has_the_most_singular_pairs(tmp_path: Path, monkeypatch) -> None:
    written = []
    monkeypatch.setattr(
        "dp_synth.metrics.memorization.write_nearest_pairs",
        lambda pairs, path: written.extend(pairs),
    )
    samples, train = drawn(100, 0), drawn(80, 1)
    samples[[17, 71]] = train[[5, 50]]
    evaluate(local_dir=tmp_path, synthetic=as_images(samples), real_train=as_images(train))
    assert len(written) == 3
    for pair in written[:2]:
        np.testing.assert_array_equal(pair.sample, pair.train)
        assert pair.to_train == 0
    last = written[2]
    for image, distance in ((last.train, last.to_train), (last.held_out, last.to_held_out)):
        exact = np.linalg.norm(last.sample.astype(float) - image.astype(float))
        assert distance == pytest.approx(exact)
