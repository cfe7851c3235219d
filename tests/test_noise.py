"""Secure noise has the law that it claims, lies on a grid, and tells no more than the noised sum."""

import copy
import pickle
import random
import sys
from dataclasses import replace

import lightning
import mpmath
import numpy as np
import pytest
import torch
from conftest import Recorder, refusal, tiny_images, tiny_module, weights_of
from opacus.optimizers import DPOptimizerFastGradientClipping
from scipy import stats
from torch import nn

from dp_synth.errors import UserError
from dp_synth.fitting import fit
from dp_synth.privacy import noise, rounded_gaussian
from dp_synth.privacy.noise import GeneratorNoise, SecureNoise
from dp_synth.privacy.optimizer import NoisingOptimizer
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.randomness import PrivateRandomness, RepeatablePrivateRandomness
from dp_synth.privacy.rounded_gaussian import Keystream
from dp_synth.privacy.rounded_gaussian import rounded_gaussian as draw

PLAN = PrivacyPlan(
    eps=10,
    delta=1e-2,
    max_grad_norm=0.5,
    batch_size=5,
    steps=3,
    num_examples=11,
    noise_multiplier=0.7,
    secure_noise=True,
)
# Far below any critical value of a two-sided test: a right implementation never fails.
RARE = 1e-9


class Told:
    """A stream of words that are known beforehand, then secret ones; it remembers which."""

    def __init__(self, *words):
        self.told = np.array(words, np.int64)
        self.secret = Keystream()
        self.given = []

    def words(self, count):
        if len(self.given) == 0:
            assert count == len(self.told)
            given = torch.from_numpy(self.told.copy())
        else:
            given = self.secret.words(count)
        self.given += given.tolist()
        return given


def secure(noise_multiplier=1.0, max_grad_norm=1.0, size=1, num_examples=1):
    return SecureNoise(
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        size=size,
        num_examples=num_examples,
    )


@pytest.fixture
def no_noise(monkeypatch):
    """Sums are moved to the grid, and nothing is added."""
    silent = torch.zeros
    monkeypatch.setattr(
        noise, "rounded_gaussian", lambda std, count, _: silent(count, dtype=torch.float64)
    )


# ------------------------------------------------------------------------------- the random words


def test_the_keystream_is_aes_256_in_counter_mode(monkeypatch):
    """Under the key of zeros: the two blocks published with GCM's test cases 13 and 14."""
    asked = []
    monkeypatch.setattr(
        rounded_gaussian.os, "urandom", lambda size: asked.append(size) or bytes(size)
    )
    stream = Keystream()
    words = torch.cat([stream.words(1), stream.words(3)]).numpy()
    assert words.tobytes().hex() == (
        "dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738b"
    )
    assert asked == [32]


def seed_everything():
    lightning.seed_everything(0)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def test_no_seed_has_any_influence():
    drawn = []
    for _ in range(2):
        seed_everything()
        noised = secure(size=1000).add_to(torch.zeros(1000))
        drawn += [Keystream().words(2).tolist(), noised[:5].tolist(), noised[-5:].tolist()]
    assert len({tuple(part) for part in drawn}) == len(drawn)


def test_a_keystream_cannot_be_saved():
    with pytest.raises(TypeError, match="secret"):
        pickle.dumps(Keystream())
    with pytest.raises(TypeError, match="secret"):
        copy.deepcopy(secure())


# ------------------------------------------------------------------------------------- the draws


def test_ten_million_draws_are_standard_normal_to_the_tails():
    count = 10**7
    drawn = draw(2.0**30, count, Keystream()).numpy() / 2.0**30
    assert abs(drawn.mean()) < 6 / count**0.5
    assert abs(drawn.var() - 1) < 6 * (2 / count) ** 0.5
    for threshold in (1, 2, 3, 4, 4.5, 5):
        for beyond in (drawn > threshold, drawn < -threshold):
            chance = stats.norm.sf(threshold)
            assert stats.binomtest(int(beyond.sum()), count, chance).pvalue > RARE, threshold
    assert stats.kstest(drawn[: 10**6], "norm").pvalue > RARE
    bins = np.bincount((stats.norm.cdf(drawn[-(10**6) :]) * 1000).astype(int), minlength=1000)
    assert stats.chisquare(bins).pvalue > RARE


