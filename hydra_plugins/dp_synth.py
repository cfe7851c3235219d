"""What Hydra must know of ``-m hparams_search=private``; it looks for plugins in this package alone.

Every Hydra program of the environment imports this module, so that it imports next to nothing.
"""

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RandomStoppingSweeper(Sweeper):
    """Hands a sweep over to ``dp_synth.searching.RandomStoppingSearch``, whose options it takes."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra gives a sweeper."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the search; ``arguments`` are the command line's overrides."""
        from dp_synth.searching import RandomStoppingSearch

        assert self.hydra_context and self.launcher and self.config  # by setup
        loader = self.hydra_context.config_loader
        RandomStoppingSearch(loader, self.launcher, self.config, **self.options).run(arguments)
