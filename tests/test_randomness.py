"""Randomness: secret where it must be, keyed by unit where tests need it, uniform and normal."""

import os
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from dp_synth.privacy.randomness import (
    PrivateRandomness,
    PublicRandomness,
    RepeatablePrivateRandomness,
)

RARE = 1e-6
SOURCES = [PrivateRandomness(), RepeatablePrivateRandomness(3), PublicRandomness(3)]


def draws(randomness, step, units, multiplicity, shape=(2, 3)):
    rows = randomness.rows(step, torch.tensor(units, dtype=torch.int64), multiplicity, "cpu")
    return rows.uniform(), rows.normal(shape), rows.uniform()


def of_unit(rows, units, multiplicity, unit):
    return rows.unflatten(0, (multiplicity, len(units)))[:, units.index(unit)]


@pytest.mark.parametrize("randomness", SOURCES)
@pytest.mark.parametrize("units", [[], [4], [5, 0, 11]])
@pytest.mark.parametrize("multiplicity", [1, 3])
def test_shapes_types_and_fresh_values(randomness, units, multiplicity):
    uniform, normal, again = draws(randomness, 0, units, multiplicity)
    num_rows = multiplicity * len(units)
    assert uniform.shape == (num_rows,) and normal.shape == (num_rows, 2, 3)
    assert uniform.dtype == normal.dtype == torch.float32
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert len(set(torch.cat([uniform, again]).tolist())) == 2 * num_rows


@pytest.mark.parametrize("randomness", SOURCES)
def test_distributions(randomness):
    uniform, normal, _ = draws(randomness, 1, list(range(50)), 40)
    assert stats.kstest(uniform, "uniform").pvalue > RARE
    assert stats.kstest(normal.flatten(), "norm").pvalue > RARE
    assert stats.kstest(randomness.selection(1, 10_007), "uniform").pvalue > RARE
    noise = torch.randn(10_007, generator=randomness.noise_generator(1, "cpu"))
    assert stats.kstest(noise, "norm").pvalue > RARE


@pytest.mark.parametrize("others", [[], [2], [9, 0, 5], [3, 8, 1, 6]])
@pytest.mark.parametrize("multiplicity", [1, 4])
def test_one_unit_more_moves_no_other_units_draws(others, multiplicity):
    randomness = RepeatablePrivateRandomness(11)
    alone = draws(randomness, 6, [7], multiplicity)
    units = [*others, 7]
    together = draws(randomness, 6, units, multiplicity)
    for rows, expected in zip(together, alone, strict=True):
        assert torch.equal(of_unit(rows, units, multiplicity, 7), expected)


def test_selection_of_a_unit_does_not_depend_on_how_many_there_are():
    randomness = RepeatablePrivateRandomness(11)
    assert np.array_equal(randomness.selection(2, 5), randomness.selection(2, 17)[:5])


@pytest.mark.parametrize("kind", [RepeatablePrivateRandomness, PublicRandomness])
def test_seeded_sources_repeat_and_differ_by_seed_and_step(kind):
    def all_of(seed, step):
        source = kind(seed)
        noise = torch.randn(5, generator=source.noise_generator(step, "cpu"))
        rows = torch.cat([part.flatten() for part in draws(source, step, [0, 1], 2)])
        return [tuple(source.selection(step, 5)), tuple(rows.tolist()), tuple(noise.tolist())]

    assert all_of(1, 2) == all_of(1, 2)
    seen = [part for key in [(1, 2), (2, 1), (1, 3), (0, 2)] for part in all_of(*key)]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("kind", [RepeatablePrivateRandomness, PublicRandomness])
def test_seeds_that_share_their_low_32_bits_differ(kind):
    one, other = (kind(seed).noise_generator(0, "cpu") for seed in (5, 5 + 2**32))
    assert not torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=other))


def test_private_randomness_ignores_every_seed():
    def draw():
        torch.manual_seed(0)
        np.random.seed(0)
        source = PrivateRandomness()
        noise = torch.randn(5, generator=source.noise_generator(0, "cpu"))
        return [source.selection(0, 5).tolist(), noise.tolist()] + [
            part.tolist() for part in draws(source, 0, [0, 1], 2)
        ]

    for first, second in zip(draw(), draw(), strict=True):
        assert first != second


def test_private_randomness_takes_the_systems_entropy_for_every_stream(monkeypatch):
    asked = []

    def count(size):
        asked.append(size)
        return os.getrandom(size)

    source = PrivateRandomness()
    monkeypatch.setattr("dp_synth.privacy.randomness.os.urandom", count)
    source.selection(0, 13)
    source.rows(0, torch.arange(2), 3, "cpu")
    source.noise_generator(0, "cpu")
    assert len(asked) == 3 and min(asked[1:]) >= 32


def test_a_secret_generator_has_more_than_32_bits_of_state():
    """No generator seeded by `manual_seed` on the CPU has this first word's neighbours at random."""
    state = PrivateRandomness().noise_generator(0, "cpu").get_state().numpy().view(np.uint64)
    words = state[3:627]
    seeded = torch.Generator().manual_seed(int(words[0])).get_state().numpy().view(np.uint64)
    assert seeded[3] == words[0]  # the layout is the one that was filled
    assert not np.array_equal(seeded[4:627], words[1:])


def test_private_randomness_cannot_be_saved():
    with pytest.raises(TypeError, match="secret"):
        pickle.dumps(PrivateRandomness())