@pytest.mark.parametrize("std", [0.3, 1.0, 7.7])
def test_on_a_coarse_grid_every_number_has_the_chance_of_its_interval(std):
    count = 200_000
    drawn = draw(std, count, Keystream()).numpy()
    edge = int(3 * std)
    numbers = np.arange(-edge, edge + 1)
    found = [(drawn < -edge).sum(), *((drawn == n).sum() for n in numbers), (drawn > edge).sum()]
    bounds = stats.norm.cdf(np.arange(-edge, edge + 2) - 0.5, scale=std)
    chances = np.diff([0.0, *bounds, 1.0])
    assert sum(found) == count
    assert stats.chisquare(found, chances * count).pvalue > RARE


def test_draws_of_a_call_of_two_calls_and_of_two_sources_are_independent():
    """Pairs of neighbours, of both halves of a call, and of equal places in other draws."""
    one, other = Keystream(), Keystream()
    first, second, third = (draw(2.0**20, 200_000, s).numpy() for s in (one, one, other))
    half = len(first) // 2
    for x, y in [
        (first[:-1], first[1:]),
        (first[:half], first[half:]),
        (first, second),
        (first, third),
    ]:
        cells = [np.searchsorted(stats.norm.ppf(np.arange(1, 8) / 8) * 2.0**20, v) for v in (x, y)]
        table = np.bincount(cells[0] * 8 + cells[1], minlength=64).reshape(8, 8)
        assert stats.chi2_contingency(table).pvalue > RARE


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_any_number_of_draws(count):
    drawn = draw(3.0, count, Keystream())
    assert drawn.shape == (count,) and drawn.dtype == torch.float64
    assert torch.equal(drawn, drawn.round())


def ideal(std, length, angle):
    """The pair that begins with these bits, to 60 digits; in the middle of what is not known."""
    with mpmath.workdps(60):
        u = (mpmath.mpf(length) + 0.5) / 2**63
        turn = (mpmath.mpf(angle) + 0.5) / 2**63
        radius = std * mpmath.sqrt(-2 * mpmath.log(u))
        return radius * mpmath.cospi(turn), radius * mpmath.sinpi(turn)


# First bits at which the functions are hardest: long and short draws, and axes.
AWKWARD = [
    *((2**47 + 5, angle) for angle in (0, 1, -1, 2**62, -(2**62), 2**61, 2**63 - 1, -(2**63))),
    *((2**63 - 2**k, 123456789 << 30) for k in (0, 1, 10, 30, 50, 60)),
    *((2**k, -987654321 << 30) for k in (48, 50, 55, 60, 62)),
]


def words_of(pairs):
    return [length for length, _ in pairs] + [angle for _, angle in pairs]


def random_pairs(count):
    words = Keystream().words(2 * count)
    return list(zip((words[:count] & (2**63 - 1)).tolist(), words[count:].tolist(), strict=True))


def test_float64_errs_by_no_more_than_half_of_what_is_allowed_for(monkeypatch):
    """At a scale at which a unit is a quarter of the allowed error, and nothing is refined."""
    allowed, std = rounded_gaussian._ERROR, 2.0**49
    monkeypatch.setattr(rounded_gaussian, "_ERROR", 0.0)
    pairs = [pair for pair in AWKWARD if pair[0] <= 2**63 - 2**20] + random_pairs(3000)
    drawn = draw(std, 2 * len(pairs), Told(*words_of(pairs))).view(2, -1)
    for (length, angle), found in zip(pairs, drawn.T.tolist(), strict=True):
        if length < 2**47:  # refined all the same
            continue
        radius = float(mpmath.sqrt(-2 * mpmath.log(mpmath.ldexp(length, -63))))
        error = allowed / 2 * (radius + 1 / (8 * radius)) * std
        for value, expected in zip(found, ideal(std, length, angle), strict=True):
            assert abs(value - expected) <= 0.5 + error, (length, angle)


@pytest.mark.parametrize("std", [1.7, 2.0**28, 2.0**40, 2.0**46])
def test_every_rounding_is_that_of_the_ideal_number(std):
    """The larger the scale, the more float64 leaves undecided: hardly anything, then everything."""
    pairs = AWKWARD + random_pairs(100)
    drawn = draw(std, 2 * len(pairs), Told(*words_of(pairs))).view(2, -1)
    compared = 0
    for (length, angle), found in zip(pairs, drawn.T.tolist(), strict=True):
        for value, expected in zip(found, ideal(std, length, angle), strict=True):
            # How much the bits that are not told can still move it.
            radius = max(abs(expected) / std, 1e-9)
            unknown = std * 2.0**-62 * (2**63 / min(length + 1, 2**63 - length) / radius + 20)
            if abs(abs(expected - mpmath.nint(expected)) - 0.5) > unknown:
                assert value == mpmath.nint(expected), (length, angle)
                compared += 1
    assert compared > 1.7 * len(pairs)


