"""A classifier trained on the private images themselves by DP-SGD: what a generator has to beat."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from dp_synth.checks import count, fraction, positive, whole
from dp_synth.data.images import Images
from dp_synth.data.module import Batch, ImageDataModule
from dp_synth.data.pixels import to_float
from dp_synth.metrics.augmentation import default_shift, mirror, shift
from dp_synth.metrics.classifier_networks import Classifier
from dp_synth.metrics.classifiers import Network, build, default_device, seeded
from dp_synth.privacy.clipping import ClippingEngine, check_engine
from dp_synth.privacy.clipping.loss import RowLoss
from dp_synth.privacy.optimizer import NoisingOptimizer
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.randomness import Randomness
from dp_synth.privacy.silence import silently
from dp_synth.privacy.units import spread
from dp_synth.progress import private_bar

_KEY = "evaluator.utility.dp_classifier"
_CHECKED_EXAMPLES = 5  # of the engine's self-check


class PrivateClassifier:
    """Trains a classifier on private images by DP-SGD, with the eps and delta of a run.

    Abadi et al. 2016 (arXiv 1607.00133), with augmentation multiplicity, group normalisation and
    averaged weights as De et al. 2022 (arXiv 2204.13650). It is a query of its own: whoever
    publishes it, or its accuracy, spends this eps beside the run's.

    Args:
        network: as in ``train_classifier``; without normalisation over the batch.
        steps: noisy updates.
        batch_size: expected examples (units) of a batch; None: the run's.
        multiplicity: views of an example, averaged before the clip.
        max_grad_norm: L2 bound of an example's contribution.
        lr: of SGD with momentum 0.9; falls linearly to zero.
        ema_decay: limit of the decay of the averaged weights, 0..1.
        max_shift: greatest random translation each way, in pixels; None: a sixteenth of the side.
        device: where to train; None: a GPU where there is one.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        network: Network,
        steps: int,
        batch_size: int | None = None,
        multiplicity: int,
        max_grad_norm: float,
        lr: float,
        ema_decay: float,
        max_shift: int | None = None,
        device: str | None = None,
    ) -> None:
        self.network = network
        self.steps = count(f"{_KEY}.steps", steps)
        self.batch_size = batch_size and count(f"{_KEY}.batch_size", batch_size)
        self.multiplicity = count(f"{_KEY}.multiplicity", multiplicity)
        self.max_grad_norm = positive(f"{_KEY}.max_grad_norm", max_grad_norm)
        self.lr = positive(f"{_KEY}.lr", lr)
        self.ema_decay = fraction(f"{_KEY}.ema_decay", ema_decay)
        self.max_shift = None if max_shift is None else whole(f"{_KEY}.max_shift", max_shift)
        self.device = default_device(device)

    def plan(self, run: PrivacyPlan) -> PrivacyPlan:
        """Return the calibrated mechanism: eps, delta, N and unit are those of the plan ``run``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about delta, which the run's plan has given
            plan = replace(
                run,
                batch_size=self.batch_size or run.batch_size,
                steps=self.steps,
                multiplicity=self.multiplicity,
                max_grad_norm=self.max_grad_norm,
                clipping="flat",
                engine="auto",
                noise_multiplier=None,
                label_histogram_eps=None,
                abandoned_steps=0,
            )
        return plan.calibrate()

    def train(
        self,
        images: Images,
        plan: PrivacyPlan,
        *,
        flip: bool = False,
        seed: int,
        caption: str = "classifier: DP-SGD",
        local_dir: Path | None = None,
    ) -> Classifier:
        """Return the classifier, in evaluation mode, after exactly ``plan.steps`` noisy updates.

        It is (eps, delta)-differentially private as the plan states. Batches, views and noise are
        the plan's private randomness; no loss, norm or batch size is shown.

        Args:
            images: the private training images, as many examples (units) as ``plan.num_examples``.
            plan: what ``plan`` returned.
            flip: whether half of the views are mirrored.
            seed: fixes the initial weights alone.
            caption: text of the progress bar.
            local_dir: where what goes wrong is kept; see ``silence.silently``.

        Raises:
            ValueError: the plan is for another number of examples.
            UserError: a network that mixes examples, or that the engine gets wrong.
            Withheld: any other error of the training itself.
        """
        if images.num_examples != plan.num_examples:
            raise ValueError(
                f"the plan is for num_examples={plan.num_examples}, not {images.num_examples}"
            )
        # For the initial weights alone. The loop is inside since the loader, too, draws from the
        # global generator: a seed for worker processes, which it does not have.
        with seeded(seed, self.device):
            # Evaluation mode throughout: dropout would draw from a generator that is no secret.
            net = build(self.network, images).to(self.device).eval()
            silently(lambda: self._fit(net, images, plan, flip, seed, caption), local_dir)
        return net

    def _fit(
        self,
        net: Classifier,
        images: Images,
        plan: PrivacyPlan,
        flip: bool,
        seed: int,
        caption: str,
    ) -> None:
        engine = ClippingEngine(net, plan.max_grad_norm, clipping=plan.clipping)
        self._check(engine, images, seed)
        sgd = torch.optim.SGD(net.parameters(), lr=self.lr, momentum=0.9)
        optimizer = NoisingOptimizer(sgd, plan)
        ema = EMAModel(net.parameters(), decay=self.ema_decay)
        randomness = plan.randomness(seed)
        batches = ImageDataModule(images, lambda _: plan.batches(randomness)).train_dataloader()
        bar = private_bar(caption, plan.steps)
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 - step / plan.steps)
            rows = self._rows(batch, randomness, step, flip)
            optimizer.zero_grad()
            engine.accumulate(_loss(net), rows, self.multiplicity)
            optimizer.begin_step(randomness, step, self.device)
            optimizer.step()
            ema.step(net.parameters())
            bar.update()
        bar.close()
        engine.remove()
        ema.copy_to(net.parameters())

    def _rows(
        self, batch: Batch, randomness: Randomness, step: int, flip: bool
    ) -> tuple[Tensor, Tensor]:
        """Return ``[K*B, C, H, W]`` views and their labels ``[K*B]``; row k * B + i is view k of i.

        Changing an example, or how many images a unit has, changes no other's rows.
        """
        k = self.multiplicity
        draws = randomness.rows(step, batch.indices, k, "cpu")
        image = torch.arange(len(batch.indices)).repeat(k)
        if batch.counts is not None:
            image = spread(batch.counts, k, draws.uniform())
        x = to_float(batch.pixels[image])
        # Drawn whether used or not: what is drawn depends on no setting.
        down, right, coin = (draws.uniform() for _ in range(3))
        max_shift = default_shift(*x.shape[2:]) if self.max_shift is None else self.max_shift
        x = shift(x, _offsets(down, max_shift), _offsets(right, max_shift))
        if flip:
            x = mirror(x, coin < 0.5)
        return x.to(self.device), batch.labels[image].to(self.device)

    def _check(self, engine: ClippingEngine, images: Images, seed: int) -> None:
        """Compare the engine with brute force, on random images of the same shape."""
        generator = torch.Generator().manual_seed(seed)
        num_rows = self.multiplicity * _CHECKED_EXAMPLES
        x = torch.rand(num_rows, *images.shape, generator=generator) * 2 - 1
        y = torch.randint(len(images.classes), (num_rows,), generator=generator)
        rows = (x.to(self.device), y.to(self.device))
        check_engine(engine, _loss(engine.net), rows, self.multiplicity)


def _loss(net: nn.Module) -> RowLoss:
    """Images ``[R, C, H, W]`` and labels ``[R]`` to one loss per row, ``[R]``."""
    return lambda x, y: F.cross_entropy(net(x), y, reduction="none")


def _offsets(uniform: Tensor, most: int) -> Tensor:
    """Whole numbers in -most .. most from uniform ones in [0, 1)."""
    # A float32 below 1 is at most 1 - 2**-24, so that the product rounds to no more than most.
    return (uniform * (2 * most + 1)).floor().long().clamp_(max=2 * most) - most
