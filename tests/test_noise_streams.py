"""Every image has noise of its own, whatever is drawn with it."""

import numpy as np
import pytest
import torch
from conftest import compose, tiny_diffusion, tiny_net
from hydra.utils import instantiate

from dp_synth.sampling.streams import NUM_STREAMS, noise_streams, stream_seeds

STOCHASTIC = {
    "ddpm": ("sampler=ddpm",),
    "ddim": ("sampler=ddim", "sampler.eta=1"),
    "dpm_solver": ("sampler=dpm_solver", "sampler.algorithm=sde-dpmsolver++"),
    "heun": ("sampler=heun", "sampler.churn=2"),
}


def test_no_two_images_of_a_seed_share_a_stream():
    # torch keeps 32 bits of a seed: a hash of the index cut to them would collide over 100 times.
    seeds = np.array(stream_seeds(3, range(10**6)))
    assert seeds.min() >= 0 and seeds.max() < 2**32
    assert len(np.unique(seeds)) == 10**6


def test_streams_are_seeded_so():
    indices = [0, 5, 10**6, NUM_STREAMS - 1]
    streams = noise_streams(3, indices)
    assert [stream.initial_seed() for stream in streams] == stream_seeds(3, indices)
    assert all(stream.device.type == "cpu" for stream in streams)


def test_consecutive_images_have_scattered_seeds():
    seeds = np.array(stream_seeds(0, range(100_000)))
    counts = np.bincount(seeds >> 28, minlength=16)
    assert np.abs(counts / 6250 - 1).max() < 0.06
    assert abs(np.corrcoef(seeds[:-1], seeds[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("other", [1, 2, 2**32, 2**64 + 1])
def test_other_seeds_have_other_streams(other):
    """Two seeds share streams by chance alone: 20,000^2 / 2^32, which is 0.1."""
    assert len(np.intersect1d(*(stream_seeds(seed, range(20_000)) for seed in (0, other)))) <= 3


def test_the_ends_of_the_range_have_streams():
    first, last = noise_streams(0, [0, NUM_STREAMS - 1])
    assert not torch.equal(torch.randn(9, generator=first), torch.randn(9, generator=last))


def test_a_stream_is_a_function_of_seed_and_index():
    torch.manual_seed(1)
    one = [torch.randn(3, generator=stream) for stream in noise_streams(5, [7, 2])]
    torch.manual_seed(2)
    two = [torch.randn(3, generator=stream) for stream in noise_streams(5, [2, 7])]
    assert torch.equal(one[0], two[1]) and torch.equal(one[1], two[0])


class Spy:
    """A process whose denoiser sees black in everything, and writes down what it is shown.

    What it is shown is then made of noise alone.
    """

    def __init__(self, process):
        self.process, self.shown = process, []

    def __getattr__(self, name):
        return getattr(self.process, name)

    def denoiser(self, net, y):
        def denoise(x, t):
            self.shown.append(x.clone())
            return torch.zeros_like(x)

        return denoise


def noise_of(choice, batches):
    """What each image [N] is shown at every call, where images are drawn in these batches."""
    sampler = instantiate(compose(*STOCHASTIC[choice], "sampler.steps=4").sampler)
    net, shown = tiny_net(), {}
    for batch in batches:
        spy = Spy(tiny_diffusion())
        labels = torch.zeros(len(batch), dtype=torch.int64)
        sampler.draw(net, spy, labels, first=batch[0], seed=11)
        for i, index in enumerate(batch):
            shown[index] = torch.stack([x[i] for x in spy.shown])
    return shown


@pytest.mark.parametrize("choice", STOCHASTIC)
def test_noise_is_the_same_bit_for_bit_in_any_batch(choice):
    together = noise_of(choice, [range(17)])
    for size in (1, 3, 7):
        apart = noise_of(choice, [range(i, min(i + size, 17)) for i in range(0, 17, size)])
        assert all(torch.equal(apart[i], together[i]) for i in range(17))
    for first in (5, 16):
        later = noise_of(choice, [range(first, 17)])
        assert all(torch.equal(later[i], together[i]) for i in range(first, 17))


@pytest.mark.parametrize("choice", STOCHASTIC)
def test_images_and_steps_have_noise_of_their_own(choice):
    shown = torch.stack(list(noise_of(choice, [range(9)]).values())).flatten(
        2
    )  # [N, calls, pixels]
    for i in range(9):
        for j in range(i):
            assert not torch.isclose(shown[i], shown[j]).all(1).any()
    # The last call's noise is not the start's alone: steps add some.
    start, end = shown[:, 0].flatten(), shown[:, -1].flatten()
    assert abs(float(torch.corrcoef(torch.stack([start, end]))[0, 1])) < 0.95
