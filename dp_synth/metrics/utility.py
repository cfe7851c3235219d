"""Utility of a synthetic data set: train a classifier on synthetic images, test it on real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dp_synth.checks import count, whole
from dp_synth.data.folder import read_image_folder
from dp_synth.data.images import Images
from dp_synth.errors import UserError
from dp_synth.metrics.answers import Answers
from dp_synth.metrics.classifiers import Network, predict, probabilities
from dp_synth.metrics.estimates import accuracy
from dp_synth.metrics.evidence import DrawSamples, Evidence, comparable
from dp_synth.metrics.private_classifier import PrivateClassifier
from dp_synth.metrics.record import Metrics
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.statement import query_entry
from dp_synth.privacy.wording import eps_at_delta

_KEY = "evaluator.utility"


class Utility:
    """Accuracy on real images of classifiers trained on synthetic ones, and of the baselines'.

    Every classifier is trained in the same way, for as many steps, and nothing is selected: no
    network, epoch or setting by its accuracy on private images, nor by any other.

    Args:
        validation_fraction: share of the synthetic images kept from the classifier's training to
            validate it on synthetic images, 0..1 (0: no such metric).
        seeds: how many classifiers are trained on each set of images. With several, accuracies are
            their mean, intervals cover their variation too, and their ensemble is one more metric.
        networks: networks by name, see ``train_classifier``, in place of the evaluator's; accuracies are
            the mean over them, and each one's is a metric, too.
        sizes: numbers of synthetic images, drawn from those to train on, to train classifiers on;
            those that there are not are left out.
        fresh_epochs: how many sets of as many new images are drawn, one after another, to train on
            after those that there are, see ``train_classifier``; 0, or a folder of images without
            a model: no such metric.
        dp_classifier: trains a classifier directly on the private images at the run's eps and
            delta, which spends them once more; None: no such baseline.
        non_private_samples: folder of a generator's samples that was trained without privacy, one
            subfolder per class; None: no such baseline.

    Raises:
        UserError: a value out of range, or a folder that does not exist.
    """

    def __init__(
        self,
        *,
        validation_fraction: float,
        seeds: int = 1,
        networks: Mapping[str, Network] | None = None,
        sizes: Sequence[int] = (),
        fresh_epochs: int = 0,
        dp_classifier: PrivateClassifier | None = None,
        non_private_samples: str | Path | None = None,
    ) -> None:
        if not 0 <= validation_fraction < 1:
            raise UserError(
                f"{_KEY}.validation_fraction={validation_fraction} must be at least 0 "
                "and less than 1, such as 0.1."
            )
        if non_private_samples is not None and not Path(non_private_samples).is_dir():
            raise UserError(
                f"{_KEY}.non_private_samples={non_private_samples} is not a folder; name the "
                "samples/ of a run with privacy=none."
            )
        self.validation_fraction = validation_fraction
        self.seeds = count(f"{_KEY}.seeds", seeds)
        self.networks = networks
        self.sizes = [count(f"{_KEY}.sizes", size) for size in sizes]
        self.fresh_epochs = whole(f"{_KEY}.fresh_epochs", fresh_epochs)
        self.dp_classifier = dp_classifier
        self.non_private_samples = non_private_samples

    def __call__(self, evidence: Evidence, metrics: Metrics) -> None:
        """Add ``utility/*``."""
        training, validation = self._split(evidence.synthetic, evidence.seed)
        self._add_synthetic(evidence, metrics, training, validation)
        for name, images, described in self._others(evidence, training):
            self._add_trained_on(evidence, metrics, name, images, described)
        if self.fresh_epochs > 0 and evidence.fresh is not None:
            self._add_trained_on_fresh(evidence, metrics, training, evidence.fresh)
        if self.dp_classifier is not None and evidence.plan is not None:
            self._add_dp_classifier(evidence, metrics, self.dp_classifier, evidence.plan)

    def _others(self, evidence: Evidence, training: Images) -> Iterator[tuple[str, Images, str]]:
        """Yield what else to train on: the metric's name, the images, and what they are."""
        for size in self.sizes:
            if size <= len(training):
                # In a random order already; so the sets of a curve lie in one another.
                yield f"size.{size}", training.select(np.arange(size)), f"{size} synthetic images"
        # Of generators' images the same share is kept back: the images alone differ.
        if evidence.public_only is not None:
            images, _ = self._split(evidence.public_only, evidence.seed)
            yield "public_only", images, "images of the model before private training (eps = 0)"
        yield "real", evidence.real_train, "the real images, without privacy"
        if self.non_private_samples is not None:
            samples = read_image_folder(self.non_private_samples)
            samples = comparable(f"{_KEY}.non_private_samples", samples, evidence.real_test)
            images, _ = self._split(samples, evidence.seed)
            yield "non_private_generator", images, "images of a generator trained without privacy"

    def _add_synthetic(
        self, evidence: Evidence, metrics: Metrics, training: Images, validation: Images
    ) -> None:
        tests = [evidence.real_test, *evidence.other_tests.values(), validation]
        answers, *others, validated = self._ask(evidence, training, tests, "synthetic")
        self._add_accuracies(metrics, answers)
        noun = self._noun()
        for split, other in zip(evidence.other_tests, others, strict=True):
            metrics.add_estimate(
                f"utility/accuracy.{split}",
                other.accuracy(),
                private=True,
                what=f"Accuracy on the real images of the split {split} of {noun} trained on the "
                "synthetic images.",
            )
        for name, estimate in answers.recall().items():
            metrics.add(
                f"utility/recall.{name}",
                estimate.value,
                private=True,
                n=estimate.n,
                what=f"Share of the real test images of class {name} that {noun} trained on the "
                "synthetic images labels right.",
            )
        metrics.add(
            "utility/calibration_error",
            answers.calibration_error(),
            private=True,
            n=len(evidence.real_test),
            what="Expected calibration error on real test images, in 15 bins: how far the "
            f"confidence of {noun} trained on the synthetic images is from its accuracy.",
        )
        if len(validation) > 0:
            metrics.add_estimate(
                "utility/accuracy.synthetic_validation",
                validated.accuracy(),
                private=False,
                what=f"Accuracy of {noun} trained on the synthetic images on others of them, kept "
                "from its training.",
            )

    def _add_accuracies(self, metrics: Metrics, answers: Answers) -> None:
        """Add the accuracy on real test images: the mean, each network's, the ensemble's."""
        metrics.add_estimate(
            "utility/accuracy",
            answers.accuracy(),
            private=True,
            what=f"Accuracy on real test images of {self._noun()} trained on the synthetic images.",
        )
        if self.networks is not None:
            for name, estimate in answers.accuracies().items():
                metrics.add_estimate(
                    f"utility/accuracy.classifier.{name}",
                    estimate,
                    private=True,
                    what=f"The same of the network {name} alone.",
                )
        if answers.num_classifiers > 1:
            metrics.add_estimate(
                "utility/accuracy.ensemble",
                answers.ensemble(),
                private=True,
                what=f"Accuracy on real test images of the {answers.num_classifiers} classifiers "
                "trained on the synthetic images together, which average their probabilities. The "
                "interval covers this ensemble alone.",
            )

    def _add_trained_on(
        self, evidence: Evidence, metrics: Metrics, name: str, images: Images, described: str
    ) -> None:
        """Add ``utility/accuracy.<name>`` of classifiers trained on ``images``."""
        (answers,) = self._ask(evidence, images, [evidence.real_test], name)
        metrics.add_estimate(
            f"utility/accuracy.{name}",
            answers.accuracy(),
            private=True,
            what=f"Accuracy on real test images of {self._noun()} trained on {described}.",
        )

    def _add_trained_on_fresh(
        self, evidence: Evidence, metrics: Metrics, training: Images, draw: DrawSamples
    ) -> None:
        def fresh(seed: int) -> list[Callable[[], Images]]:
            return [
                partial(draw, len(training), _sampling_seed(seed, epoch))
                for epoch in range(self.fresh_epochs)
            ]

        (answers,) = self._ask(evidence, training, [evidence.real_test], "fresh images", fresh)
        metrics.add_estimate(
            "utility/accuracy.fresh",
            answers.accuracy(),
            private=True,
            what=f"Accuracy on real test images of {self._noun()} trained for as many steps, on "
            f"synthetic images that are drawn anew up to {self.fresh_epochs} times on the way.",
        )

    def _add_dp_classifier(
        self, evidence: Evidence, metrics: Metrics, trainer: PrivateClassifier, run: PrivacyPlan
    ) -> None:
        # The run's own N counts the canaries of an audit, too.
        plan = trainer.plan(replace(run, num_examples=evidence.real_train.num_examples))
        query = query_entry(
            "dp_sgd_classifier",
            plan.mechanisms()["dp_sgd"],
            delta=plan.delta,
            accountant=plan.accountant,
            released="A classifier's accuracy, as a baseline. Its eps is spent beside that of the "
            "synthetic data, by whoever publishes the accuracy or the classifier.",
        )
        evidence.record_query(query)
        model = trainer.train(
            evidence.real_train,
            plan,
            flip=evidence.flip,
            seed=evidence.seed,
            local_dir=evidence.local_dir,
        )
        metrics.add_estimate(
            "utility/accuracy.dp_classifier",
            accuracy(predict(model, evidence.real_test), evidence.real_test),
            private=True,
            what="Accuracy on real test images of a classifier trained directly on the real images "
            f"by DP-SGD, at {eps_at_delta(query['eps'], plan.delta)}: a private query of its own, "
            "beside that of the synthetic data. It has one training, whose chance the interval "
            "does not cover.",
        )

    def _ask(
        self,
        evidence: Evidence,
        training: Images,
        tests: Sequence[Images],
        caption: str,
        fresh: Callable[[int], Sequence[Callable[[], Images]]] | None = None,
    ) -> list[Answers]:
        """Train on ``training`` for each network and seed; return the answers to each test.

        Args:
            evidence: how to train.
            training: what to train on, first where there is ``fresh``.
            tests: images to label.
            caption: of the progress bar.
            fresh: seed of a classifier to what draws further images for it.
        """
        networks = self._networks()
        found: list[dict[str, list[npt.NDArray[np.float32]]]]
        found = [{name: [] for name in networks} for _ in tests]
        for name, options in networks.items():
            for seed in range(evidence.seed, evidence.seed + self.seeds):
                model = evidence.train_classifier(
                    training,
                    seed=seed,
                    caption=" ".join(["classifier:", caption, *([name] if options else [])]),
                    **options,
                    **({"fresh": fresh(seed)} if fresh is not None else {}),
                )
                for images, answers in zip(tests, found, strict=True):
                    answers[name].append(probabilities(model, images))
        return [
            Answers(images, {name: np.stack(rows) for name, rows in answers.items()})
            for images, answers in zip(tests, found, strict=True)
        ]

    def _networks(self) -> dict[str, dict[str, Network]]:
        """By name, what to tell ``train_classifier`` about the network."""
        if self.networks is None:
            return {"evaluator's own": {}}
        return {name: {"network": network} for name, network in self.networks.items()}

    def _noun(self) -> str:
        """What the accuracies are of, for a sentence."""
        if self.networks is None and self.seeds == 1:
            return "a classifier"
        networks = "a classifier" if self.networks is None else " and ".join(self.networks)
        return f"{networks} (mean over {self.seeds} seed{'s' if self.seeds > 1 else ''})"

    def _split(self, images: Images, seed: int) -> tuple[Images, Images]:
        """Split at random into a part to train on, never empty, and one to validate on."""
        order = np.random.default_rng(seed).permutation(len(images))
        held_out = int(self.validation_fraction * len(images))
        return images.select(order[held_out:]), images.select(order[:held_out])


def _sampling_seed(seed: int, epoch: int) -> int:
    """Return a seed of an epoch's images; not a small number, with which a run drew its own."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
