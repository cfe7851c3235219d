"""The assembled private step (module, engine, noising optimizer, Lightning) keeps its promises."""

import random
from dataclasses import replace

import lightning
import numpy as np
import pytest
import torch
from conftest import Recorder, tiny_images, tiny_module, tiny_net, weights_of
from lightning.pytorch.loggers import CSVLogger
from scipy import stats

from dp_synth.data.module import Batch, ImageDataModule
from dp_synth.data.pixels import to_float
from dp_synth.errors import UserError
from dp_synth.fitting import fit
from dp_synth.networks import choose_trainable
from dp_synth.privacy.callback import PrivacyEngineCallback
from dp_synth.privacy.clipping.opacus import OpacusEngine
from dp_synth.privacy.plan import PrivacyPlan, PublicPlan
from dp_synth.privacy.randomness import PrivateRandomness, RepeatablePrivateRandomness

N, STEPS = 11, 3
PLAN = PrivacyPlan(
    eps=10,
    delta=1e-2,
    max_grad_norm=0.5,
    batch_size=5,
    steps=STEPS,
    num_examples=N,
    multiplicity=3,
    noise_multiplier=0.7,
)
REPEATABLE = replace(PLAN, unsafe_repeatable_randomness=7)
# Far below any critical value of a two-sided test: a right implementation never fails.
IMPOSSIBLE = 1e-9


class NobodyIn(PrivateRandomness):
    """Secret randomness under which every batch is empty, so that gradients are noise alone."""

    def selection(self, step, num_units):
        return np.ones(num_units)


class Chosen(RepeatablePrivateRandomness):
    """Repeatable randomness that lets exactly some units into every batch."""

    def __init__(self, seed, units):
        super().__init__(seed)
        self.units = units

    def selection(self, step, num_units):
        uniforms = np.ones(num_units)
        uniforms[self.units] = 0.0
        return uniforms


class Without(RepeatablePrivateRandomness):
    """Repeatable randomness in which one unit's contribution is zero; all else is the same."""

    def __init__(self, seed, unit):
        super().__init__(seed)
        self.unit = unit

    def selection(self, step, num_units):
        uniforms = super().selection(step, num_units)
        uniforms[self.unit] = 1.0
        return uniforms


def trained(plan, trainer_cfg, *, images=None, micro_batch_size=512, logger=None, **options):
    """A module after the plan's steps."""
    module = tiny_module(plan, **options)
    trainer_cfg.micro_batch_size = micro_batch_size
    images = tiny_images(N) if images is None else images
    fit(module, images, plan, trainer_cfg, caption="fit", logger=logger)
    return module


def gradients(module):
    """What reached the optimizer, [steps, weights]."""
    return torch.stack(module.optimizers().optimizer.original_optimizer.seen)


def callback_of(module):
    (found,) = [c for c in module.trainer.callbacks if isinstance(c, PrivacyEngineCallback)]
    return found


def standard_noise(module, plan):
    """Gradients of empty batches in units of the planned noise, [steps, weights]."""
    return gradients(module) * plan.batch_size / (plan.noise_multiplier * plan.max_grad_norm)


@pytest.mark.parametrize("micro_batch_size", [None, 7, 2])
def test_one_example_moves_the_sum_by_at_most_max_grad_norm(trainer_cfg, micro_batch_size):
    """The noise is the same in both runs, and a rate of 0 keeps the weights the same."""
    whole = gradients(trained(REPEATABLE, trainer_cfg, micro_batch_size=micro_batch_size))
    largest = 0.0
    for unit in (0, N - 1):
        randomness = Without(7, unit)
        other = trained(
            REPEATABLE, trainer_cfg, micro_batch_size=micro_batch_size, randomness=randomness
        )
        moved = ((whole - gradients(other)) * PLAN.batch_size).norm(dim=1)
        selected = [
            RepeatablePrivateRandomness(7).selection(step, N)[unit] < PLAN.sample_rate
            for step in range(STEPS)
        ]
        assert (moved <= PLAN.max_grad_norm * (1 + 1e-4)).all()
        assert ((moved > 1e-3) == torch.tensor(selected)).all()
        largest = max(largest, float(moved.max()))
    # The bound is met by a clipped example: it is no looser than it should be.
    assert largest == pytest.approx(PLAN.max_grad_norm, rel=1e-3)


