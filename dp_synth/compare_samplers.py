"""``python -m dp_synth.compare_samplers run=DIR``: the sampler to take, without private images."""

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dp_synth.books import Books
from dp_synth.checks import flag
from dp_synth.cli import command
from dp_synth.errors import UserError
from dp_synth.fitting import Interrupted
from dp_synth.metrics.synthetic_evaluator import SyntheticEvaluator
from dp_synth.runs import Run
from dp_synth.sampling.comparison import (
    PRIVATE_NOTE,
    Choice,
    Comparison,
    Record,
    build_candidates,
    choose,
    overrides_of,
    table,
)
from dp_synth.sampling.criteria import Criteria
from dp_synth.summary import shown

RECORD = "sampler_comparison.json"


def compare_samplers(run: Run, cfg: DictConfig) -> Choice:
    """Measure every candidate, print how they compare, and choose one.

    What the run's record has of a candidate is not measured again. With ``private=true`` the
    private test images judge them, too, each time a look that eps does not cover.

    Args:
        run: a finished run.
        cfg: the config of ``conf/compare_samplers.yaml``.

    Raises:
        UserError: no model, no candidate, an unknown reference, a value out of range.
        Interrupted: the public model was to be trained once more, and that was stopped.
    """
    flag("private", cfg.private)
    samplers = build_candidates(cfg)
    evaluator = instantiate(cfg.evaluator)
    if not isinstance(evaluator, SyntheticEvaluator):
        raise UserError("samplers are compared with evaluator=synthetic and no other.")
    run.load_model()  # says what is wrong where a run has none
    criteria = Criteria(run, evaluator)
    criterion = criteria.named(cfg.criterion)
    settings = {
        "criterion": criterion.name,
        "evaluator": OmegaConf.to_container(cfg.evaluator, resolve=True),
        **{key: cfg[key] for key in ("num_images", "seed", "seeds")},
    }
    record = Record(run.path / RECORD, settings)
    comparison = Comparison(run, samplers, cfg.seed, cfg.seeds, record)

    comparison.measure(criterion)
    entries = comparison.entries
    choice = choose(entries, cfg.reference)
    overrides = overrides_of(cfg.candidates[choice.name])
    print(f"\nAccuracy {criterion.what}:\n{table(entries, cfg.reference)}")

    if cfg.private:
        private = criteria.private_test()
        comparison.look(private, Books(run))
        found = table(comparison.entries, cfg.reference, part="private")
        print(f"\nAccuracy {private.what} ({PRIVATE_NOTE}):\n{found}")
    record.conclude(chosen=choice.name, reason=choice.reason, overrides=overrides)
    print(f"\nChosen     {choice.name}: {choice.reason}\nOverrides  {overrides}")
    print(f"Record     {shown(record.path)}")
    return choice


@command("compare_samplers")
def main(cfg: DictConfig) -> None:
    """Compare samplers on a finished run."""
    run = Run.open(cfg.run)
    try:
        with run.locked():
            compare_samplers(run, cfg)
    except Interrupted as stop:  # the public model was being trained once more
        raise KeyboardInterrupt from stop


if __name__ == "__main__":
    main()
