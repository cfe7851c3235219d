"""The optimizer that adds noise: Opacus' own, fed by a noise source that each step is given."""

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch.optim import Optimizer

from dp_synth.privacy.noise import GaussianNoise, GeneratorNoise, SecureNoise
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.randomness import Randomness


class NoisingOptimizer(DPOptimizerFastGradientClipping):
    """Feeds an optimizer with (clipped sum + noise) / expected batch size, as a plan has them.

    Guarantee: every trainable parameter's whole sum is noised once per step, with standard deviation
    `noise_multiplier * max_grad_norm` (`SecureNoise` says by how little it is more under
    `privacy.secure_noise`), by a source made for that step alone. Abadi et al. 2016
    (arXiv 1607.00133), algorithm 1.

    Args:
        optimizer: takes the step; the clipped sums are its parameters' `.grad`.
        plan: a calibrated plan.

    Raises:
        UserError: `privacy.secure_noise` cannot be had for this plan or here.
    """

    def __init__(self, optimizer: Optimizer, plan: PrivacyPlan) -> None:
        assert plan.noise_multiplier is not None
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.batch_size,
        )
        self.plan = plan
        self._noise: GaussianNoise | None = None
        if plan.secure_noise:
            self._secure_noise()  # refused now rather than in the first step

    def begin_step(self, randomness: Randomness, step: int, device: torch.device | str) -> None:
        """Give the coming step its noise.

        Args:
            randomness: has the step's generator, unless noise is secure: that has its own source.
            step: from 0; repeatable randomness is keyed by it.
            device: where the parameters are.
        """
        if self.plan.secure_noise:
            self._noise = self._secure_noise()
        else:
            std = self.noise_multiplier * self.max_grad_norm
            self._noise = GeneratorNoise(std, randomness.noise_generator(step, device))

    def add_noise(self) -> None:
        """Put the noised sums into the parameters' `.grad`, and forget the step's noise source.

        Raises:
            RuntimeError: the step was given none.
            ValueError: the last step's sums are still there.
        """
        if self._noise is None:
            raise RuntimeError("this step has no noise: call begin_step before each step")
        for param in self.params:
            _check_processed_flag(param.summed_grad)
            param.grad = self._noise.add_to(param.summed_grad)
            _mark_as_processed(param.summed_grad)
        self._noise = None

    def _secure_noise(self) -> SecureNoise:
        return SecureNoise(
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            size=sum(param.numel() for param in self.params),
            num_examples=self.plan.num_examples,
        )
