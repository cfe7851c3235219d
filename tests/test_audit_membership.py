"""Membership inference: rates and intervals against slow counts and known laws; the audit command."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import refusal, tiny_diffusion, tiny_images, tiny_net
from scipy import stats
from sklearn.metrics import roc_auc_score

from dp_synth import audit
from dp_synth.privacy.audit.losses import mean_losses
from dp_synth.privacy.audit.membership import (
    auc,
    membership,
    roc_ceiling,
    roc_eps_lower_bound,
    true_positive_rate,
    unit_means,
)
from dp_synth.runs import Run

REPETITIONS = 300


def normal(count, shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(shift, size=count)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (13, 5), (40, 31)])
def test_the_area_counts_pairs_and_ties_half(n, m):
    rng = np.random.default_rng(n * m)
    members, others = rng.integers(0, 5, n) + 0.0, rng.integers(0, 5, m) + 0.0
    pairs = [(a > b) + 0.5 * (a == b) for a in members for b in others]
    estimate = auc(members, others)
    assert estimate.value == pytest.approx(np.mean(pairs))
    labels = np.r_[np.ones(n), np.zeros(m)]
    assert estimate.value == pytest.approx(roc_auc_score(labels, np.r_[members, others]))
    assert 0 <= estimate.ci_low <= estimate.value <= estimate.ci_high <= 1
    assert estimate.ci_high - estimate.ci_low > 0


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.5])
@pytest.mark.parametrize(("n", "m"), [(30, 30), (80, 25)])
def test_the_interval_of_the_area_covers_as_often_as_it_says(shift, n, m):
    truth = stats.norm.cdf(shift / math.sqrt(2))
    covered = 0
    for seed in range(REPETITIONS):
        estimate = auc(normal(n, shift, seed), normal(m, 0.0, seed + 10_000))
        covered += estimate.ci_low <= truth <= estimate.ci_high
    # Hanley's and McNeil's variance is near the true one, not equal to it.
    assert covered >= stats.binom.ppf(1e-6, REPETITIONS, 0.93)
    assert covered < REPETITIONS


@pytest.mark.parametrize("m", [9, 10, 11, 100, 1000])
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.3])
def test_the_true_positive_rate_keeps_the_false_positive_rate(m, rate):
    members, others = normal(57, 1.0), normal(m, seed=1)
    estimate = true_positive_rate(members, others, rate)
    if m * rate < 1 - 1e-9:
        assert estimate is None
        return
    candidates = [t for t in others if (others > t).mean() <= rate + 1e-12]
    assert estimate.value == pytest.approx((members > min(candidates)).mean())
    exact = stats.binomtest(round(estimate.value * 57), 57).proportion_ci(0.95, method="exact")
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize(("eps", "shift"), [(0.0, 0.0), (1.0, None)])
def test_the_bound_from_the_roc_keeps_its_confidence(eps, shift):
    """Each unit in a run of its own: randomised response, and scores that tell nothing."""
    wrong = 0
    for seed in range(REPETITIONS):
        rng = np.random.default_rng(seed)
        truth = np.r_[np.ones(200, bool), np.zeros(200, bool)]
        told = np.where(rng.random(400) < 1 / (1 + math.exp(-eps)), truth, ~truth)
        scores = told + 0.0 if shift is None else rng.normal(size=400)
        wrong += roc_eps_lower_bound(scores[:200], scores[200:], delta=0.0) > eps
    assert wrong <= stats.binom.isf(1e-6, REPETITIONS, 0.05)


def test_the_bound_from_the_roc_finds_either_side():
    """A few members far above all others; a few others far below all members."""
    high = np.r_[normal(900), normal(100) + 9]
    for members, others in ((high, normal(1000, seed=1)), (normal(1000, seed=1), -high)):
        bound = roc_eps_lower_bound(members, others, delta=1e-5)
        assert 1 < bound < roc_ceiling(1000, 1000, delta=1e-5)


def test_no_bound_passes_the_ceiling_and_perfect_scores_reach_it():
    ceilings = []
    for n in (2, 3, 50, 501):
        bound = roc_eps_lower_bound(np.ones(n), np.zeros(n), delta=1e-5)
        ceilings.append(roc_ceiling(n, n, delta=1e-5))
        assert bound == pytest.approx(ceilings[-1])
    assert (np.diff(ceilings) >= 0).all() and ceilings[0] == 0 < ceilings[-1]


def test_delta_and_confidence_lower_the_bound():
    members, others = normal(400, 3.0), normal(400, seed=1)
    for options in ({"delta": 0.05}, {"delta": 0.0, "confidence": 0.999}):
        less = roc_eps_lower_bound(members, others, **options)
        assert less < roc_eps_lower_bound(members, others, delta=0.0)


def test_a_unit_has_the_mean_of_its_images():
    values, units = np.array([1.0, 2.0, 6.0, 5.0]), np.array([9, 4, 9, 4])
    assert unit_means(values, units).tolist() == [3.5, 3.5]
    assert unit_means(values, np.array([3, 2, 1, 1])).tolist() == [5.5, 2.0, 1.0]
    assert unit_means(values, None) is values


@pytest.mark.parametrize("count", [0, 1, 7])
def test_losses_are_those_of_training_and_leave_no_trace(count, monkeypatch):
    from dp_synth.privacy.audit import losses

    net, diffusion, images = tiny_net(), tiny_diffusion(), tiny_images(count)
    net.train()
    torch.manual_seed(3)
    expected_next = torch.rand(1, generator=torch.Generator().manual_seed(3))
    found = mean_losses(net, diffusion, images, draws=5)
    assert torch.equal(torch.rand(1), expected_next) and net.training
    monkeypatch.setattr(losses, "_ROWS", 2)
    np.testing.assert_allclose(mean_losses(net, diffusion, images, draws=5), found, rtol=1e-5)
    if count:  # an image's loss does not depend on the others
        alone = mean_losses(net, diffusion, images.select([count - 1]), draws=5)
        np.testing.assert_allclose(alone, found[-1:], rtol=1e-5)


def test_losses_approach_the_mean_of_the_law():
    net, diffusion, images = tiny_net(), tiny_diffusion(), tiny_images(2)
    few = mean_losses(net, diffusion, images, draws=60, seed=1)
    many = mean_losses(net, diffusion, images, draws=300, seed=2)
    np.testing.assert_allclose(few, many, rtol=0.2)


def test_a_model_that_knows_its_images_by_heart_is_found_out():
    """What a real leak looks like: training on four images alone, many times."""
    net, diffusion, images = tiny_net(), tiny_diffusion(), tiny_images(40)
    known = images.select(range(4))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.from_numpy(known.pixels).permute(0, 3, 1, 2) / 127.5 - 1
    for _ in range(150):
        t = torch.randint(0, 50, (4,), generator=generator)
        noise = torch.randn(pixels.shape, generator=generator)
        optimizer.zero_grad()
        diffusion.row_loss(net)(pixels, noise, t, torch.from_numpy(known.labels)).mean().backward()
        optimizer.step()
    losses = mean_losses(net, diffusion, images, draws=50)
    assert membership(-losses[:4], -losses[4:], delta=1e-3).auc.value > 0.9


QUICK = (
    "membership.max_images=100",
    "membership.draws=3",
    "evaluator.classifier.steps=2",
    "evaluator.memorization.max_samples=20",
    "evaluator.memorization.max_references=30",
)


def test_the_command_reports_beside_the_claim(command, run_copy):
    looks = len(run_copy.statement()["unaccounted_looks"])
    outcome = command(audit, f"run={run_copy.path}", *QUICK)
    assert outcome.code == 0, outcome.err
    record = json.loads((run_copy.path / "audit.json").read_text())
    found = record["attacks"]["membership.loss"]
    assert record["private"] and found["private"]
    assert record["claimed"]["eps"] == run_copy.statement()["eps"]
    assert 0 <= found["eps_lower"] <= found["ceiling"]
    assert found["tpr_at_fpr"]["0.001"] is None  # 100 held-out images cannot tell
    assert found["tpr_at_fpr"]["0.1"]["n"] == 100
    assert all(metric["private"] for metric in record["memorization"].values())
    assert "memorization/flagged" in record["memorization"]
    assert "AUC" in outcome.out and "claimed" in outcome.out and "too few" in outcome.out
    assert (run_copy.local_dir / "nearest_pairs.png").is_file()
    assert len(run_copy.statement()["unaccounted_looks"]) == looks + 1


def test_the_look_is_recorded_before_it_is_taken(command, run_copy, monkeypatch):
    def unreadable(*arguments):
        raise OSError(5, "Input/output error", "image.png")

    looks = len(run_copy.statement()["unaccounted_looks"])
    monkeypatch.setattr(audit, "load_images", unreadable)
    assert command(audit, f"run={run_copy.path}", *QUICK).code == 2
    assert len(run_copy.statement()["unaccounted_looks"]) == looks + 1
    assert not (run_copy.path / "audit.json").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("membership.draws=0", "membership.draws"),
        ("membership.max_images=0.5", "membership.max_images"),
        ("membership.confidence=0.3", "membership.confidence"),
        ("membership.held_out=[nowhere]", "membership.held_out"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_looked_at(
    command, run_copy, override, named
):
    before = run_copy.statement()
    outcome = command(audit, f"run={run_copy.path}", *QUICK, override)
    assert outcome.code == 2 and named in outcome.err and "Traceback" not in outcome.err
    assert run_copy.statement() == before


def test_a_run_without_a_model_cannot_be_audited(finished_run, tmp_path):
    (tmp_path / "config.yaml").write_bytes(finished_run.config_path.read_bytes())
    assert "no model/" in refusal(audit.audit_run, Run(tmp_path), None)
