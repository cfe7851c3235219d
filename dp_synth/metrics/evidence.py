"""What an evaluation looks at: synthetic images, the real ones they are judged by, and baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.names import is_split_name
from dp_synth.privacy.plan import PrivacyPlan

TrainClassifier = Callable[..., Any]
RecordQuery = Callable[[dict[str, Any]], None]
DrawSamples = Callable[[int, int], Images]

_FEATURE_SEED = 0


def not_recorded(query: dict[str, Any]) -> None:
    """Where there is no run, there is no statement."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Images of one shape and with the same classes in the same order, but for the public ones.

    Attributes:
        synthetic: images of the private model, N >= 1.
        public_only: images of the model before private training (eps = 0), or None.
        real_train: the private training images, at least 1.
        real_test: the private test images, at least 1.
        other_tests: further private images by the name of their split, at least 1 each.
        public: labelled public images, which may have other classes; None or none where there are
            none.
        fresh: draws more synthetic images from the run's model: how many, and a seed; None for a
            folder of images.
        train_classifier: trains the evaluator's classifier: images, ``seed`` and ``caption`` to a
            network of logits; see ``classifiers.train_classifier``.
        train_on_public: the same for the public images, whose features are all that is asked for;
            None: ``train_classifier``.
        plan: the mechanism of the run, or None where it had no privacy or there is no run.
        flip: whether a mirrored image is as good as the image, by the data set's declaration.
        record_query: adds an entry to the queries of the run's statement; to be called before the
            query looks at private images.
        seed: fixes classifiers and subsets.
        local_dir: where parts may write files that show private images and stay where they are;
            None where nothing may be written.
    """

    synthetic: Images
    public_only: Images | None = None
    real_train: Images
    real_test: Images
    other_tests: Mapping[str, Images] = field(default_factory=dict)
    public: Images | None = None
    fresh: DrawSamples | None = None
    train_classifier: TrainClassifier
    train_on_public: TrainClassifier | None = None
    plan: PrivacyPlan | None = None
    flip: bool = False
    record_query: RecordQuery = not_recorded
    seed: int = 0
    local_dir: Path | None = None

    @cached_property
    def public_classifier(self) -> Any:
        """A classifier of the public images, whose features looked at nothing private.

        None where there are no public images. Its seed is not the run's: runs with the same public
        images share one feature space.
        """
        if self.public is None or len(self.public) == 0:
            return None
        train = self.train_on_public or self.train_classifier
        return train(self.public, seed=_FEATURE_SEED, caption="classifier: features")

    def matched(self) -> Evidence:
        """Return the same evidence with the classes of all sets as those of the real test images.

        Classes are matched by name, whatever their order.

        Raises:
            UserError: an empty set, sets of different image shapes, a class that the real test set
                does not know, or a split whose name a metric has already.
        """
        taken = [split for split in self.other_tests if not is_split_name(split)]
        if taken:
            raise UserError(
                f"dataset.other_tests={taken} would give a metric a name that is no word or that "
                "another metric has; rename the split."
            )
        if self.public is not None and len(self.public) > 0:
            _check_shape("public", self.public, self.real_test)

        def matching(name: str, images: Images) -> Images:
            return comparable(name, images, self.real_test)

        draw = self.fresh
        return replace(
            self,
            synthetic=matching("synthetic", self.synthetic),
            public_only=self.public_only and matching("public_only", self.public_only),
            real_train=matching("real_train", self.real_train),
            real_test=matching("real_test", self.real_test),
            other_tests={split: matching(split, i) for split, i in self.other_tests.items()},
            fresh=draw and (lambda n, seed: matching("fresh", draw(n, seed))),
        )


def subset(images: Images, n: int, seed: int) -> Images:
    """Return ``n`` different images, at random."""
    return images.select(np.random.default_rng(seed).permutation(len(images))[:n])


def comparable(name: str, images: Images, reference: Images) -> Images:
    """Return ``images`` with the classes of ``reference``, matched by name.

    Folders list their classes in alphabetical order and know no class without an image.

    Raises:
        UserError: no image, another image shape, or a class that ``reference`` does not have.
    """
    _check_shape(name, images, reference)
    missing = sorted(set(images.classes) - set(reference.classes))
    if missing:
        raise UserError(
            f"{name} has the classes {missing}, which the real test images do not have; "
            f"theirs are {list(reference.classes)}."
        )
    places = np.array([list(reference.classes).index(c) for c in images.classes], dtype=np.int64)
    labels = places[images.labels]
    return Images(images.pixels, labels, reference.classes, images.units, images.missing)


def _check_shape(name: str, images: Images, reference: Images) -> None:
    if len(images) == 0:
        raise UserError(f"{name} holds no image; the evaluator needs at least 1.")
    if images.shape != reference.shape:
        raise UserError(
            f"{name} holds images of shape (C, H, W) = {images.shape}, the real test set of "
            f"{reference.shape}; give both the same size and channels."
        )