def test_a_replaced_image_moves_the_sum_by_at_most_twice_max_grad_norm(trainer_cfg):
    images = tiny_images(N)
    pixels = images.pixels.copy()
    pixels[4] = 0
    blanked = replace(images, pixels=pixels)
    everyone = Chosen(7, list(range(N)))
    one = gradients(trained(REPEATABLE, trainer_cfg, images=images, randomness=everyone))
    other = gradients(trained(REPEATABLE, trainer_cfg, images=blanked, randomness=everyone))
    moved = ((one - other) * PLAN.batch_size).norm(dim=1)
    assert (moved > 1e-3).all() and (moved <= 2 * PLAN.max_grad_norm * (1 + 1e-4)).all()


@pytest.mark.parametrize("noise_multiplier", [0.7, 3.1])
def test_the_noise_that_reaches_the_optimizer_has_the_planned_law(trainer_cfg, noise_multiplier):
    plan = replace(PLAN, noise_multiplier=noise_multiplier)
    noise = standard_noise(trained(plan, trainer_cfg, randomness=NobodyIn()), plan)
    assert noise.shape == (STEPS, sum(p.numel() for p in tiny_net().parameters()))
    for step in noise.numpy():
        assert stats.kstest(step, "norm").pvalue > IMPOSSIBLE
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(step * wrong, "norm").pvalue < IMPOSSIBLE


def test_noise_is_the_same_size_beside_examples_and_in_many_micro_batches(trainer_cfg):
    """Noised minus noiseless sum of the same examples: one draw of noise per logical step."""
    everyone = Chosen(7, list(range(N)))
    quiet = replace(REPEATABLE, noise_multiplier=1e-9)
    clipped = gradients(trained(quiet, trainer_cfg, randomness=everyone))
    for micro_batch_size in (None, 7, 2):
        module = trained(PLAN, trainer_cfg, randomness=everyone, micro_batch_size=micro_batch_size)
        noise = (gradients(module) - clipped) * PLAN.batch_size
        noise /= PLAN.noise_multiplier * PLAN.max_grad_norm
        for step in noise.numpy():
            assert stats.kstest(step, "norm").pvalue > IMPOSSIBLE
            assert stats.kstest(step / 2**0.5, "norm").pvalue < IMPOSSIBLE


def seed_everything():
    lightning.seed_everything(0)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def test_noise_is_secret_and_never_used_twice(trainer_cfg):
    """Equal public and global seeds; noise differs between runs, steps and parameters."""
    draws = []
    for _ in range(2):
        seed_everything()
        module = trained(PLAN, trainer_cfg, randomness=NobodyIn())
        for step in gradients(module):
            parts = step.split([p.numel() for p in module.net.parameters()])
            draws += [part for part in parts if len(part) >= 4]
    firsts = [tuple(part[:4].tolist()) for part in draws]
    assert len(set(firsts)) == len(firsts)


def test_global_seeds_reach_neither_batches_nor_draws(trainer_cfg):
    drawn = []
    for _ in range(2):
        seed_everything()
        randomness = PLAN.randomness(seed=0)
        batches = list(PLAN.batches(randomness))
        drawn.append(torch.tensor(np.concatenate([randomness.selection(0, N), *batches])[:N]))
        module = tiny_module(PLAN, randomness=randomness)
        units = torch.arange(N)
        batch = Batch(units, torch.zeros(N, 1, 4, 4, dtype=torch.uint8), torch.zeros_like(units))
        drawn.append(module.draw_rows(batch, 0)[1].flatten()[:N])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[1], drawn[3])


def test_repeatable_randomness_repeats_whatever_the_global_seeds(trainer_cfg):
    torch.manual_seed(1)
    one = gradients(trained(REPEATABLE, trainer_cfg))
    torch.manual_seed(2)
    other = gradients(trained(REPEATABLE, trainer_cfg))
    assert torch.equal(one, other)
    assert not torch.equal(
        one, gradients(trained(replace(REPEATABLE, unsafe_repeatable_randomness=8), trainer_cfg))
    )


