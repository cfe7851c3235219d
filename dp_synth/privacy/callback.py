"""Makes a Lightning run private: the one file that knows both Lightning and Opacus."""

from collections.abc import Iterable
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from opacus.accountants import create_accountant
from torch import Tensor, nn

from dp_synth.data.module import Batch
from dp_synth.errors import UserError
from dp_synth.module import DiffusionModule, MakeOptimizer
from dp_synth.privacy.clipping import ClippingEngine, check_engine
from dp_synth.privacy.clipping.choice import Engine, make_engine
from dp_synth.privacy.clipping.tuning import timings_file
from dp_synth.privacy.optimizer import NoisingOptimizer
from dp_synth.privacy.plan import PrivacyPlan
from dp_synth.privacy.silence import StepFault, screen

# Examples in the self-check: enough to have clipped and unclipped ones, few enough for seconds.
_CHECKED_EXAMPLES = 5


class PrivacyEngineCallback(Callback):
    """Attaches the clipping engine, swaps in the noising optimizer, counts steps, stops in time.

    Built from Opacus' parts rather than from ``PrivacyEngine.make_private``, which wants to own the
    data loader and rounds the sampling rate. Every optimizer step adds noise once and is counted
    once, by the same hook; a step beyond the planned ones is refused before it reads its batch.

    Args:
        plan: a calibrated plan.
        micro_batch_size: rows of one backward, or None for the fastest number.
        memory_mib: what a backward may take, in MiB, or None for what suits the machine.
    """

    def __init__(
        self,
        plan: PrivacyPlan,
        micro_batch_size: int | None = None,
        memory_mib: float | None = None,
    ) -> None:
        if plan.noise_multiplier is None:
            raise ValueError("the plan must be calibrated: call plan.calibrate() first")
        self.plan = plan
        self.micro_batch_size = micro_batch_size
        self.memory_mib = memory_mib
        self.accountant = create_accountant("prv")

    @property
    def steps_taken(self) -> int:
        """Noisy updates made so far, by the accountant's own history."""
        return sum(steps for _, _, steps in self.accountant.history)

    @property
    def eps(self) -> float:
        """eps spent so far: a function of the plan and the number of steps alone."""
        return self.plan.epsilon(self.steps_taken)

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Put engine and optimizer in place; no private image is read."""
        assert isinstance(pl_module, DiffusionModule)
        if trainer.world_size != 1:
            raise UserError(
                f"trainer.devices gives {trainer.world_size} processes, and private training runs "
                "on one: trainer.devices=1 would work."
            )
        # Before Lightning does: the engine's buffers live where the parameters are when it is made.
        pl_module.net.to(trainer.strategy.root_device)
        pl_module.engine = make_engine(
            pl_module.net, self.plan, self.micro_batch_size, self.memory_mib
        )
        pl_module.make_optimizer = self._noising(pl_module.make_optimizer)

    def _prepare(self, engine: Engine, pl_module: DiffusionModule) -> None:
        """Find the engine's fastest ways, and compare it with brute force, on random images."""
        print("timing and checking the clipping engine on random images ...", file=screen())
        rows = _random_rows(pl_module)
        loss = pl_module.diffusion.row_loss(pl_module.net)
        # Measured times differ from run to run, and with them the last digits of a sum.
        repeatable = self.plan.unsafe_repeatable_randomness is not None
        if isinstance(engine, ClippingEngine) and not repeatable:
            engine.tune(
                loss, rows, pl_module.multiplicity, self.plan.batch_size, cache=timings_file()
            )
        if isinstance(engine, ClippingEngine) and engine.fallback_reason is not None:
            print(
                f"clipping one example at a time, which is slower: {engine.fallback_reason}",
                file=screen(),
            )
        check_engine(engine, loss, rows, pl_module.multiplicity)

    def _noising(self, make_optimizer: MakeOptimizer) -> MakeOptimizer:
        """The same optimizer, fed with the noised sum divided by the expected batch size."""

        def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            optimizer = NoisingOptimizer(make_optimizer(parameters), self.plan)
            optimizer.attach_step_hook(self._count)
            return optimizer

        return make

    def _count(self, optimizer: NoisingOptimizer) -> None:
        self.accountant.step(
            noise_multiplier=optimizer.noise_multiplier, sample_rate=self.plan.sample_rate
        )

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Tune and check the engine in the run's precision, and make dropout's randomness private too."""
        assert isinstance(pl_module, DiffusionModule)
        assert isinstance(pl_module.engine, Engine)
        with trainer.precision_plugin.forward_context():
            self._prepare(pl_module.engine, pl_module)
        if self.plan.unsafe_repeatable_randomness is None:
            torch.seed()
            # On a CPU torch.seed keeps 32 bits, few enough to try them all.
            secret = pl_module.randomness.noise_generator(self.steps_taken, "cpu")
            torch.set_rng_state(secret.get_state())

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Refuse a step that the plan does not hold, and give the step its noise."""
        assert isinstance(pl_module, DiffusionModule)
        if self.steps_taken >= self.plan.steps:
            raise StepFault(
                f"the plan's {self.plan.steps} steps are taken and its eps is spent; "
                "this step is refused"
            )
        if trainer.global_step != self.steps_taken:
            raise StepFault(
                f"{trainer.global_step} optimizer steps but {self.steps_taken} accounted ones; "
                "training stops, since its eps would be wrong"
            )
        (optimizer,) = trainer.optimizers
        assert isinstance(optimizer, NoisingOptimizer)
        optimizer.begin_step(pl_module.randomness, self.steps_taken, pl_module.device)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refuse a result whose steps the accountant has not seen: another run's checkpoint."""
        if trainer.global_step != self.steps_taken:
            raise StepFault(
                f"{trainer.global_step} optimizer steps but {self.steps_taken} accounted ones; the "
                "result is refused, since its eps would be wrong"
            )

    def state_dict(self) -> dict[str, Any]:
        """The plan and the accountant, for the checkpoint."""
        return {"plan": self.plan.to_dict(), "accountant": self.accountant.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a checkpoint's accountant.

        Raises:
            UserError: the checkpoint belongs to another plan.
        """
        changed = self.plan.same_mechanism(PrivacyPlan.from_dict(state_dict["plan"]))
        if changed:
            keys = ", ".join(f"privacy.{name}" for name in changed)
            raise UserError(
                f"The checkpoint was made under another plan ({keys} differ); a run resumes with "
                "the plan that it began with."
            )
        self.accountant.load_state_dict(state_dict["accountant"])


def _random_rows(pl_module: DiffusionModule) -> tuple[Tensor, ...]:
    """Rows of a few random images of the run's shape."""
    config = pl_module.net.config
    height, width = config.sample_size
    images = torch.randint(0, 256, (_CHECKED_EXAMPLES, config.in_channels, height, width))
    labels = torch.randint(0, pl_module.no_label, (_CHECKED_EXAMPLES,))
    device = pl_module.device
    batch = Batch(torch.arange(_CHECKED_EXAMPLES), images.byte().to(device), labels.to(device))
    return pl_module.draw_rows(batch, step=0)
