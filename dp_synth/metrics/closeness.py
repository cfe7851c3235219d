"""How near samples are to training images, beside held-out images and beside other real ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dp_synth.metrics.estimates import Estimate
from dp_synth.metrics.exchangeability import below_p_value, share_p_value
from dp_synth.metrics.neighbours import Distances, Indices, Vectors, nearest, several_nearest

NEIGHBOURS = 50  # by whose distances that of the nearest one is measured, as in Carlini et al.
_RARE = 500  # 1 real image in so many, or fewer, is as near to another as a copy is


@dataclass(frozen=True)
class Closeness:
    """Whether samples are nearer to training than to held-out images.

    Attributes:
        closer_to_train: share of the samples whose nearest image is a training image. Its interval
            is over samples, for these very references.
        distance_ratio: mean distance to the nearest training image over that to the nearest
            held-out image; None where the latter is 0.
        p_value: probability of such a share or a higher one, had chance decided which references
            are training images.
    """

    closer_to_train: Estimate
    distance_ratio: float | None
    p_value: float


@dataclass(frozen=True)
class Copies:
    """Samples that are as near to one training image as few real images are.

    Attributes:
        found: how many there are.
        expected: how many there would be, had the samples been drawn as the real images were.
        p_value: probability of ``found`` or more in that case.
        n: how many samples were looked at.
    """

    found: int
    expected: float
    p_value: float
    n: int


@dataclass(frozen=True)
class References:
    """Vectors of training and held-out images, and the unit of each.

    Attributes:
        train: ``[T, D]``, T >= 1.
        held_out: ``[H, D]``, H >= 1.
        train_units: int64 ``[T]``: images of one patient, say, share a number.
        held_out_units: int64 ``[H]``; its numbers have nothing to do with those of ``train_units``.
        seed: of the units that are left out, of ties and of permutations.
    """

    train: Vectors
    held_out: Vectors
    train_units: Indices
    held_out_units: Indices
    seed: int

    def closeness(self, samples: Vectors) -> Closeness:
        """Compare samples ``[N, D]``, N >= 1, with equally many training and held-out units."""
        units, compared = self._equally_many_units()
        # All in one random order: the first of several that are equally near is a fair choice.
        order = np.random.default_rng(self.seed).permutation(
            np.flatnonzero(np.isin(units, compared))
        )
        is_train = order < len(self.train)
        train, held_out = order[is_train], order[~is_train]
        to_train, nearest_train = nearest(samples, self.train[train])
        to_held_out, nearest_held_out = nearest(samples, self.held_out[held_out - len(self.train)])
        comes_first = (
            np.flatnonzero(is_train)[nearest_train] < np.flatnonzero(~is_train)[nearest_held_out]
        )
        closer = (to_train < to_held_out) | ((to_train == to_held_out) & comes_first)
        nearest_of_all = np.where(closer, train[nearest_train], held_out[nearest_held_out])
        hits = np.bincount(units[nearest_of_all], minlength=units.max() + 1)[compared]
        return Closeness(
            Estimate.of(closer),
            float(to_train.mean() / to_held_out.mean()) if to_held_out.any() else None,
            share_p_value(hits, np.isin(compared, units[: len(self.train)]), self.seed),
        )

    def _equally_many_units(self) -> tuple[Indices, Indices]:
        """Return the unit ``[T + H]`` of each image, and equally many units of each side."""
        rng = np.random.default_rng(self.seed)
        _, train = np.unique(self.train_units, return_inverse=True)
        _, held_out = np.unique(self.held_out_units, return_inverse=True)
        held_out = held_out + train.max() + 1
        sides = [rng.permutation(np.unique(units)) for units in (train, held_out)]
        n = min(len(units) for units in sides)
        return np.concatenate([train, held_out]), np.concatenate([units[:n] for units in sides])

    def copies(self, samples: Vectors, calibrate_on: int) -> Copies | None:
        """Count the samples ``[N, D]`` that are as near to one training image as few real ones are.

        Near is relative to how near the next training images are, see ``relative_distances``: blur
        brings a sample nearer to all of them. The real images are held-out ones, and training
        images, each compared with the images of other units: equally fresh, and there are more.

        Args:
            samples: may be empty.
            calibrate_on: at most so many held-out and so many training images.

        Returns:
            None where there are fewer than 2 training images to compare each real image with.
        """
        _, units = np.unique(self.train_units, return_inverse=True)
        k = min(NEIGHBOURS, len(units) - int(np.bincount(units).max()))
        if k < 2:
            return None
        rng = np.random.default_rng(self.seed)
        held_out = rng.permutation(len(self.held_out))[:calibrate_on]
        train = rng.permutation(len(units))[:calibrate_on]
        others, _ = several_nearest(self.train[train], self.train, k, units[train], units)
        fresh, _ = several_nearest(self.held_out[held_out], self.train, k)
        real = np.concatenate([relative_distances(others), relative_distances(fresh)])
        rank = 1 + len(real) // _RARE
        threshold = np.partition(real, rank - 1)[rank - 1]
        distances, _ = several_nearest(samples, self.train, k)
        n, found = len(samples), int((relative_distances(distances) < threshold).sum())
        expected = n * rank / (len(real) + 1)
        return Copies(found, expected, below_p_value(found, n, rank, len(real)), n)


def relative_distances(distances: Distances) -> Distances:
    """Return the least of the distances ``[N, k]``, ascending, over their mean: ``[N]``, 0..1.

    This is how Carlini et al. 2023 (arXiv 2301.13188, section 5) tell a copy from an image of which
    everything looks near. It is 1 where all k images are equal to the query: that is no copy of one
    of them.
    """
    mean = distances.mean(axis=1)
    return np.divide(distances[:, 0], mean, out=np.ones(len(mean)), where=mean > 0)
