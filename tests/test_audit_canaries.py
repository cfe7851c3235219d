"""Canaries in the real private step: they are planted as stated, found as theory says, and kept."""

import json
from dataclasses import replace

import lightning
import numpy as np
import pytest
import torch
from conftest import Recorder, refusal, tiny_images, tiny_module, tiny_net
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from scipy import stats

from dp_synth import audit
from dp_synth.checkpoints import PeriodicCheckpoint, newest_first
from dp_synth.data.folder import read_image_folder
from dp_synth.data.images import Images
from dp_synth.data.module import ImageDataModule
from dp_synth.errors import UserError
from dp_synth.fitting import build_trainer
from dp_synth.networks import choose_trainable
from dp_synth.privacy.audit.canaries import CANARIES_FILE, Canaries
from dp_synth.privacy.audit.canary_audit import CanaryAudit, closeness_to_samples
from dp_synth.privacy.audit.canary_callback import CanaryCallback
from dp_synth.privacy.audit.one_run import one_run_bound
from dp_synth.privacy.audit.record import table, write_record
from dp_synth.privacy.callback import PrivacyEngineCallback
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan

FOUND, GRADIENTS, IMAGES, STEPS = 11, 600, 4, 3
N = FOUND + GRADIENTS + IMAGES
# Every other one is in, so that no rule of guessing is wrong by the coins alone.
CANARIES = replace(
    Canaries.draw(GRADIENTS, IMAGES, tiny_images(FOUND)),
    gradient_coins=np.arange(GRADIENTS) % 2 == 0,
)
PLAN = PrivacyPlan(
    eps=100,
    delta=1e-4,
    max_grad_norm=0.5,
    batch_size=N // 2,
    steps=STEPS,
    num_examples=N,
    noise_multiplier=1.5,
)
REPEATABLE = replace(PLAN, unsafe_repeatable_randomness=7)
IMPOSSIBLE = 1e-9


