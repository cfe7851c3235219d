"""Poisson batches: exact counts, independence, the right probability; public epochs."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from dp_synth.privacy.batches import EpochBatches, PoissonBatches
from dp_synth.privacy.randomness import (
    PrivateRandomness,
    PublicRandomness,
    RepeatablePrivateRandomness,
)

# Statistical tests fail by chance once in a million runs.
RARE = 1e-6


@pytest.mark.parametrize(("steps", "first_step"), [(0, 0), (1, 0), (7, 0), (7, 5), (7, 7)])
def test_poisson_batches_are_exactly_the_steps_left(steps, first_step):
    batches = PoissonBatches(0.01, 3, steps, PrivateRandomness(), first_step)
    listed = list(batches)
    assert len(listed) == len(batches) == steps - first_step
    assert all(batch.dtype == np.int64 for batch in listed)


def test_empty_and_full_batches_are_steps_too():
    sizes = [len(batch) for batch in PoissonBatches(1e-4, 7, 101, PrivateRandomness())]
    assert len(sizes) == 101 and 0 in sizes
    for batch in PoissonBatches(1.0, 7, 11, PrivateRandomness()):
        assert batch.tolist() == list(range(7))


@pytest.mark.parametrize("randomness", [PrivateRandomness(), RepeatablePrivateRandomness(5)])
def test_inclusion_is_binomial_for_each_example_and_pair_and_step(randomness):
    num_examples, steps, q = 13, 3000, 0.3
    chosen = np.zeros((steps, num_examples), dtype=bool)
    for step, batch in enumerate(PoissonBatches(q, num_examples, steps, randomness)):
        chosen[step, batch] = True
    for count in chosen.sum(axis=0):
        assert stats.binomtest(int(count), steps, q).pvalue > RARE
    neighbours = int((chosen[:, 1:] & chosen[:, :-1]).sum(axis=0)[0])
    assert stats.binomtest(neighbours, steps, q * q).pvalue > RARE
    following = int((chosen[1:] & chosen[:-1]).sum())
    assert stats.binomtest(following, (steps - 1) * num_examples, q * q).pvalue > RARE / 100
    sizes = chosen.sum(axis=1)
    # The variance of independent inclusion, which fixed-size sampling does not have.
    assert sizes.var() == pytest.approx(num_examples * q * (1 - q), rel=0.2)


def test_global_seeds_do_not_move_private_batches():
    def draw():
        torch.manual_seed(0)
        np.random.seed(0)
        return np.concatenate(list(PoissonBatches(0.5, 100, 3, PrivateRandomness())))

    assert draw().tolist() != draw().tolist()


def test_a_data_loader_takes_the_batches():
    batches = PoissonBatches(0.4, 5, 9, RepeatablePrivateRandomness(1))
    loader = DataLoader(range(5), batch_sampler=batches, collate_fn=list)
    assert len(loader) == 9
    assert list(loader) == [batch.tolist() for batch in batches]


def test_resumed_repeatable_batches_continue():
    whole = list(PoissonBatches(0.5, 11, 6, RepeatablePrivateRandomness(2)))
    rest = list(PoissonBatches(0.5, 11, 6, RepeatablePrivateRandomness(2), first_step=4))
    assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole[4:]]


@pytest.mark.parametrize(("batch_size", "num_examples"), [(1, 1), (3, 10), (5, 10), (7, 7)])
def test_epochs_are_shuffled_without_repeats(batch_size, num_examples):
    steps = 3 * (num_examples // batch_size) + 1
    batches = list(EpochBatches(batch_size, num_examples, steps, PublicRandomness(3)))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    epoch = np.concatenate(batches[: num_examples // batch_size])
    assert len(set(epoch.tolist())) == len(epoch) and set(epoch) <= set(range(num_examples))


def test_epochs_are_keyed_by_seed_and_resume_anywhere():
    def draw(seed, first_step=0):
        batches = EpochBatches(3, 10, 11, PublicRandomness(seed), first_step)
        return [batch.tolist() for batch in batches]

    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[:3] != draw(1)[3:6]  # another epoch, another order
    for first_step in range(12):
        assert draw(1, first_step) == draw(1)[first_step:]


def test_epochs_refuse_a_batch_that_does_not_fit():
    with pytest.raises(ValueError, match="batch_size=4"):
        EpochBatches(4, 3, 1, PublicRandomness(0))