@pytest.mark.parametrize("realised", [1, 4, N])
def test_without_clipping_and_noise_the_step_is_the_ordinary_one(trainer_cfg, realised):
    """Divided by the expected batch size, whatever the realised one is."""
    plan = replace(REPEATABLE, steps=1, noise_multiplier=1e-12, max_grad_norm=1e4)
    randomness = Chosen(7, list(range(realised)))
    found = gradients(trained(plan, trainer_cfg, randomness=randomness))[0]

    module = tiny_module(plan, randomness=randomness)
    images = tiny_images(N)
    pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2)[:realised]
    batch = Batch(torch.arange(realised), pixels, torch.from_numpy(images.labels)[:realised])
    loss = module.diffusion.row_loss(module.net)(*module.draw_rows(batch, step=0))
    (loss.sum() / plan.multiplicity / plan.batch_size).backward()
    expected = torch.cat([p.grad.flatten() for p in module.net.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    # And it is no ordinary step once clipping is on.
    clipped = replace(plan, max_grad_norm=0.01)
    other = gradients(trained(clipped, trainer_cfg, randomness=randomness))[0]
    assert float((other * plan.batch_size).norm()) <= 0.01 * realised * (1 + 1e-4)


def test_an_empty_batch_is_a_step_that_counts_and_moves_the_weights(trainer_cfg):
    before = weights_of(tiny_net())
    module = trained(
        PLAN,
        trainer_cfg,
        randomness=NobodyIn(),
        optimizer=lambda parameters: Recorder(parameters, lr=0.1),
    )
    assert callback_of(module).steps_taken == STEPS
    # Every single weight, since noise is added to every single one.
    assert (weights_of(module.net) != before).all()
    expected = before - 0.1 * gradients(module).sum(0)
    torch.testing.assert_close(weights_of(module.net), expected)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_count_of_steps_is_the_plans(trainer_cfg, steps):
    """Small expected batches: among these steps there are empty ones."""
    plan = replace(PLAN, steps=steps, batch_size=1)
    module = trained(plan, trainer_cfg)
    callback = callback_of(module)
    counts = {
        "lightning": module.trainer.global_step,
        "optimizer": len(gradients(module)),
        "accountant": callback.steps_taken,
        "ema": module.ema.optimization_step,
    }
    assert set(counts.values()) == {steps}, counts
    assert callback.eps == plan.epsilon()
    assert callback.accountant.history == [(plan.noise_multiplier, 1 / N, steps)]


def test_a_step_beyond_the_plan_is_refused_before_it_happens():
    module = tiny_module(PLAN)
    longer = replace(PLAN, steps=STEPS + 2)
    trainer = lightning.Trainer(
        max_steps=longer.steps,
        max_epochs=-1,
        callbacks=[PrivacyEngineCallback(PLAN)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = ImageDataModule(tiny_images(N), lambda first: longer.batches(module.randomness, first))
    with pytest.raises(RuntimeError, match=f"{STEPS} steps are taken"):
        trainer.fit(module, datamodule=data)
    assert len(gradients(module)) == trainer.global_step == STEPS


def test_a_step_that_the_accountant_missed_stops_training(trainer_cfg, monkeypatch):
    monkeypatch.setattr(PrivacyEngineCallback, "_count", lambda self, optimizer: None)
    with pytest.raises(RuntimeError, match="1 optimizer steps but 0 accounted"):
        trained(PLAN, trainer_cfg)


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_the_engines_make_the_same_weights_under_the_same_noise(trainer_cfg, clipping):
    """Opacus' gradients are other code's: a fault in ours would have to be in theirs too."""
    plan = replace(REPEATABLE, multiplicity=1, clipping=clipping)
    weights = {}
    for engine in ("auto", "loop", "opacus"):
        module = trained(
            replace(plan, engine=engine),
            trainer_cfg,
            micro_batch_size=3,
            optimizer=lambda parameters: Recorder(parameters, lr=0.1),
        )
        assert isinstance(module.engine, OpacusEngine) == (engine == "opacus")
        weights[engine] = weights_of(module.net)
    assert (weights["auto"] - weights_of(tiny_net())).abs().max() > 1e-2
    for engine in ("loop", "opacus"):
        torch.testing.assert_close(weights[engine], weights["auto"], rtol=0, atol=1e-6)


def test_a_plan_without_a_noise_multiplier_does_not_train():
    with pytest.raises(ValueError, match="calibrate"):
        PrivacyEngineCallback(replace(PLAN, noise_multiplier=None))


def test_several_processes_are_refused(trainer_cfg):
    trainer_cfg.devices = 2
    with pytest.raises(UserError, match=r"trainer\.devices=1 would work"):
        trained(PLAN, trainer_cfg)


@pytest.mark.parametrize("trainable", ["all", "attention"])
def test_what_is_declared_trainable_and_nothing_else_moves_in_the_first_step(
    trainer_cfg, trainable
):
    net = tiny_net()
    choose_trainable(net, trainable)
    declared = {name for name, p in net.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    trained(
        replace(PLAN, steps=1),
        trainer_cfg,
        net=net,
        optimizer=lambda parameters: Recorder(parameters, lr=0.1),
    )
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == declared


def test_the_averaged_weights_are_the_warmed_up_average_of_the_visited_ones(trainer_cfg):
    """By hand, from the gradients: after n earlier steps the decay is (1 + n) / (10 + n), first 0."""
    plan = replace(REPEATABLE, steps=4)
    module = trained(
        plan,
        trainer_cfg,
        ema_decay=0.2,
        optimizer=lambda parameters: Recorder(parameters, lr=0.1),
    )
    weights = averaged = weights_of(tiny_net())
    for n, gradient in enumerate(gradients(module)):
        weights = weights - 0.1 * gradient
        decay = min(0.2, (1 + n) / (10 + n)) if n else 0.0
        averaged = decay * averaged + (1 - decay) * weights
    torch.testing.assert_close(weights_of(module.net), weights)
    torch.testing.assert_close(weights_of(module.averaged_network()), averaged)


@pytest.fixture
def spoken(trainer_cfg, capfd, caplog, tmp_path):
    """A function that trains and returns all that was printed, logged and written.

    The Lightning logger that it hands in would write whatever it is told.
    """

    def speak(name, **options):
        caplog.set_level("WARNING", logger="lightning.pytorch")  # as every command does
        capfd.readouterr()
        caplog.clear()
        trained(PLAN, trainer_cfg, logger=CSVLogger(tmp_path / name, "", ""), **options)
        printed = capfd.readouterr()
        files = {p.name: p.read_text() for p in (tmp_path / name).rglob("*") if p.is_file()}
        return printed.out, printed.err, list(caplog.messages), files

    return speak


def test_nothing_that_is_shown_or_logged_depends_on_the_private_images(spoken):
    """Empty batches, full ones of other images, and images that no loss can like."""
    white = replace(tiny_images(N), pixels=np.full((N, 4, 4, 1), 255, dtype=np.uint8))
    said = [
        spoken("empty", randomness=NobodyIn()),
        spoken("full", randomness=Chosen(7, list(range(N)))),
        spoken("white", randomness=Chosen(7, list(range(N))), images=white),
        spoken("secret"),
    ]
    assert all(each == said[0] for each in said)
    out, err, messages, files = said[0]
    assert files == {}
    assert out == "" and messages == []
    assert f"{STEPS}/{STEPS} steps, eps spent" in err


def test_public_training_says_its_loss_so_that_silence_above_means_something(trainer_cfg, capfd):
    plan = PublicPlan(batch_size=5, steps=3, num_examples=N)
    module = tiny_module(plan, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    fit(module, tiny_images(N), plan, trainer_cfg, caption="public")
    assert "loss=" in capfd.readouterr().err
    assert module.trainer.global_step == module.ema.optimization_step == 3


def test_each_examples_draws_are_its_own(trainer_cfg):
    """Rows are draw-major, and a draw of an example does not depend on its companions."""
    module = tiny_module(REPEATABLE, randomness=RepeatablePrivateRandomness(3), flip=False)
    images = tiny_images(N)
    pixels = torch.from_numpy(images.pixels).permute(0, 3, 1, 2)
    labels = torch.from_numpy(images.labels)

    def rows(units):
        units = torch.tensor(units, dtype=torch.int64)
        return module.draw_rows(Batch(units, pixels[units], labels[units]), step=2)

    k, many, one = PLAN.multiplicity, [0, 3, 5, 10], [5]
    for together, alone in zip(rows(many), rows(one), strict=True):
        torch.testing.assert_close(together[2 :: len(many)], alone)
        assert len(together) == k * len(many)
    x0, noise, t, _ = rows(many)
    torch.testing.assert_close(x0, to_float(pixels[many]).repeat(k, 1, 1, 1))
    assert len(noise.flatten().unique()) == noise.numel()
    assert all(len(tensor) == 0 for tensor in rows([]))
    assert int(t.min()) >= 0 and int(t.max()) < module.diffusion.timestep_law.num_timesteps
