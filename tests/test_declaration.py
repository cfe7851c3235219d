"""What the config leaves open about the private data is filled in from names, and only from them."""

import math

import numpy as np
import pytest
from omegaconf import OmegaConf

from dp_synth.data.survey import Survey
from dp_synth.declaration import declare, default_delta
from dp_synth.errors import UserError


def surveyed(num_examples, num_classes, num_files):
    """A survey, as the config's ``_target_`` makes it."""
    return Survey(num_examples, tuple(map(str, range(num_classes))), "class folders", num_files)


def config(survey=None, **dataset):
    cfg = {
        "dataset": {"num_examples": None, "num_classes": None, "delta": None, "root": "DIR"},
        "privacy": {"batch_size": None},
    }
    cfg["dataset"].update(dataset)
    if survey is not None:
        names = ("num_examples", "num_classes", "num_files")
        cfg["dataset"]["survey"] = {
            "_target_": "test_declaration.surveyed",
            **dict(zip(names, survey, strict=True)),
        }
    return OmegaConf.create(cfg)


def test_what_is_open_is_filled_in_and_what_is_typed_stays():
    cfg = config(survey=(1009, 3, 1261))
    assert declare(cfg).num_examples == 1009
    assert cfg.dataset.num_examples == 1009 and cfg.dataset.num_classes == 3
    assert cfg.dataset.delta == default_delta(1009)
    assert cfg.privacy.batch_size == 337

    cfg = config(survey=(1009, 3, 1261), num_examples=1009, num_classes=3, delta=1e-7)
    cfg.privacy.batch_size = 11
    declare(cfg)
    assert cfg.dataset.delta == 1e-7 and cfg.privacy.batch_size == 11


@pytest.mark.parametrize("key", ["num_examples", "num_classes"])
def test_a_declared_number_that_is_not_what_is_found_is_refused(key):
    with pytest.raises(UserError, match=f"dataset.{key}=5 .* make it 7"):
        declare(config(survey=(7, 7, 9), **({"num_examples": 7, "num_classes": 7} | {key: 5})))


def test_published_numbers_do_not_contradict_what_is_declared():
    cfg = config(survey=(7, 2, None), num_examples=5)
    declare(cfg)
    assert cfg.dataset.num_examples == 5 and cfg.dataset.num_classes == 2


@pytest.mark.parametrize("known", [{}, {"num_examples": 5}, {"num_classes": 5}])
def test_without_names_what_is_missing_is_named(known):
    missing = "num_classes" if "num_examples" in known else "num_examples"
    with pytest.raises(UserError, match=f"dataset.{missing} is not known: declare"):
        declare(config(**known))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 97, 1437, 9_999, 10_000, 302_436, 10**9 + 7])
def test_delta_stays_below_one_in_n(n):
    delta = default_delta(n)
    assert 0 < delta < 1 / n
    if n >= 3:
        exact = 1 / (n * math.log(n))
        assert exact / 2 < delta <= exact * (1 + 1e-9)
        digits = np.format_float_scientific(delta, trim="-").split("e")[0]
        assert len(digits) == 1, "one digit, to be read at a glance"


def test_batches_never_hold_more_than_there_are():
    for n in (1, 2, 3, 7, 12_289, 10**6):
        cfg = config(survey=(n, 1, n))
        declare(cfg)
        assert 1 <= cfg.privacy.batch_size <= min(n, 4096)