def test_the_tail_is_not_cut_off_where_the_first_word_ends():
    """Given that 63 bits of u are 0, r^2 / 2 exceeds 63 ln 2 by an exponential number."""
    std, beyond = 2.0**30, []
    for _ in range(200):
        along, across = rounded_gaussian._refined(std, 0, 0, Keystream())
        assert along > 9.3 * std and across in (0, 1, 2)
        beyond.append((along / std) ** 2 / 2 - 63 * np.log(2))
    assert stats.kstest(beyond, "expon").pvalue > RARE


def test_bits_after_the_first_word_are_drawn_until_a_rounding_is_certain():
    """A quarter turn and v of the last place more, v uniform in [0, 1), at a scale that shows v."""
    std, radius = 2.0**62, np.sqrt(2 * np.log(2))
    found = [rounded_gaussian._refined(std, 2**62, 2**62, Keystream())[0] for _ in range(1000)]
    reach = radius * np.pi / 2  # of -r sin(pi v 2^-63) 2^62
    chances = np.diff([0, 0.5 / reach, 1.5 / reach, 1])
    counts = [found.count(0), found.count(-1), found.count(-2)]
    assert sum(counts) == len(found)
    assert stats.chisquare(counts, chances * len(found)).pvalue > RARE


# -------------------------------------------------------------------------- the grid and the bound


@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.3, 1.0, 77.7])
@pytest.mark.parametrize("size", [1, 7, 1_000_003, 80_000_000, 10**9])
def test_the_grid_lengthens_little_and_the_noise_makes_up_for_it(max_grad_norm, size):
    source = secure(1.3, max_grad_norm, size, num_examples=10**6)
    lengthening = source.spacing * size**0.5 / max_grad_norm
    assert 2.0**-15 * 0.999 < lengthening < 1e-4
    assert np.frexp(source.spacing)[0] == 0.5  # a power of two
    longest = max_grad_norm + source.spacing * size**0.5
    assert source.std / longest == pytest.approx(1.3, rel=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (7, 0), (13,), (3, 5, 2)])
@pytest.mark.parametrize("at_once", [4, 2**18])
def test_what_is_released_lies_on_the_grid(shape, at_once, monkeypatch):
    monkeypatch.setattr(noise, "_AT_ONCE", at_once)
    total = torch.randn(shape, dtype=torch.float64)
    source = secure(0.9, 1.0, size=1000)
    noised = source.add_to(total)
    assert noised.shape == total.shape and noised.dtype == total.dtype
    points = noised / source.spacing
    assert torch.equal(points, points.round())
    assert (noised != total).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [3, 2**18])
