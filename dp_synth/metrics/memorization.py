"""Memorisation: whether samples are nearer to the training images than fresh real images are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dp_synth.checks import count
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.closeness import (
    NEIGHBOURS,
    Closeness,
    Copies,
    References,
    relative_distances,
)
from dp_synth.metrics.evidence import Evidence, subset
from dp_synth.metrics.features.classifier import classifier_features
from dp_synth.metrics.features.extraction import Features
from dp_synth.metrics.nearest_pairs import NearestPair, write_nearest_pairs
from dp_synth.metrics.neighbours import Indices, Vectors, nearest, several_nearest
from dp_synth.metrics.record import Metrics

_SIGNIFICANT = 0.001

Embed = Callable[[npt.NDArray[np.uint8]], Vectors]


class Memorization:
    """Nearest training and held-out images of the samples, in pixels and in features.

    Two tests, in each space, flag at p < 0.001. One asks whether samples are nearer to training
    than to held-out images: then the model leans on its training images as a whole. It supposes
    that both were drawn alike; images of the model before private training, which saw neither, show
    where they were not, and it flags nothing then. The other asks whether single samples are as
    near to one training image as few real images are: then some are copies.

    Neither can prove that nothing leaked; what may leak at most is in the privacy statement.

    Args:
        held_out: names of splits, the first that there is holds the held-out images; ``test`` is
            always there.
        max_samples: at most so many samples are looked at, at random; at least 1.
        max_references: at most so many training images, and held-out ones, at random; at least 1.
            Of images of units, whole units.
        pairs: rows of the sheet, at least 1.
        features: a second space, such as ``features.efficientnet.efficientnet_lite0()``; None: that
            of a classifier of public images, where there are any.

    Raises:
        UserError: a number that is not at least 1.
    """

    def __init__(
        self,
        *,
        held_out: Sequence[str],
        max_samples: int,
        max_references: int,
        pairs: int,
        features: Features | None = None,
    ) -> None:
        self.held_out = held_out
        self.max_samples = count("evaluator.memorization.max_samples", max_samples)
        self.max_references = count("evaluator.memorization.max_references", max_references)
        self.pairs = count("evaluator.memorization.pairs", pairs)
        self.features = features

    def __call__(self, evidence: Evidence, metrics: Metrics) -> None:
        """Add ``memorization/*``; write ``nearest_pairs.png`` where files may be written.

        Raises:
            UserError: none of the splits in ``held_out`` is there.
        """
        seed = evidence.seed
        train = _some_units(evidence.real_train, self.max_references, seed)
        held_out = _some_units(self._held_out(evidence), self.max_references, seed)
        samples = subset(evidence.synthetic, self.max_samples, seed)
        before = evidence.public_only and subset(evidence.public_only, self.max_samples, seed)
        flagged = False
        for space, embed in self._spaces(evidence):
            references = References(
                train=embed(train.pixels),
                held_out=embed(held_out.pixels),
                train_units=_units(train),
                held_out_units=_units(held_out),
                seed=seed,
            )
            drawn_alike = True
            if before is not None:
                control = references.closeness(embed(before.pixels))
                noun = "images of the model before private training"
                _add_closeness(metrics, f"{space}.public_only", noun, control)
                drawn_alike = control.p_value >= _SIGNIFICANT
            vectors = embed(samples.pixels)
            closeness = references.closeness(vectors)
            _add_closeness(metrics, space, "synthetic images", closeness)
            flagged |= drawn_alike and closeness.p_value < _SIGNIFICANT
            copies = references.copies(vectors, self.max_samples)
            if copies is not None:
                _add_copies(metrics, space, copies)
                flagged |= copies.p_value < _SIGNIFICANT
        metrics.add(
            "memorization/flagged",
            float(flagged),
            private=True,
            n=len(samples),
            what=f"1 if a test of memorisation has p < {_SIGNIFICANT}, else 0. 0 is no proof that "
            "nothing was memorised.",
        )
        if evidence.local_dir is not None:
            pairs = _most_like_copies(samples, train, held_out, self.pairs)
            write_nearest_pairs(pairs, evidence.local_dir / "nearest_pairs.png")

    def _held_out(self, evidence: Evidence) -> Images:
        splits = {**evidence.other_tests, "test": evidence.real_test}
        for name in self.held_out:
            if name in splits:
                return splits[name]
        raise UserError(
            f"evaluator.memorization.held_out={list(self.held_out)} names no split that there is; "
            f"use one of {sorted(splits)}."
        )

    def _spaces(self, evidence: Evidence) -> Iterator[tuple[str, Embed]]:
        """Yield each space by the name it has in metrics."""
        yield "pixels", lambda pixels: pixels.reshape(len(pixels), -1)
        if self.features is not None:
            yield self.features.name, self.features
        elif evidence.public_classifier is not None:
            yield "classifier", classifier_features(evidence.public_classifier)


def _units(images: Images) -> Indices:
    return np.arange(len(images)) if images.units is None else images.units


def _some_units(images: Images, maximum: int, seed: int) -> Images:
    """Return whole units, at random, with about ``maximum`` images or with all."""
    units = np.unique(_units(images))
    kept = max(1, len(units) * min(maximum, len(images)) // len(images))
    chosen = np.random.default_rng(seed).permutation(units)[:kept]
    return images.select(np.flatnonzero(np.isin(_units(images), chosen)))


def _most_like_copies(
    samples: Images, train: Images, held_out: Images, pairs: int
) -> list[NearestPair]:
    """Return the samples whose nearest training image is the most singular, in pixels."""
    flat = [images.pixels.reshape(len(images), -1) for images in (samples, train, held_out)]
    distances, indices = several_nearest(flat[0], flat[1], min(NEIGHBOURS, len(train)))
    chosen = np.argsort(relative_distances(distances), kind="stable")[:pairs]
    to_held_out, nearest_held_out = nearest(flat[0][chosen], flat[2])
    return [
        NearestPair(
            samples.pixels[row],
            train.pixels[indices[row, 0]],
            held_out.pixels[nearest_held_out[place]],
            float(distances[row, 0]),
            float(to_held_out[place]),
        )
        for place, row in enumerate(chosen)
    ]


def _add_closeness(metrics: Metrics, suffix: str, noun: str, closeness: Closeness) -> None:
    n = closeness.closer_to_train.n
    metrics.add_estimate(
        f"memorization/closer_to_train.{suffix}",
        closeness.closer_to_train,
        private=True,
        what=f"Share of the {noun} that are nearer to a training image than to any of as many "
        "held-out ones: about 0.5 if nothing is memorised. The interval is for these very "
        "images to compare with; whether 0.5 is left behind is for the p-value to say.",
    )
    metrics.add(
        f"memorization/p_value.{suffix}",
        closeness.p_value,
        private=True,
        n=n,
        what=f"Probability that chance brings as many of the {noun} nearer to training than to "
        "held-out images, by permuting which are which (9,999 times).",
    )
    if closeness.distance_ratio is not None:
        metrics.add(
            f"memorization/distance_ratio.{suffix}",
            closeness.distance_ratio,
            private=True,
            n=n,
            what=f"Mean distance of the {noun} to the nearest training image over that to the "
            "nearest of as many held-out images: about 1 if nothing is memorised, less if "
            "something is.",
        )


def _add_copies(metrics: Metrics, space: str, copies: Copies) -> None:
    alike = "to one training image as only 1 in 500 real images is"
    for name, value, what in (
        ("copies", float(copies.found), f"Synthetic images that are nearer {alike}."),
        ("copies_expected", copies.expected, f"How many real images would be nearer {alike}."),
        (
            "copies_p_value",
            copies.p_value,
            f"Probability that as many images are nearer {alike}, if they are as fresh as that.",
        ),
    ):
        metrics.add(f"memorization/{name}.{space}", value, private=True, n=copies.n, what=what)