class StopAfter(Callback):
    """Ends a sitting."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *arguments):
        trainer.should_stop = trainer.global_step == self.steps


def trained(plan, trainer_cfg, canaries=CANARIES, images=None, stop=None, directory=None, **more):
    """The canaries' callback and the module after the plan's steps, or a sitting of them."""
    module = tiny_module(plan, **more)
    callback = CanaryCallback(canaries, plan, draws=2)
    callbacks = [PrivacyEngineCallback(plan), callback]
    resume_from = None
    if directory is not None:
        callbacks.append(PeriodicCheckpoint(directory, every=1))
        resume_from = next(iter(newest_first(directory)), None)
    if stop is not None:
        callbacks.append(StopAfter(stop))
    trainer = build_trainer(trainer_cfg, max_steps=plan.steps, callbacks=callbacks, logger=False)
    planted = canaries.insert(tiny_images(FOUND) if images is None else images)
    assert planted.num_examples == plan.num_examples
    data = ImageDataModule(
        planted, lambda steps_taken: plan.batches(module.randomness, first_step=steps_taken)
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume_from)
    return callback, module


def gradients(module):
    """What reached the optimizer, [steps, weights]."""
    return torch.stack(module.optimizers().optimizer.original_optimizer.seen)


def test_a_canary_adds_max_grad_norm_at_one_coordinate_when_in_and_selected(trainer_cfg):
    """Beside the same run with every coin the other way about, all else being equal."""
    nobody = replace(CANARIES, gradient_coins=np.zeros(GRADIENTS, dtype=bool))
    _, one = trained(REPEATABLE, trainer_cfg)
    _, other = trained(REPEATABLE, trainer_cfg, nobody)
    added = (gradients(one) - gradients(other)) * PLAN.batch_size
    batches = list(REPEATABLE.batches(REPEATABLE.randomness(0)))
    for step, batch in enumerate(batches):
        selected = np.isin(np.arange(N - GRADIENTS, N), batch)
        expected = int((selected & CANARIES.gradient_coins).sum())
        moved = added[step][added[step].abs() > 1e-3]
        assert len(moved) == expected > 0
        torch.testing.assert_close(moved, torch.full((expected,), 0.5), rtol=1e-3, atol=1e-4)
    assert len(torch.unique(torch.nonzero(added.abs() > 1e-3)[:, 1])) <= GRADIENTS


def test_scores_are_the_canarys_contributions_and_the_planned_noise(trainer_cfg):
    callback, _ = trained(PLAN, trainer_cfg)
    scores = callback.scores.numpy() / PLAN.max_grad_norm
    spread = PLAN.noise_multiplier * STEPS**0.5
    out = scores[~CANARIES.gradient_coins] / spread
    assert stats.kstest(out, "norm").pvalue > IMPOSSIBLE
    assert stats.kstest(out * 3, "norm").pvalue < IMPOSSIBLE
    # Each step adds 1 with probability q, so that the sum is binomial.
    q = PLAN.sample_rate
    inside = scores[CANARIES.gradient_coins]
    error = ((spread**2 + STEPS * q * (1 - q)) / len(inside)) ** 0.5
    assert abs(inside.mean() - STEPS * q) < 6 * error


def test_no_private_image_has_any_influence_on_the_scores(trainer_cfg):
    one, _ = trained(REPEATABLE, trainer_cfg)
    other, _ = trained(REPEATABLE, trainer_cfg, images=tiny_images(FOUND, seed=5))
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-3)
    assert one.scores.std() > 0.5


@pytest.mark.parametrize("trainable", ["all", "attention"])
def test_without_noise_the_bound_reaches_its_ceiling_and_refutes_a_claim(trainer_cfg, trainable):
    quiet = replace(PLAN, batch_size=N, noise_multiplier=1e-4)
    net = tiny_net(block_out_channels=[8, 16])
    choose_trainable(net, trainable)
    callback, _ = trained(quiet, trainer_cfg, net=net)
    bound = one_run_bound(callback.scores.numpy(), CANARIES.gradient_coins, delta=1e-4)
    assert bound.eps_lower >= 0.9 * bound.ceiling > replace(quiet, noise_multiplier=3.0).epsilon()


def test_bounds_stay_below_the_claim_and_find_half_of_it(trainer_cfg):
    """Real runs, their canaries in groups: each group is an audit of its own."""
    plan = replace(PLAN, batch_size=N, noise_multiplier=1.2)
    claim, bounds, size = plan.epsilon(), [], 60
    for _ in range(3):
        canaries = Canaries.draw(GRADIENTS, IMAGES, tiny_images(FOUND))
        callback, _ = trained(plan, trainer_cfg, canaries)
        for scores, coins in zip(
            np.split(callback.scores.numpy(), GRADIENTS // size),
            np.split(canaries.gradient_coins, GRADIENTS // size),
            strict=True,
        ):
            bounds.append(one_run_bound(scores, coins, delta=plan.delta).eps_lower)
        whole = one_run_bound(callback.scores.numpy(), canaries.gradient_coins, delta=plan.delta)
        assert 0.1 * claim < whole.eps_lower < claim
    failed = sum(bound > claim for bound in bounds)
    assert failed <= stats.binom.isf(1e-6, len(bounds), 0.05)
    assert np.mean(bounds) > 0


def test_large_noise_leaves_nothing_to_find(trainer_cfg):
    callback, _ = trained(replace(PLAN, noise_multiplier=50.0), trainer_cfg)
    # Three rules, 5 % in all: this is another coin, tossed at one in a million.
    bound = one_run_bound(
        callback.scores.numpy(), CANARIES.gradient_coins, delta=1e-4, confidence=1 - 1e-6
    )
    assert bound.eps_lower == 0


def test_a_resumed_run_goes_on_with_its_scores(trainer_cfg, tmp_path):
    whole, _ = trained(REPEATABLE, trainer_cfg, directory=tmp_path / "whole")
    trained(REPEATABLE, trainer_cfg, directory=tmp_path / "parts", stop=1)
    parts, _ = trained(REPEATABLE, trainer_cfg, directory=tmp_path / "parts")
    torch.testing.assert_close(parts.scores, whole.scores)
    assert torch.equal(parts.losses_before, whole.losses_before)
    stored = torch.load(newest_first(tmp_path / "parts")[0], weights_only=True)
    assert torch.equal(stored["callbacks"]["CanaryCallback"]["scores"], parts.scores)


def test_a_run_does_not_resume_with_other_canaries(trainer_cfg, tmp_path):
    trained(REPEATABLE, trainer_cfg, directory=tmp_path, stop=1)
    other = replace(CANARIES, gradient_coins=~CANARIES.gradient_coins)
    assert "other canaries" in refusal(trained, REPEATABLE, trainer_cfg, other, directory=tmp_path)


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("units", [None, [5, 5, 2, 2, 2, 9, 9]])
def test_canaries_count_in_n_and_only_those_that_are_in_are_there(count, units):
    images = tiny_images(7)
    if units is not None:
        images = replace(images, units=np.array(units), missing=2)
    canaries = Canaries.draw(5, count, images)
    planted = canaries.insert(images)
    assert len(canaries) == 5 + count
    assert planted.num_examples == images.num_examples + 5 + count
    inside = int(canaries.image_coins.sum())
    assert len(planted) == 7 + inside and planted.num_units == images.num_units + inside
    np.testing.assert_array_equal(planted.pixels[:7], images.pixels)
    np.testing.assert_array_equal(planted.pixels[7:], canaries.pixels[canaries.image_coins])
    np.testing.assert_array_equal(planted.labels[7:], canaries.labels[canaries.image_coins])
    if units is not None:
        assert len(np.unique(planted.units[7:])) == inside
        assert not set(planted.units[7:]) & set(units)


def test_image_canaries_are_public_images_where_there_are_enough_of_the_right_shape():
    private, public = tiny_images(3, classes=2), tiny_images(20, seed=1)
    known = {image.tobytes() for image in public.pixels}
    drawn = Canaries.draw(0, 20, private, public)
    assert {image.tobytes() for image in drawn.pixels} == known
    assert set(drawn.labels) == {0, 1}
    large = Images(np.zeros((30, 8, 8, 1), np.uint8), np.zeros(30, np.int64), ("a",))
    for unfit in (None, public.select(range(19)), large):
        drawn = Canaries.draw(0, 20, private, unfit)
        assert drawn.pixels.shape == (20, 4, 4, 1)
        assert not known & {image.tobytes() for image in drawn.pixels}


def test_coins_are_fair_and_secret():
    lightning.seed_everything(0)
    one = Canaries.draw(1000, 1000, tiny_images())
    lightning.seed_everything(0)
    other = Canaries.draw(1000, 1000, tiny_images())
    for coins in (one.gradient_coins, one.image_coins, one.gradient_coins ^ other.gradient_coins):
        assert stats.binomtest(int(coins.sum()), 1000).pvalue > IMPOSSIBLE
    assert one.fingerprint != other.fingerprint


def test_canaries_survive_on_disk_for_their_owner_alone(tmp_path):
    path = tmp_path / "local" / CANARIES_FILE
    CANARIES.save(path)
    assert Canaries.load(path).fingerprint == CANARIES.fingerprint
    assert path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    whole = path.read_bytes()
    for damaged in (b"", b"nothing", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert "damaged" in refusal(Canaries.load, path)
    np.savez(path, pixels=CANARIES.pixels)
    assert "damaged" in refusal(Canaries.load, path)
    path.unlink()
    assert "missing" in refusal(Canaries.load, path)


@pytest.mark.parametrize("seed", range(3))
def test_closeness_to_samples_is_to_the_nearest_of_the_same_class(seed):
    images, samples = tiny_images(13, seed=seed), tiny_images(17, seed=seed + 10)
    samples = Images(samples.pixels, samples.labels, ("b", "c", "z"))
    found = closeness_to_samples(images, samples)
    for image, label, score in zip(images.pixels, images.labels, found, strict=True):
        same = [
            p.astype(float)
            for p, k in zip(samples.pixels, samples.labels, strict=True)
            if samples.classes[k] == images.classes[label]
        ]
        expected = min((np.linalg.norm(image - p) for p in same), default=np.inf)
        assert score == pytest.approx(-expected)


SETTINGS = {"gradient_canaries": 40, "image_canaries": 60, "confidence": 0.95, "draws": 2}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gradient_canaries", -1),
        ("image_canaries", 0.5),
        ("confidence", 1.0),
        ("confidence", 0.5),
        ("confidence", True),
        ("draws", 0),
    ],
)
def test_settings_that_cannot_work_are_refused(key, value):
    assert f"audit.{key}" in refusal(CanaryAudit, **SETTINGS | {key: value})


def test_an_audit_needs_canaries_privacy_and_room():
    assert "both 0" in refusal(
        CanaryAudit, **SETTINGS | {"gradient_canaries": 0, "image_canaries": 0}
    )
    public = PublicPlan(batch_size=1, steps=1, num_examples=1)
    assert "private run" in refusal(CanaryAudit(**SETTINGS).check, public, tiny_net())
    greedy = CanaryAudit(**SETTINGS | {"gradient_canaries": 10**6})
    assert "audit.gradient_canaries" in refusal(greedy.check, PLAN, tiny_net())
    CanaryAudit(**SETTINGS).check(PLAN, tiny_net())


@pytest.fixture
def audited_run(run_copy):
    """The finished run, as if it had been trained with canaries that its samples repeat."""
    samples = read_image_folder(run_copy.samples_dir)
    auditor = CanaryAudit(**SETTINGS)
    canaries = auditor.plant(run_copy, samples, None)
    coins = np.arange(60) % 2 == 0
    canaries = replace(
        canaries,
        gradient_coins=coins[:40],
        image_coins=coins,
        pixels=np.where(
            coins[:, None, None, None],
            samples.pixels[np.arange(60) % len(samples)],
            255 - samples.pixels[np.arange(60) % len(samples)],
        ),
        labels=samples.labels[np.arange(60) % len(samples)],
    )
    canaries.save(run_copy.local_dir / CANARIES_FILE)
    path = newest_first(run_copy.checkpoints_dir)[0]
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["CanaryCallback"] = {
        "fingerprint": canaries.fingerprint,
        "scores": torch.from_numpy(canaries.gradient_coins).double(),
        "losses_before": torch.zeros(60, dtype=torch.float64),
    }
    torch.save(checkpoint, path)
    cfg = OmegaConf.load(run_copy.config_path)
    target = "dp_synth.privacy.audit.canary_audit.CanaryAudit"
    cfg = OmegaConf.merge(cfg, {"audit": {"_target_": target, **SETTINGS}})
    OmegaConf.save(cfg, run_copy.config_path)
    return run_copy


def test_the_report_says_what_each_attack_shows(audited_run):
    report = CanaryAudit(**SETTINGS).report(audited_run)
    assert set(report) == {"gradient_canaries", "image_canaries.loss", "image_canaries.samples"}
    for found in report.values():
        assert found["private"] and found["confidence"] == 0.95
        assert 0 <= found["eps_lower"] <= found["ceiling"]
        assert 0 <= found["right"] <= found["guesses"] <= found["canaries"]
    assert [found["canaries"] for found in report.values()] == [40, 60, 60]
    for given_away in ("gradient_canaries", "image_canaries.samples"):
        assert report[given_away]["eps_lower"] == report[given_away]["ceiling"] > 0
    json.dumps(report, allow_nan=False)


def test_what_is_not_there_is_left_out_of_the_report(audited_run):
    audited_run.samples_dir.rename(audited_run.path / "elsewhere")
    report = CanaryAudit(**SETTINGS).report(audited_run)
    assert set(report) == {"gradient_canaries", "image_canaries.loss"}
    for checkpoint in newest_first(audited_run.checkpoints_dir):
        checkpoint.unlink()
    assert "no checkpoint" in refusal(CanaryAudit(**SETTINGS).report, audited_run)


def test_the_audit_command_attacks_the_canaries_too(command, audited_run):
    outcome = command(
        audit,
        f"run={audited_run.path}",
        "membership.max_images=50",
        "membership.draws=2",
        "evaluator=none",
    )
    assert outcome.code == 0, outcome.err
    attacks = json.loads((audited_run.path / "audit.json").read_text())["attacks"]
    assert len(attacks) == 4
    assert "canaries in the gradients" in outcome.out and "40 canaries" in outcome.out
    assert "cannot refute the claim" in outcome.out


@pytest.mark.parametrize(
    ("eps_lower", "ceiling", "verdict"),
    [(3.0, 5.0, "CLAIM IS WRONG"), (1.0, 5.0, "could have refuted"), (1.0, 1.5, "cannot refute")],
)
def test_the_record_says_what_canaries_mean_for_the_claim(tmp_path, eps_lower, ceiling, verdict):
    found = {"canaries": 9, "guesses": 8, "right": 7, "eps_lower": eps_lower, "ceiling": ceiling}
    statement = {"guarantee": "stated", "eps": 2.0, "delta": 1e-4}
    attacks = {"gradient_canaries": found | {"confidence": 0.95}}
    record = write_record(tmp_path / "audit.json", statement, attacks=attacks)
    assert verdict in table(record)
    # Another attack is added to it; a run that claims nothing is refuted by nothing.
    statement = statement | {"eps": None}
    record = write_record(
        tmp_path / "audit.json",
        statement,
        attacks={"image_canaries.loss": found | {"confidence": 0.95}},
    )
    assert set(record["attacks"]) == {"gradient_canaries", "image_canaries.loss"}
    assert verdict not in table(record) and "nothing" in table(record)


def test_canaries_that_are_planted_once_stay(run_copy):
    auditor = CanaryAudit(**SETTINGS)
    first = auditor.plant(run_copy, tiny_images(), None)
    assert auditor.plant(run_copy, tiny_images(), None).fingerprint == first.fingerprint
    (run_copy.local_dir / CANARIES_FILE).write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        auditor.plant(run_copy, tiny_images(), None)


def test_the_recorder_sees_what_scores_are_made_of(trainer_cfg):
    """The score is read after the step; it is the very number that the optimizer was given."""
    only_out = replace(CANARIES, gradient_coins=np.zeros(GRADIENTS, dtype=bool))
    callback, module = trained(
        replace(REPEATABLE, batch_size=1, noise_multiplier=3.0),
        trainer_cfg,
        only_out,
        optimizer=lambda parameters: Recorder(parameters, lr=0.1),
    )
    values = set(np.round(gradients(module).double().sum(0).numpy(), 3))
    near = np.round(callback.scores.numpy(), 3)
    # Batches have hardly ever a real image: then what is at a coordinate is noise, and so the score.
    assert np.mean([value in values for value in near]) > 0.5