def test_the_sum_is_exact_and_then_rounded_to_its_type(dtype, at_once, monkeypatch):
    """With noise that is known: Python's fractions as the oracle of the sum."""
    monkeypatch.setattr(noise, "_AT_ONCE", at_once)
    known = torch.tensor([0.0, 1, -1, 2.0**40, -(2.0**40), 12345, -7])
    given = iter(known.double().split(at_once))
    monkeypatch.setattr(noise, "rounded_gaussian", lambda std, count, _: next(given))
    total = torch.tensor([0.0, 0.3, -1e-9, 1.0, 123.4, 1e-30, -0.6]).to(dtype)
    source = secure(size=10**6, num_examples=1000)
    found = source.add_to(total)
    steps = [round(x / source.spacing) for x in total.double().tolist()]
    exact = [
        (step + int(z)) * source.spacing for step, z in zip(steps, known.tolist(), strict=True)
    ]
    assert torch.equal(found, torch.tensor(exact, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("size", [1, 7, 10_007])
def test_neighbours_on_the_grid_differ_by_at_most_the_stated_bound(size, no_noise):
    source = secure(1.0, 0.3, size)
    generator = torch.Generator().manual_seed(size)
    longest = 0.3 + source.spacing * size**0.5
    for _ in range(20):
        one = torch.randn(size, generator=generator, dtype=torch.float64)
        step = torch.randn(size, generator=generator, dtype=torch.float64)
        other = one + step / step.norm() * 0.3
        moved = source.add_to(one) - source.add_to(other)
        assert moved.norm() <= longest * (1 + 1e-12)
    # The bound is met: sums that hardly differ, all of whose entries lie beside a boundary.
    boundary = torch.full((size,), 0.5 * source.spacing, dtype=torch.float64)
    one, other = boundary * (1 + 1e-9), boundary * (1 - 1e-9)
    moved = source.add_to(one) - source.add_to(other)
    assert moved.norm() == pytest.approx(source.spacing * size**0.5, rel=1e-12)
    assert (one - other).norm() < 1e-8 * moved.norm()


def low_bits(source, total):
    """The last two bits of those float32 outputs in [1/8, 1/4), whose last place is 2^-26."""
    noised = source.add_to(torch.full((400_000,), total)).double()
    noised = noised[(noised >= 1 / 8) & (noised < 1 / 4)]
    return np.bincount((noised * 2.0**26).long().numpy() % 4, minlength=4)


def test_the_last_bits_tell_neighbours_apart_with_torchs_noise_and_not_with_ours():
    """Adding to 1 rounds to the places of 1: of the two sums, 0 alone can give other last bits."""
    naive = GeneratorNoise(1.0, PrivateRandomness().noise_generator(0, "cpu"))
    of_zero, of_one = low_bits(naive, 0.0), low_bits(naive, 1.0)
    assert of_one[0] == of_one.sum() > 1000  # and so every other output gives 0 away
    assert of_zero[1:].sum() > 1000
    for total in (0.0, 1.0, 0.3):
        # With so many entries its grid, too, is of multiples of 2^-26.
        ours = low_bits(secure(size=2**24), total)
        assert ours.sum() > 1000
        assert stats.chisquare(ours).pvalue > RARE


def test_under_small_noise_neighbours_have_the_same_outputs_with_ours_alone():
    """A few grid points of noise: what one sum can give the other can, but for what noise does not
    reach; torch's outputs of two sums off the grid have no number in common."""
    one, other = 0.1, 0.1 + 2.0**-15
    std = 2.0**-13

    def outputs(source, total):
        return set(source.add_to(torch.full((100_000,), total, dtype=torch.float64)).tolist())

    naive = GeneratorNoise(std, PrivateRandomness().noise_generator(0, "cpu"))
    assert len(outputs(naive, one) & outputs(naive, other)) < 100
    ours = secure(std)
    found = outputs(ours, one), outputs(ours, other)
    common = found[0] & found[1]
    central = {y for part in found for y in part if abs(y - one) < 3 * std}
    assert len(central) >= 10 and central <= common


# ----------------------------------------------------------------------------------- what is refused


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    message = refusal(secure)
    assert "pip install 'dp-synth[secure]'" in message and "privacy.secure_noise" in message


@pytest.mark.parametrize(
    "too_large", [{"num_examples": 10**9}, {"noise_multiplier": 1e8}, {"size": 10**15}]
)
def test_a_grid_of_too_many_points_is_refused(too_large):
    most = {"noise_multiplier": 100.0, "size": 10**9, "num_examples": 10**6}
    secure(**most)
    assert "privacy.secure_noise=false" in refusal(secure, **(most | too_large))


def test_repeatable_noise_is_not_secure():
    message = refusal(replace, PLAN, unsafe_repeatable_randomness=7)
    assert "privacy.secure_noise" in message and "unsafe_repeatable_randomness" in message


# ------------------------------------------------------------------------------------ the optimizer


def parameters():
    """Awkward shapes, types and memory layouts, one of them frozen."""
    shapes = [(), (1,), (3, 2), (4, 3, 5, 5), (101,)]
    tensors = [torch.zeros(shape) for shape in shapes]
    tensors[3] = tensors[3].contiguous(memory_format=torch.channels_last)
    tensors.append(torch.zeros(17, dtype=torch.float64))
    params = [nn.Parameter(tensor) for tensor in tensors]
    params.append(nn.Parameter(torch.zeros(9), requires_grad=False))
    return params


def step_of(optimizer, params, step=0, randomness=None):
    """One step from sums that count up; gradients as they reached the inner optimizer."""
    optimizer.zero_grad()
    for n, param in enumerate(params):
        if param.requires_grad:
            param.grad = torch.full_like(param, float(n))
    optimizer.begin_step(randomness or PrivateRandomness(), step, "cpu")
    optimizer.step()
    return [param.grad for param in params]


def test_every_trainable_entry_is_noised_once_and_frozen_ones_never():
    params = parameters()
    plan = replace(PLAN, noise_multiplier=3.0)
    optimizer = NoisingOptimizer(torch.optim.SGD(params, lr=0.1), plan)
    seen = []
    for _ in range(200):
        grads = step_of(optimizer, params)
        assert grads[-1] is None
        noises = []
        for n, (param, grad) in enumerate(zip(params[:-1], grads[:-1], strict=True)):
            assert grad.shape == param.shape and grad.dtype == param.dtype
            noises.append((grad.double() * plan.batch_size - n).flatten())
        seen.append(torch.cat(noises) / (3.0 * plan.max_grad_norm))
    assert (params[-1] == 0).all()
    seen = torch.stack(seen)
    for part in (seen, seen[0], seen[:, 0], seen[:, -17:]):
        assert stats.kstest(part.flatten().numpy(), "norm").pvalue > RARE
    assert len(set(seen.flatten().tolist())) > 0.99 * seen.numel()
    assert abs(np.corrcoef(seen[:-1].flatten(), seen[1:].flatten())[0, 1]) < 6 / seen.numel() ** 0.5


def test_without_secure_noise_steps_are_those_of_opacus():
    ours, theirs = parameters(), parameters()
    plan = replace(PLAN, secure_noise=False)
    optimizer = NoisingOptimizer(torch.optim.SGD(ours, lr=0.1), plan)
    oracle = DPOptimizerFastGradientClipping(
        torch.optim.SGD(theirs, lr=0.1),
        noise_multiplier=0.7,
        max_grad_norm=0.5,
        expected_batch_size=5,
    )
    randomness = RepeatablePrivateRandomness(3)
    for step in range(3):
        step_of(optimizer, ours, step, randomness)
        oracle.zero_grad()
        oracle.generator = randomness.noise_generator(step, "cpu")
        for n, param in enumerate(theirs[:-1]):
            param.grad = torch.full_like(param, float(n))
        oracle.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("is_secure", [True, False])
def test_a_step_needs_noise_of_its_own_and_sums_of_its_own(is_secure):
    params = parameters()[:3]
    plan = replace(PLAN, secure_noise=is_secure)
    optimizer = NoisingOptimizer(torch.optim.SGD(params, lr=0.1), plan)
    step_of(optimizer, params)
    with pytest.raises(RuntimeError, match="begin_step"):
        optimizer.step()
    step_of(optimizer, params)
    optimizer.begin_step(PrivateRandomness(), 1, "cpu")
    with pytest.raises(ValueError, match="zero_grad"):
        optimizer.step()


def test_noise_that_cannot_be_had_is_refused_before_the_first_step():
    plan = replace(PLAN, num_examples=10**15)
    with pytest.raises(UserError, match="privacy.secure_noise"):
        NoisingOptimizer(torch.optim.SGD(parameters(), lr=0.1), plan)


# ------------------------------------------------------------------------------------ the whole step


class NobodyIn(PrivateRandomness):
    """Every batch is empty, so that gradients are noise alone; torch's noise is never asked for."""

    def selection(self, step, num_units):
        return np.ones(num_units)

    def noise_generator(self, step, device):
        generator = super().noise_generator(step, device)
        self.asked = getattr(self, "asked", 0) + 1
        return generator


def trained(trainer_cfg, plan=PLAN, **options):
    seed_everything()
    module = tiny_module(plan, **options)
    fit(module, tiny_images(11), plan, trainer_cfg, caption="fit")
    return module


def test_training_adds_secure_noise_of_the_planned_law(trainer_cfg):
    randomness = NobodyIn()
    module = trained(trainer_cfg, randomness=randomness)
    found = torch.stack(module.optimizers().optimizer.original_optimizer.seen)
    assert len(found) == PLAN.steps
    found = found * PLAN.batch_size / (PLAN.noise_multiplier * PLAN.max_grad_norm)
    for step in found.numpy():
        assert stats.kstest(step, "norm").pvalue > RARE
    assert randomness.asked == 1  # for dropout, before the first step


def test_secure_training_moves_the_weights_and_no_seed_repeats_it(trainer_cfg):
    weights = [
        weights_of(trained(trainer_cfg, optimizer=lambda p: Recorder(p, lr=0.1)).net)
        for _ in range(2)
    ]
    assert all(w.isfinite().all() for w in weights)
    assert (weights[0] != weights[1]).all()
