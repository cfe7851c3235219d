"""Facts about the private data set that are public by declaration: typed, or told by names alone."""

import math
import sys
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dp_synth.data.survey import Survey
from dp_synth.errors import UserError
from dp_synth.privacy.ledger import default_path

# With a third of the examples in a batch the noise in each step is small for its eps, and a few
# hundred steps are few passes; beyond a few thousand, cost grows faster than noise falls.
_LARGEST_BATCH = 4096
# Of eps, for the histogram of labels. Costs of unlike Gaussian queries add up about as squares: a
# twentieth takes a four-hundredth of what training has.
_HISTOGRAM_SHARE = 0.05


def declare(cfg: DictConfig) -> Survey | None:
    """Fill in what the config leaves open about the private data set; no image is opened.

    N and the number of classes are counted in names; delta and the batch size follow N. After
    this, ``cfg`` is as if all of them had been typed.

    Args:
        cfg: the config of a run; its ``dataset`` and ``privacy`` change.

    Returns:
        What the names tell, or None where there is nothing to look at.

    Raises:
        UserError: nothing tells a number that is not declared, or the declared one is not what is
            found.
    """
    dataset = cfg.dataset
    survey: Survey | None = instantiate(dataset.survey) if "survey" in dataset else None
    if survey is not None:
        if dataset.num_examples is None:
            print(
                f"dataset.num_examples={survey.num_examples}: counted by name, taken as public",
                file=sys.stderr,
            )
        is_found = survey.num_files is not None
        _fill_in(dataset, "num_examples", survey.num_examples, is_found)
        _fill_in(dataset, "num_classes", len(survey.classes), is_found)
    for key in ("num_examples", "num_classes"):
        if dataset[key] is None:
            raise UserError(
                f"dataset.{key} is not known: declare dataset.{key}=..., or give dataset.root=DIR, "
                "where the names of the files tell."
            )
    if dataset.delta is None:
        dataset.delta = default_delta(dataset.num_examples)
    _declare_histogram(cfg)
    if "ledger" in cfg:  # a run goes on with the ledger that it began with, wherever that may be
        path = Path(cfg.ledger.path or default_path())
        cfg.ledger.path = str(path.expanduser().absolute())
    if cfg.privacy.batch_size is None:
        cfg.privacy.batch_size = min(_LARGEST_BATCH, -(-dataset.num_examples // 3))
    if OmegaConf.select(cfg, "audit._target_"):  # canaries are examples, too
        cfg.privacy.num_examples = dataset.num_examples + instantiate(cfg.audit).num_canaries
    return survey


def _declare_histogram(cfg: DictConfig) -> None:
    """Samplers that ask for the classes' shares have the plan query them."""
    if OmegaConf.select(cfg, "sampler.labels") != "dp_histogram":
        return
    if OmegaConf.select(cfg, "privacy.eps") is None:
        raise UserError(
            "sampler.labels=dp_histogram is a private query, and privacy=none has no budget for "
            "it; sampler.labels=uniform would work."
        )
    if cfg.privacy.label_histogram_eps is None:
        cfg.privacy.label_histogram_eps = cfg.privacy.eps * _HISTOGRAM_SHARE


def default_delta(num_examples: int) -> float:
    """1 / (N ln N) rounded down to one digit: below 1 / N, since a delta of 1 / N allows a leak.

    Of one record picked at random, that is. For N below 3, where the formula gives no such number,
    a tenth.
    """
    if num_examples < 3:
        return 0.1
    exact = 1 / (num_examples * math.log(num_examples))
    unit = 10.0 ** math.floor(math.log10(exact))
    return float(f"{math.floor(exact / unit) * unit:.0e}")


def _fill_in(dataset: DictConfig, key: str, told: int, is_found: bool) -> None:
    """Take what a survey tells; what is declared must agree with it if it was found in files."""
    if dataset[key] is None:
        dataset[key] = told
    elif is_found and dataset[key] != told:
        raise UserError(
            f"dataset.{key}={dataset[key]} is declared, but the files in dataset.root="
            f"{dataset.root} make it {told}; declare dataset.{key}={told}, or leave it out."
        )
